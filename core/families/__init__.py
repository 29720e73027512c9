"""The kinds of plugin, one file each: protocol, capabilities, intent.

A kind's name is singular and is its Hydra group. *Technique* kinds are chosen with ``+kind=name`` and
are kept out of the defaults list; their baselines are values in ``configs/config.yaml``. The others are
plain choices, ``workload=synthetic``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True, slots=True)
class Kind:
    """One family of plugins."""

    name: str
    hook: str
    """Its registration hook."""
    folder: str
    """Where in-tree plugins of it live, under ``plugins/``."""
    protocol: str
    """Import path of what the factory must return."""
    technique: bool
    """True if set with ``+kind=`` (and absent means baseline)."""
    decides: str
    """What its objects decide, in a few words."""

    @property
    def members(self) -> list[str]:
        """Names that its protocol asks for; imports that."""
        module, _, name = self.protocol.partition(":")
        declared = vars(getattr(import_module(module), name))
        return sorted(m for m in {*declared, *declared.get("__annotations__", ())} if not m.startswith("_"))


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "scheduler",
            "servelab_schedulers",
            "schedulers",
            "servelab.core.families.scheduler:Scheduler",
            True,
            "what each request does next; admission; victims; release at turn end",
        ),
        Kind(
            "kvcache",
            "servelab_kvcaches",
            "kvcache",
            "servelab.core.families.kvcache:KVCache",
            True,
            "addressing, page choice, sharing, tiers",
        ),
        Kind(
            "prefix",
            "servelab_prefix_stores",
            "prefix",
            "servelab.core.families.prefix:PrefixStore",
            True,
            "reuse of computed KV, eviction, pinning",
        ),
        Kind(
            "semantic",
            "servelab_semantic_caches",
            "semantic",
            "servelab.core.families.semantic:SemanticCache",
            True,
            "answer or augment before the engine",
        ),
        Kind(
            "quant",
            "servelab_quantizers",
            "quant",
            "servelab.core.families.quant:Quantizer",
            True,
            "weight and activation formats, calibration, linear ops",
        ),
        Kind(
            "kvquant",
            "servelab_kv_codecs",
            "quant",
            "servelab.core.families.kvquant:KVCodec",
            True,
            "KV codec",
        ),
        Kind(
            "kernel",
            "servelab_attention_backends",
            "kernels",
            "servelab.core.families.kernel:AttentionBackend",
            True,
            "attention and linear kernels",
        ),
        Kind(
            "spec",
            "servelab_speculators",
            "speculators",
            "servelab.core.families.spec:Speculator",
            True,
            "drafts and their length",
        ),
        Kind(
            "grammar",
            "servelab_grammars",
            "grammars",
            "servelab.core.families.grammar:Grammar",
            True,
            "token masks",
        ),
        Kind(
            "router",
            "servelab_routers",
            "routers",
            "servelab.core.families.router:Router",
            True,
            "dispatch, migration, roles, scaling, fleet planning",
        ),
        Kind(
            "app",
            "servelab_apps",
            "apps",
            "servelab.core.families.app:App",
            True,
            "graphs of calls and tools",
        ),
        Kind(
            "cost",
            "servelab_cost_models",
            "costmodels",
            "servelab.core.families.cost:CostModel",
            True,
            "price of a batch",
        ),
        Kind(
            "observer",
            "servelab_observers",
            "observers",
            "servelab.core.families.observer:Observer",
            False,
            "nothing: they watch",
        ),
        Kind(
            "workload",
            "servelab_workloads",
            "workloads",
            "servelab.core.families.workload:Workload",
            False,
            "the traffic",
        ),
        Kind(
            "executor",
            "servelab_executors",
            "executors",
            "servelab.core.families.executor:Executor",
            False,
            "where it runs",
        ),
        Kind("task", "servelab_tasks", "tasks", "servelab.core.families.task:Task", False, "what is done"),
    )
}
"""All kinds by name, in the order lists and tables show them."""

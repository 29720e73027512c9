"""Every registered plugin of a kind that has a suite passes it: one class per plugin, none is forgotten."""

from __future__ import annotations

from typing import Any

from servelab.core.facts import Limits
from servelab.core.registry import Registry
from servelab.core.testing import SUITES, PluginSuite, suite_of


def _fitted(suite: PluginSuite, limits: Limits) -> dict[str, Any]:
    """Settings of schedulers that state their own limits: those of the engine."""
    return {"max_num_batched_tokens": limits.max_batch_tokens, "max_num_seqs": limits.max_batch_requests}


MORE: dict[tuple[str, str], dict[str, Any]] = {
    ("scheduler", name): {"config": {"max_num_batched_tokens": 64, "max_num_seqs": 16}, "settings": _fitted}
    for name in ("aggressive", "conservative", "pastfuture", "pf_oracle", "vllm_v1")
}
"""Attributes of the suite of one plugin: settings for a toy world, exemptions with their reason."""

for _kind, _suite in SUITES.items():
    for _name in Registry.load().names(_kind):
        _of = suite_of(_suite, _name, **MORE.get((_kind, _name), {}))
        _of.__module__ = __name__
        globals()[_of.__name__] = _of

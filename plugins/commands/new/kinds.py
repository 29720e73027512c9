"""What can be made: kinds of plugin that have a template, and how the plugin of each is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offer:
    """A kind with a folder of its own under ``templates``."""

    suite: str
    """Its suite in ``servelab.core.testing``."""
    starts_as: str
    """What the generated plugin does before its author changes anything."""
    run: str
    """Arguments of a run with it, ``{name}`` for its name."""
    about_run: str = ""
    """What that run needs beyond the base installation; empty: nothing, it takes a second."""
    configs: bool = True
    """Chosen through a Hydra group, so that it needs a YAML file (observers are listed instead)."""
    torch: bool = False
    """Computes with torch, and so do its tests."""


_SCRIPTED = "+experiment=scripted"
_MODEL = "workload.num_requests=4"
_DOWNLOAD = (
    "it runs the real model, so it needs torch, and fetches SmolLM2 (93 MB) if it is not there yet; a minute"
)

OFFERS: dict[str, Offer] = {
    "scheduler": Offer(
        "SchedulerSuite",
        "first come, first served; the youngest gives way when KV pages run out",
        f"{_SCRIPTED} +scheduler={{name}}",
    ),
    "kvcache": Offer(
        "KVCacheSuite",
        "fixed pages, the one with the lowest number first",
        f"{_SCRIPTED} +kvcache={{name}}",
    ),
    "prefix": Offer(
        "PrefixSuite",
        "full pages found again by their tokens, the least recently used evicted first",
        f"{_SCRIPTED} +prefix={{name}} workload.prefix_tokens=128 workload.with_prompt_ids=true",
    ),
    "quant": Offer(
        "QuantSuite",
        "int8 weights with one scale per output, unpacked for every product",
        f"+quant={{name}} {_MODEL}",
        _DOWNLOAD,
        torch=True,
    ),
    "kernel": Offer(
        "KernelSuite",
        "attention as the formula says, row by row, over pages",
        f"+kernel={{name}} {_MODEL}",
        _DOWNLOAD,
        torch=True,
    ),
    "router": Offer(
        "RouterSuite",
        "each request to the instance with the fewest requests",
        f"{_SCRIPTED} +router={{name}} cluster.instances=2",
    ),
    "cost": Offer(
        "CostSuite",
        "a step takes the longer of computing its tokens and reading its KV",
        f"{_SCRIPTED} +cost={{name}}",
    ),
    "observer": Offer(
        "ObserverSuite",
        "counts what happens and writes the counts into the run's folder",
        f"{_SCRIPTED} 'observers=[report,{{name}}]'",
        configs=False,
    ),
    "workload": Offer(
        "WorkloadSuite",
        "bursts of requests of random lengths",
        f"{_SCRIPTED} workload={{name}}",
    ),
    "executor": Offer(
        "ExecutorSuite",
        "no model: counts tokens until the workload's true lengths",
        f"{_SCRIPTED} executor={{name}}",
    ),
}
"""Kinds that can be made, in the order of ``KINDS``."""

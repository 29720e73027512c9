"""For tests only, never imported by a run: conformance suites, mutants that prove them, and toy parts.

Each suite is imported on first use; that needs pytest and hypothesis, and never a tensor library.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servelab.core.testing.cost import CostSuite as CostSuite
    from servelab.core.testing.executor import ExecutorSuite as ExecutorSuite
    from servelab.core.testing.kernel import KernelSuite as KernelSuite
    from servelab.core.testing.kvcache import KVCacheSuite as KVCacheSuite
    from servelab.core.testing.observer import ObserverSuite as ObserverSuite
    from servelab.core.testing.prefix import PrefixSuite as PrefixSuite
    from servelab.core.testing.quant import QuantSuite as QuantSuite
    from servelab.core.testing.router import RouterSuite as RouterSuite
    from servelab.core.testing.scheduler import SchedulerSuite as SchedulerSuite
    from servelab.core.testing.suite import SUITE_API as SUITE_API
    from servelab.core.testing.suite import ConformanceError as ConformanceError
    from servelab.core.testing.suite import PluginSuite as PluginSuite
    from servelab.core.testing.suite import Result as Result
    from servelab.core.testing.suite import failures as failures
    from servelab.core.testing.suite import results as results
    from servelab.core.testing.suite import suite_of as suite_of
    from servelab.core.testing.workload import WorkloadSuite as WorkloadSuite

    SUITES: dict[str, type[PluginSuite]]

_SUITES = {
    "scheduler": "SchedulerSuite",
    "kvcache": "KVCacheSuite",
    "prefix": "PrefixSuite",
    "router": "RouterSuite",
    "cost": "CostSuite",
    "executor": "ExecutorSuite",
    "quant": "QuantSuite",
    "kernel": "KernelSuite",
    "workload": "WorkloadSuite",
    "observer": "ObserverSuite",
}
"""Kind -> its suite, in the module of the kind's name."""
_SHARED = ("SUITE_API", "ConformanceError", "PluginSuite", "Result", "failures", "results", "suite_of")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "SUITES":
        return {kind: __getattr__(suite) for kind, suite in _SUITES.items()}
    if name in _SHARED:
        return getattr(import_module("servelab.core.testing.suite"), name)
    for kind, suite in _SUITES.items():
        if suite == name:
            return getattr(import_module(f"servelab.core.testing.{kind}"), name)
    raise AttributeError(f"module 'servelab.core.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "SUITES", *_SHARED, *_SUITES.values()})

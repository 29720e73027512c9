"""A composed run has its facts, its parts and a card that says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.context import Context
from servelab.core.errors import CapabilityError, ConfigError, PluginError
from servelab.core.layout import Capacity, KVLayout
from servelab.core.registry import Registry
from servelab.core.request import SLO, Arrival, Cancel
from servelab.core.spec import PluginSpec
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig
from servelab.plugins.kvcache.paged import Paged, PagedConfig


class Closing(ScriptedExecutor):
    """Remembers being closed."""

    closed: list[str]

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(ScriptedExecutorConfig(), context)

    def close(self) -> None:
        self.closed.append("closed")


def composed(raw: dict[str, Any], registry: Registry, run_dir: Path | None = None) -> Run:
    return compose(validate(raw, registry), registry, run_dir=run_dir)


def add(registry: Registry, kind: str, factory: Any, name: str = "fake", **fields: Any) -> None:
    registry.add(kind, PluginSpec(name=name, factory="nowhere:Fake", **fields), factory=factory)


def test_facts_and_limits(raw: dict[str, Any], registry: Registry) -> None:
    raw["engine"] = {"max_batch_tokens": 4096, "max_model_len": 300, "lanes": 2, "checks": "full"}
    run = composed(raw, registry)
    assert (run.engine.limits.max_model_len, run.engine.limits.lanes) == (300, 2)
    assert run.engine.full_checks
    assert run.engine.model.kv_bytes_per_token_layer == 2 * 2 * 16 * 2
    assert composed({**raw, "engine": None}, registry).engine.limits.max_model_len == 512


def test_card(raw: dict[str, Any], registry: Registry) -> None:
    raw["scheduler"] = {"name": "vllm_v1", "max_num_seqs": 3}
    raw["observers"] = ["report"]
    info = composed(raw, registry).info
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    assert info["settings"]["scheduler"]["max_num_seqs"] == 3
    assert info["settings"]["scheduler"]["hold_steps"] == 4096
    assert info["plugins"]["scheduler"]["non_default"] == {"max_num_seqs": 3}
    assert info["plugins"]["kvcache"]["paper"].endswith("(2023, arXiv:2309.06180)")
    assert [o["name"] for o in info["plugins"]["observer"]] == ["report"]
    assert (info["seed"], info["clock"], info["stamps"]) == (7, "virtual", [])
    (pool,) = info["kv"]["pools"]
    assert (pool["id"], pool["pages"], pool["page_tokens"]) == ("kv", 512, 16)
    assert info["libraries"].keys() >= {"hydra-core", "pluggy", "pydantic"}


def test_only_executors_and_declared_oracles_see_the_truth(raw: dict[str, Any], registry: Registry) -> None:
    seen: dict[str, Context] = {}

    class Fake:
        def __init__(self, config: None, context: Context) -> None:
            seen[context.name] = context

        def plan(self, view: object) -> None: ...

    add(registry, "scheduler", Fake, "blind")
    add(registry, "scheduler", Fake, "clairvoyant", oracle=True)
    run = composed({**raw, "scheduler": "blind"}, registry)
    assert (seen["blind"].oracle, run.info["stamps"]) == (None, [])
    run = composed({**raw, "scheduler": "clairvoyant"}, registry)
    assert run.info["stamps"] == ["oracle: clairvoyant"]
    oracle = seen["clairvoyant"].oracle
    assert oracle is not None
    with pytest.raises(KeyError):
        oracle("r0")
    run.truths["r0"] = truth = object()  # type: ignore[assignment]
    assert oracle("r0") is truth


def test_each_plugin_has_its_own_chance(raw: dict[str, Any], registry: Registry) -> None:
    first = composed(raw, registry).workload.arrivals()
    again = composed(raw, registry).workload.arrivals()
    other = composed({**raw, "seed": 8}, registry).workload.arrivals()
    first_times = [item.time_ns for item in first]
    assert first_times == [item.time_ns for item in again]
    assert first_times != [item.time_ns for item in other]


def test_pool_too_small_for_one_request(raw: dict[str, Any], registry: Registry) -> None:
    raw["executor"] = {"name": "scripted", "num_kv_pages": 31}
    with pytest.raises(CapabilityError) as error:
        composed(raw, registry)
    assert error.value.why == "512 tokens need 32 pages of 16 tokens, the pool has 31"
    assert "num_kv_pages to at least 32" in error.value.do
    assert "max_model_len to at most 496" in error.value.do
    composed({**raw, "engine": {"max_model_len": 496}}, registry)
    raw["executor"] = {"name": "scripted", "num_kv_pages": 32}
    composed(raw, registry)


class TestDefaultBounds:
    def bounds(self, raw: dict[str, Any], registry: Registry) -> list[SLO | None]:
        items: Iterator[Arrival | Cancel] = iter(composed(raw, registry).workload.arrivals())
        return [item.spec.slo for item in items if isinstance(item, Arrival)]

    def test_none_stated(self, raw: dict[str, Any], registry: Registry) -> None:
        assert self.bounds(raw, registry) == [None] * 5

    def test_given_to_requests_that_state_none(self, raw: dict[str, Any], registry: Registry) -> None:
        raw["slo"] = {"ttft_ms": 0.5, "e2el_ms": 100}
        assert self.bounds(raw, registry) == [SLO(ttft_ns=500_000, e2el_ns=100_000_000)] * 5

    def test_a_requests_own_bounds_stay(self, raw: dict[str, Any], registry: Registry) -> None:
        raw["slo"] = {"ttft_ms": 1}
        raw["workload"] |= {"classes": [{"name": "fast", "tpot_ms": 2}]}
        assert self.bounds(raw, registry) == [SLO(tpot_ns=2_000_000)] * 5

    def by_class(self, raw: dict[str, Any], registry: Registry) -> dict[str, set[SLO | None]]:
        raw["workload"] |= {
            "num_requests": 60,
            "classes": [{"name": "a"}, {"name": "b"}, {"name": "c"}, {"name": "d", "e2el_ms": 9}],
        }
        found: dict[str, set[SLO | None]] = {}
        for item in composed(raw, registry).workload.arrivals():
            assert isinstance(item, Arrival)
            found.setdefault(item.spec.request_class, set()).add(item.spec.slo)
        return found

    def test_by_class(self, raw: dict[str, Any], registry: Registry) -> None:
        classes = {"a": {"tbt_ms": 3}, "b": {}, "d": {"ttft_ms": 4}}
        raw["slo"] = {"ttft_ms": 1, "tpot_ms": 2, "classes": classes}
        assert self.by_class(raw, registry) == {
            "a": {SLO(tbt_ns=3_000_000)},  # instead of the general ones, not beside them
            "b": {None},  # bounded by nothing
            "c": {SLO(ttft_ns=1_000_000, tpot_ns=2_000_000)},
            "d": {SLO(e2el_ns=9_000_000)},  # its own
        }

    def test_only_by_class(self, raw: dict[str, Any], registry: Registry) -> None:
        raw["slo"] = {"classes": {"a": {"tbt_ms": 3}}}
        found = self.by_class(raw, registry)
        assert (found["a"], found["b"], found["c"]) == ({SLO(tbt_ns=3_000_000)}, {None}, {None})


class TestBadFactories:
    def test_one_that_raises_is_named_and_chained(self, raw: dict[str, Any], registry: Registry) -> None:
        def boom(*args: object) -> None:
            raise ZeroDivisionError("oh")

        add(registry, "scheduler", boom)
        with pytest.raises(PluginError, match="scheduler 'fake' could not be built") as error:
            composed({**raw, "scheduler": "fake"}, registry)
        assert "ZeroDivisionError: oh" in error.value.why
        assert isinstance(error.value.__cause__, ZeroDivisionError)

    def test_its_own_error_passes_through(self, raw: dict[str, Any], registry: Registry) -> None:
        raw["scheduler"] = {"name": "vllm_v1", "max_num_seqs": 5000}
        with pytest.raises(ConfigError, match=r"scheduler\.max_num_seqs is 5000"):
            composed(raw, registry)

    @pytest.mark.parametrize(("kind", "method"), [("scheduler", "plan"), ("cost", "price"), ("task", "run")])
    def test_one_that_makes_something_else(
        self, raw: dict[str, Any], registry: Registry, kind: str, method: str
    ) -> None:
        add(registry, kind, lambda config, context: object())
        with pytest.raises(PluginError, match="is not a ") as error:
            composed({**raw, kind: "fake"}, registry)
        assert method in error.value.why

    def test_the_executor_is_closed(self, raw: dict[str, Any], registry: Registry) -> None:
        Closing.closed = []
        provides = frozenset({"executor.sim"})
        add(registry, "executor", Closing, provides=provides, requires=frozenset({"workload.truth"}))
        add(registry, "task", lambda config, context: object())
        with pytest.raises(PluginError):
            composed({**raw, "executor": "fake", "task": "fake"}, registry)
        assert Closing.closed == ["closed"]

    def test_layout_and_capacity_are_checked(self, raw: dict[str, Any], registry: Registry) -> None:
        class NoPools(Paged):
            def __init__(self, config: None, context: Context) -> None:
                super().__init__(PagedConfig(), context)

            def layout(self, model: object) -> KVLayout:
                return KVLayout(addressing="block_table", pools=())

        class TwoPools(Closing):
            closed: list[str] = []  # noqa: RUF012  (only this test's)

            def capacity(self, layout: KVLayout) -> Capacity:
                return Capacity(device_pages=(512, 512))

        add(registry, "kvcache", NoPools)
        with pytest.raises(PluginError, match="no usable layout"):
            composed({**raw, "kvcache": "fake"}, registry)
        add(registry, "executor", TwoPools, provides=frozenset({"executor.sim"}))
        with pytest.raises(PluginError, match="reports pages for 2 pools"):
            composed({**raw, "executor": "fake"}, registry)
        TwoPools.capacity = lambda self, layout: Capacity(device_pages=())  # type: ignore[method-assign]
        with pytest.raises(PluginError, match="reports pages for 0 pools"):
            composed({**raw, "executor": "fake"}, registry)

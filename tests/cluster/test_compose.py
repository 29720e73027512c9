"""Several instances from a configuration: what each gets, what is refused, what reports say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.runs import MODEL, PAGES, composed, served

from servelab.core.errors import CapabilityError, ConfigError
from servelab.core.families.router import ClusterView, Dispatch, Hold, Migrate
from servelab.core.layout import Capacity, KVLayout
from servelab.core.records import RequestArrived, RequestMigrated, RequestRouted, StepDone
from servelab.core.registry import Registry
from servelab.core.request import RequestSpec
from servelab.core.spec import PluginSpec
from servelab.core.testing.cluster import To
from servelab.core.testing.fakes import ToyExecutor, raises_in
from servelab.plugins.observers.report.text import render


class Large(ToyExecutor):
    """Holds the longest request of the model."""

    def capacity(self, layout: KVLayout) -> Capacity:
        return Capacity(device_pages=(PAGES,))


def test_each_instance_has_its_own_parts_and_generators() -> None:
    run = composed(
        cluster={"instances": 3}, router="round_robin", prefix="hash", workload={"with_prompt_ids": True}
    )
    engines = [one.engine for one in run.instances]
    assert [engine.index for engine in engines] == [0, 1, 2]
    assert len({id(engine.ledger.kvcache) for engine in engines}) == 3
    assert len({id(one.executor) for one in run.instances}) == 3 and len({id(e.reuse) for e in engines}) == 3
    assert run.engine is engines[0] and run.info["cluster"] == {"instances": 3}


def test_generators_differ_between_instances_and_the_first_keeps_its_own() -> None:
    drawn: dict[int, list[float]] = {}
    registry = Registry.load()

    def factory(config: Any, context: Any) -> Any:
        drawn.setdefault(context.instance, []).append(context.rng.random())
        return Large({})

    spec = PluginSpec(name="drawing", factory="toy:toy", provides=frozenset({"executor.sim"}))
    registry.add("executor", spec, provider="test", factory=factory)
    composed(registry, executor="drawing")
    composed(
        registry,
        executor="drawing",
        router="round_robin",
        cluster={"instances": 3},
    )
    assert drawn[0][0] == drawn[0][1] and len({drawn[0][0], *drawn[1], *drawn[2]}) == 3


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"cluster": {"instances": 2}}, "nobody says which of 2 instances a request goes to"),
        ({"cluster": {"max_instances": 2}}, "nobody says which of 2 instances a request goes to"),
        (
            {"router": "round_robin", "clock": {"name": "wall"}},
            "router 'round_robin' needs the virtual clock",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_four_parts(sections: dict[str, Any], what: str) -> None:
    error = raises_in(lambda: composed(**sections))
    assert isinstance(error, CapabilityError) and error.what == what
    assert error.where and error.why and error.do


def test_an_executor_that_does_real_work_has_one_instance() -> None:
    registry, closed = Registry.load(), []

    class Real(Large):
        simulated = False

        def close(self) -> None:
            closed.append(self)

    spec = PluginSpec(name="real", factory="toy:toy", provides=frozenset({"executor.sim"}))
    registry.add("executor", spec, provider="test", factory=lambda config, context: Real({}))
    error = raises_in(
        lambda: composed(registry, executor="real", router="round_robin", cluster={"instances": 2})
    )
    assert isinstance(error, CapabilityError) and error.what == "executor 'real' runs one instance, not 2"
    assert error.where == "cluster.instances" and error.why and "executor=sim" in error.do
    assert len(closed) == 1
    composed(registry, executor="real", router="round_robin")


@pytest.mark.parametrize(
    "wrong",
    [{"instances": 0}, {"instances": 3, "max_instances": 2}, {"report_interval_ms": -1}, {"nodes": 2}],
)
def test_settings_of_the_section_are_checked(wrong: dict[str, Any]) -> None:
    error = raises_in(lambda: composed(cluster=wrong))
    assert isinstance(error, ConfigError) and "cluster" in str(error)


def test_a_router_that_needs_what_the_core_does_not_do_is_refused() -> None:
    registry = Registry.load()
    spec = PluginSpec(name="lender", factory="toy:toy", provides=frozenset({"router.lends"}))
    registry.add("router", spec, provider="test", factory=lambda config, context: To(lambda r, view: 0))
    error = raises_in(lambda: composed(registry, router="lender"))
    assert isinstance(error, CapabilityError) and "router.lends" in str(error)


def test_a_router_is_told_what_an_instance_has_cached() -> None:
    """Of a common beginning of 128 tokens, once somebody has computed it; late reports do not say it."""
    found: list[tuple[int, int]] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        found.append((view.cached_tokens(0, request), view.cached_tokens(1, request)))
        return 0

    def run(**cluster: Any) -> None:
        registry = Registry.load()
        spec = PluginSpec(name="looks", factory="toy:toy")
        registry.add("router", spec, provider="test", factory=lambda config, context: To(look))
        one = composed(
            registry,
            router="looks",
            prefix="hash",
            cluster={"instances": 2, **cluster},
            workload={"num_requests": 12, "prefix_tokens": 128, "with_prompt_ids": True, "request_rate": 2},
        )
        one.task.run(one)

    run()
    assert found[0] == (0, 0) and found[-1] == (128, 0)
    assert "report_interval_ms" in str(raises_in(lambda: run(report_interval_ms=5)))


def test_figures_per_instance_add_up_to_the_runs(tmp_path: Path) -> None:
    """From the logs on disk: requests, tokens and steps of four instances, KV use of each."""
    _, records, result = served(
        tmp_path / "a",
        router="least_loaded",
        cluster={"instances": 4},
        observers=["jsonl", "report"],
        workload={"num_requests": 80, "request_rate": 40},
    )
    extra = result["servelab"]
    rows = extra["instances"]
    assert [row["instance"] for row in rows] == ["0", "1", "2", "3"]
    assert sum(row["requests"] for row in rows) == 80 and all(row["requests"] > 5 for row in rows)
    assert sum(row["output_tokens"] for row in rows) == result["total_output_tokens"]
    assert sum(row["steps"] for row in rows) == extra["batch"]["steps"]
    for row in rows:
        steps = [x for x in records if isinstance(x, StepDone) and x.engine == int(row["instance"])]
        fewest = min(x.free_pages[0] for x in steps)
        assert row["peak_kv_use"] == pytest.approx(1 - fewest / PAGES)
        assert 0 < row["mean_kv_use"] <= row["peak_kv_use"]
    text = "\n".join(render(result, (99.0,), None))
    assert "instances 4" in text and "in each of 4 instances" in text
    assert text.count("mean KV %") == 1
    assert "Instances: requests that ended there" in (tmp_path / "a" / "report.html").read_text()


def test_the_report_tells_what_a_router_did_later(tmp_path: Path) -> None:
    """Every tenth request is held, two are moved, one move is dropped: seen in results, text and page."""
    registry = Registry.load()
    spec = PluginSpec(name="busy", factory="toy:toy", provides=frozenset({"router.migrates"}))
    registry.add("router", spec, provider="test", factory=Busy)
    _, records, result = served(
        tmp_path / "a",
        registry=registry,
        router="busy",
        cluster={"instances": 3, "network_gb_per_s": 1, "report_interval_ms": 2},
        observers=["jsonl", "report"],
        workload={"num_requests": 40, "request_rate": 40},
    )
    extra = result["servelab"]
    moved = [x for x in records if isinstance(x, RequestMigrated)]
    did, rows = extra["router"], extra["instances"]
    assert (did["held_requests"], did["moves"], did["dropped_actions"]) == (4, 2, 1)
    assert did["moved_bytes"] == sum(x.bytes for x in moved) > 0
    assert did["mean_stop_ms"] == pytest.approx(sum(x.t_ns - x.stopped_ns for x in moved) / 2e6)
    arrived = {x.request: x.t_ns for x in records if isinstance(x, RequestArrived)}
    waits = [x.t_ns - arrived[x.request] for x in records if isinstance(x, RequestRouted)]
    assert len(waits) == 4 and 0 < did["mean_held_ms"] == pytest.approx(sum(waits) / 4e6)
    assert [row["dispatched"] for row in rows] == [40, 0, 0]
    assert [(row["moved_in"], row["moved_out"]) for row in rows] == [(0, 2), (1, 0), (1, 0)]
    assert [row["requests"] for row in rows] == [38, 1, 1]
    text, page = "\n".join(render(result, (99.0,), None)), (tmp_path / "a" / "report.html").read_text()
    assert "instances 3, of which the router knows what they report every 2 ms" in " ".join(text.split())
    for told in ("held 4 requests", "moved requests 2 times with", "1 of its actions were dropped"):
        assert told in " ".join(text.split()) and told in page, told
    assert "dispatched" in page and re.search(r"0 +40 +0 +2 +38", text)


class Busy:
    """To instance 0, every tenth later; at two ends of a step a request moves, another has gone."""

    def __init__(self, config: None, ctx: Any) -> None:
        self.asked, self.moved = 0, 0

    def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
        self.asked += moment == "arrival"
        if moment == "arrival" and self.asked % 10 == 0:
            return Hold(view.now_ns + 10_000_000)
        return Dispatch(prefill=0)

    def rebalance(self, view: ClusterView) -> list[Any]:
        running = [name for name, context, output, _ in view.row(0).candidates if output > 1]
        if self.moved > 1 or not running:
            return []
        self.moved += 1
        gone = [Migrate(request="nobody", source=0, target=1)] if self.moved == 1 else []
        return [Migrate(request=running[0], source=0, target=self.moved, mode="blocking"), *gone]


def test_one_instance_has_no_table_of_instances(tmp_path: Path) -> None:
    _, _, result = served(tmp_path / "a")
    assert [row["instance"] for row in result["servelab"]["instances"]] == ["0"]
    assert "mean KV %" not in "\n".join(render(result, (99.0,), None))


def test_an_idle_instance_is_listed(tmp_path: Path) -> None:
    _, _, result = served(
        tmp_path / "a", router="least_loaded", cluster={"instances": 2}, workload={"num_requests": 1}
    )
    idle = result["servelab"]["instances"][1]
    assert (idle["requests"], idle["steps"], idle["mean_kv_use"]) == (0, 0, None)


def test_the_shape_of_the_model_is_one(tmp_path: Path) -> None:
    run, *_ = served(tmp_path / "a", router="round_robin", cluster={"instances": 2})
    assert {one.engine.model.name for one in run.instances} == {MODEL["name"]}

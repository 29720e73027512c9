"""Several instances from a configuration: what each gets, what is refused, what reports say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cluster.runs import MODEL, PAGES, composed, served

from servelab.core.errors import CapabilityError, ConfigError
from servelab.core.families.router import ClusterView
from servelab.core.layout import Capacity, KVLayout
from servelab.core.records import StepDone
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

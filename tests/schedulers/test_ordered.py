"""Ordering wrappers: who is admitted next, by hand; predictions; victims; the inner scheduler's own ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.draws import seeds
from tests.schedulers.test_composed import Keep

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.errors import CapabilityError, ConfigError
from servelab.core.records import (
    Planned,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    StepDone,
)
from servelab.core.registry import Registry
from servelab.core.request import SLO, Arrival
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import ListWorkload, arrival

WRAPPERS = ("fcfs", "priority", "edf", "sjf", "sjf_oracle")
ONE_SERVER = {"name": "vllm_v1", "max_num_seqs": 1}
STEP = 1000


def job(name: str, output: int, *, at: int = 0, prompt: int = 4, cap: int = 64, **fields: Any) -> Arrival:
    made = arrival(name, prompt, output, at=at, cap=cap)
    return replace(made, spec=replace(made.spec, **fields))


def serve(scheduler: Any, arrivals: Sequence[Arrival], pages: int = 64, **engine: Any) -> Keep:
    """A run in which every step takes 1000 ns, whatever runs in it."""
    registry = Registry.load()
    keep = Keep()
    registry.add(
        "workload",
        PluginSpec(name="given", factory="t:Given", provides=frozenset({"workload.truth"})),
        factory=lambda config, context: ListWorkload(arrivals),
    )
    registry.add("observer", PluginSpec(name="keep", factory="t:Keep"), factory=lambda config, context: keep)
    raw = {
        "scheduler": scheduler,
        "kvcache": {"name": "paged", "page_tokens": 4},
        "cost": {"name": "scripted", "script_ns": [STEP]},
        "workload": "given",
        "executor": {"name": "scripted", "num_kv_pages": pages},
        "task": "bench",
        "observers": ["keep"],
        "engine": {"checks": "full", "max_model_len": min(128, 4 * pages), **engine},
        "model": {
            "name": "toy",
            "layers": 1,
            "hidden": 8,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 8,
            "ffn": 8,
            "vocab": 8,
            "max_position": 128,
        },
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    return keep


def admitted(keep: Keep) -> list[str]:
    return [r.request for r in keep.of(RequestAdmitted) if not r.resumed]


def over(name: str, inner: Any = ONE_SERVER, **more: Any) -> dict[str, Any]:
    return {"name": name, "inner": inner, **more}


def test_shortest_true_output_first() -> None:
    jobs = [job("a", 9), job("b", 2), job("c", 5), job("d", 2)]
    assert admitted(serve(over("sjf_oracle"), jobs)) == ["b", "d", "c", "a"]


def test_a_prompt_can_weigh_too() -> None:
    """a: 40 prompt and 2 output tokens; b: 4 and 9. With w = 1 they are 42 and 13."""
    jobs = [job("first", 1), job("a", 2, prompt=40), job("b", 9)]
    assert admitted(serve(over("sjf_oracle"), jobs)) == ["first", "a", "b"]
    assert admitted(serve(over("sjf_oracle", prompt_weight=1.0), jobs))[1:] == ["b", "a"]


def test_a_cap_cuts_the_job_that_is_ordered_by() -> None:
    jobs = [job("first", 1), job("a", 30, cap=3), job("b", 5)]
    assert admitted(serve(over("sjf_oracle"), jobs)) == ["first", "a", "b"]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=5))
def test_no_order_of_one_queue_waits_less_than_the_oracle(outputs: list[int]) -> None:
    """On one server, by trying every order (Smith 1956)."""
    jobs = [job(f"r{i}", n) for i, n in enumerate(outputs)]
    keep = serve(over("sjf_oracle"), jobs)
    ours = fmean(r.t_ns for r in keep.of(RequestAdmitted))

    def wait(order: Iterable[int]) -> float:
        starts = list(itertools.accumulate((outputs[i] * STEP for i in order), initial=0))[:-1]
        return fmean(starts)

    assert ours == min(map(wait, itertools.permutations(range(len(outputs)))))


def test_predictions_are_means_of_what_completed_in_the_group() -> None:
    """Prompts of 4 to 7 tokens are one group, of 8 to 15 another. The first three have completed when the
    others, on one server, are chosen among: group 4 predicts (10 + 2) / 2 = 6, group 8 predicts 4."""
    late = 20 * STEP
    jobs = [
        job("a", 10),
        job("b", 2, at=1),
        job("c", 4, prompt=8, at=2),
        job("busy", 1, at=15 * STEP, prompt=16, cap=60),
        job("blocker", 30, at=16 * STEP + 1, prompt=16, cap=60),
        job("small_group", 1, at=late, prompt=5),
        job("large_group", 1, at=late + 1, prompt=9),
        job("no_past", 1, at=late + 2, prompt=40, cap=5),
    ]
    order = admitted(serve(over("sjf"), jobs))
    assert order[:5] == ["a", "b", "c", "busy", "blocker"]
    assert order[-3:] == ["large_group", "no_past", "small_group"]  # 4, its cap of 5, 6


def test_a_window_forgets() -> None:
    """Both groups have seen outputs of 9 and 1: with a window of one, what counts is the last."""
    past = [
        job("a", 9),
        job("b", 1, at=12 * STEP),
        job("c", 1, at=15 * STEP, prompt=8),
        job("d", 9, at=18 * STEP, prompt=8),
    ]
    then = [
        job("blocker", 6, at=40 * STEP, prompt=16),
        job("long", 1, at=41 * STEP, prompt=8),
        job("short", 1, at=41 * STEP + 1),
    ]
    assert admitted(serve(over("sjf", window=1), [*past, *then]))[-2:] == ["short", "long"]
    assert admitted(serve(over("sjf"), [*past, *then]))[-2:] == ["long", "short"]  # 5 and 5: as they came


def test_classes_are_predicted_apart() -> None:
    past = [job("a", 9), job("b", 2, at=12 * STEP, request_class="offline")]
    then = [
        job("blocker", 6, at=40 * STEP, prompt=16),
        job("online", 1, at=41 * STEP),
        job("offline", 1, at=41 * STEP + 1, request_class="offline"),
    ]
    assert admitted(serve(over("sjf"), [*past, *then]))[-2:] == ["offline", "online"]


def test_the_more_important_first_then_in_order() -> None:
    jobs = [job("a", 3), job("b", 3, priority=1), job("c", 3, priority=5), job("d", 3, priority=1, at=1)]
    assert admitted(serve(over("priority"), jobs)) == ["c", "b", "d", "a"]


def test_the_least_important_is_preempted() -> None:
    """Eight pages of four tokens; three requests of 4 + 12 tokens need twelve. The oldest is the least
    important: vllm_v1 alone would preempt the youngest."""
    jobs = [job("low", 12), job("mid", 12, priority=1), job("high", 12, priority=2)]
    inner = {"name": "vllm_v1", "max_num_seqs": 8}
    victims = [r.request for r in serve(over("priority", inner), jobs, pages=8).of(RequestPreempted)]
    assert victims[0] == "low"
    assert "high" not in victims
    alone = [r.request for r in serve(inner, jobs, pages=8).of(RequestPreempted)]
    assert alone[0] == "high"


def test_the_earliest_deadline_first() -> None:
    """Bounds on the end; no bound: last. Both late jobs are met, which neither other order gives."""
    ms = 1_000_000
    jobs = [
        job("free", 3),
        job("loose", 3, slo=SLO(e2el_ns=9 * ms)),
        job("tight", 3, slo=SLO(e2el_ns=1 * ms)),
        job("first_token", 3, slo=SLO(ttft_ns=2 * ms)),
    ]
    assert admitted(serve(over("edf"), jobs)) == ["tight", "first_token", "loose", "free"]
    assert admitted(serve(over("edf", bound="e2el"), jobs)) == ["tight", "loose", "free", "first_token"]
    assert admitted(serve(over("edf", bound="ttft"), jobs)) == ["first_token", "free", "loose", "tight"]


def test_the_earlier_of_two_bounds_counts_until_the_first_token() -> None:
    both = SLO(ttft_ns=10, e2el_ns=10**9)
    jobs = [job("blocker", 1), job("end", 3, slo=SLO(e2el_ns=20)), job("both", 3, slo=both)]
    assert admitted(serve(over("edf"), jobs))[0] == "both"


def test_two_deadlines_that_one_order_meets() -> None:
    jobs = [job("later", 5, slo=SLO(e2el_ns=12 * STEP)), job("sooner", 5, slo=SLO(e2el_ns=6 * STEP))]
    ends = {r.request: r.t_ns for r in serve(over("edf"), jobs).of(RequestFinished)}
    assert ends == {"sooner": 5 * STEP, "later": 10 * STEP}


def test_a_second_turn_goes_before_a_later_programs_first() -> None:
    """q keeps the server busy, so that a later program's first turn and p's second wait together."""
    jobs = [
        job("p0", 2, program="p", is_last_turn=False),
        job("q0", 6, at=1, program="q"),
        job("r0", 2, at=3 * STEP, program="r"),
        job("p1", 2, at=3 * STEP + 1, program="p", turn=1),
    ]
    assert admitted(serve(over("fcfs", by="program"), jobs)) == ["p0", "q0", "p1", "r0"]
    assert admitted(serve(over("fcfs"), jobs)) == ["p0", "q0", "r0", "p1"]


def trace(seed: int, n: int = 60) -> list[Arrival]:
    rng, at, made = Random(seed), 0, []
    for i in range(n):
        at += rng.randrange(3 * STEP)
        made.append(job(f"r{i}", rng.randint(1, 20), at=at, prompt=rng.randint(1, 20), cap=24))
    return made


@pytest.mark.parametrize("inner", ["vllm_v1", "aggressive", "conservative"])
@pytest.mark.parametrize("seed", seeds(3))
def test_in_order_of_arrival_it_is_the_inner_scheduler(inner: str, seed: int) -> None:
    """All of these admit in order and preempt the youngest: plan for plan the same, under evictions too."""
    jobs = trace(seed)
    plain, ordered = serve(inner, jobs, pages=20), serve(over("fcfs", inner), jobs, pages=20)
    assert plain.of(Planned) == ordered.of(Planned)
    assert plain.of(StepDone) == ordered.of(StepDone)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("seed", seeds(3))
def test_nobody_overtakes_a_smaller_key(name: str, seed: int) -> None:
    """On one server, whoever starts had the least key among those that were waiting."""
    rng = Random(seed)
    jobs = [
        replace(
            one,
            spec=replace(one.spec, priority=rng.randrange(3), slo=SLO(e2el_ns=rng.randrange(1, 10**6))),
        )
        for one in trace(seed)
    ]
    keep = serve(over(name), jobs)
    given = {one.spec.id: one for one in jobs}
    past: list[int] = []
    waiting: dict[str, Arrival] = {}

    def key(request: str) -> Any:
        one = given[request]
        at, cap = one.time_ns, one.spec.max_new_tokens
        assert one.truth is not None and one.spec.slo is not None
        return {
            "fcfs": at,
            "priority": (-one.spec.priority, at),
            "edf": (at + (one.spec.slo.e2el_ns or 0), at),
            "sjf_oracle": (min(one.truth.output_tokens, cap), at),
            "sjf": None,
        }[name]

    seen = 0
    for record in keep.records:
        if isinstance(record, RequestArrived):
            waiting[record.request] = given[record.request]
        elif isinstance(record, RequestAdmitted):
            if name != "sjf" and len(waiting) > 1:
                seen += 1
                assert key(record.request) == min(map(key, waiting))
            del waiting[record.request]
        elif isinstance(record, RequestFinished):
            past.append(record.output_tokens)
    assert len(past) == len(jobs)
    assert name == "sjf" or seen > 10


def test_wrappers_wrap_wrappers() -> None:
    """The inner one sorts last, so its order stands."""
    jobs = [job("a", 9, priority=5), job("b", 2), job("c", 5)]
    assert admitted(serve(over("priority", over("sjf_oracle")), jobs)) == ["b", "c", "a"]


def test_what_the_inner_scheduler_cannot_do_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"'pastfuture' does not provide 'scheduler.ahead'"):
        serve(over("sjf", "pastfuture"), [job("a", 1)], max_in_flight=2)
    serve(over("sjf", "vllm_v1"), [job("a", 1)], max_in_flight=2)
    with pytest.raises(ConfigError, match=r"scheduler\.inner\.name: unknown scheduler 'nope'"):
        serve(over("sjf", "nope"), [job("a", 1)])


def test_the_oracle_says_when_there_is_no_truth() -> None:
    without = replace(job("b", 3), truth=None)
    with pytest.raises(Exception, match=r"request b has no true output length|gave no true output length"):
        serve(over("sjf_oracle"), [job("a", 3), without])

"""The composer that all four share: order, victims, intervals, holds. Random traces, then small examples."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.draws import seeds
from tests.schedulers.runs import POLICIES, Watched, build, serve, trace

from servelab.core.errors import ConfigError
from servelab.core.facts import Limits
from servelab.core.plan import StepPlan
from servelab.core.records import Planned, RequestAdmitted, RequestFinished, StepDone
from servelab.core.testing.fakes import (
    Rig,
    ToyKV,
    arrival,
    make_engine,
    raises_in,
    step_by_step,
    toy_layout,
    toy_limits,
)

LIMITS = toy_limits(tokens=48, requests=8, model_len=100)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("page_tokens", [1, 16])
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 20), interval=st.integers(1, 7), budget=st.sampled_from([8, 20, 48]))
def test_random_traces(
    name: str, page_tokens: int, mixed: bool, seed: int, interval: int, budget: int
) -> None:
    """``Watched`` checks every plan; (d) the oracle and conservative never evict."""
    rng = Random(seed)
    served = serve(
        name,
        trace(rng, 25),
        pages=rng.randint(100, 160) // page_tokens + 1,
        page_tokens=page_tokens,
        limits=LIMITS,
        admission_interval=interval,
        max_num_batched_tokens=budget,
        mixed=mixed,
        max_new_per_pass=rng.choice([None, None, 1, 2]),
    )
    if name in ("conservative", "pf_oracle"):
        assert served.evictions == 0


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", seeds(6))
def test_holds_change_nothing(name: str, mixed: bool, seed: int) -> None:
    items = trace(Random(seed), 40)
    common: dict[str, Any] = {"pages": 10, "page_tokens": 16, "limits": LIMITS, "mixed": mixed}
    common["admission_interval"] = 3 + seed % 6
    one = serve(name, items, hold_steps=1, **common)
    for steps in (2, 4096):
        held = serve(name, items, hold_steps=steps, **common)
        assert step_by_step(held.records) == step_by_step(one.records)
        assert held.decisions() == one.decisions()
    assert any(len(p) and deferred for *p, deferred in one.decisions()), "hard enough to defer"


@pytest.mark.parametrize("name", POLICIES)
def test_same_seed_same_plans(name: str) -> None:
    items = trace(Random(3), 40)
    first, again = (serve(name, items, pages=130, limits=LIMITS, seed=7) for _ in "ab")
    assert first.records == again.records


def test_another_seed_draws_other_lengths() -> None:
    items = trace(Random(3), 60)
    one, two = (
        serve("pastfuture", items, pages=130, limits=LIMITS, seed=s, window=8).decisions() for s in (1, 2)
    )
    assert one != two


# -------------------------------------------------------------------- small examples


def rig_of(
    name: str, limits: Limits, pages: int, *, page_tokens: int = 1, hold_steps: int = 1, **settings: Any
) -> Rig:
    watched = Watched(build(name, limits, {}, hold_steps=hold_steps, **settings))
    return Rig(make_engine(watched, kvcache=ToyKV(toy_layout(page_tokens)), pages=pages, limits=limits))


def ran(rig: Rig) -> dict[str, int]:
    batch = rig.batches[-1]
    return {r.id: n for r, n in zip(batch.requests, batch.tokens, strict=True)}


def rounds(rig: Rig, n: int) -> list[dict[str, int]]:
    """What runs now and after each of ``n`` more steps."""
    out = [ran(rig)]
    for _ in range(n):
        rig.finish()
        out.append(ran(rig))
    return out


def test_prompts_run_alone_then_everybody_decodes() -> None:
    rig = rig_of("aggressive", toy_limits(), 200, admission_interval=2)
    rig.arrive("a", 5, 20)
    rig.arrive("b", 6, 20)
    both = {"a": 1, "b": 1}
    assert rounds(rig, 5) == [{"a": 5}, {"a": 1}, {"a": 1}, {"b": 6}, both, both]


def test_mixed_runs_decodes_first_and_prompts_with_them() -> None:
    rig = rig_of("aggressive", toy_limits(), 200, admission_interval=2, mixed=True)
    rig.arrive("a", 5, 20)
    rig.arrive("b", 6, 20)
    rig.arrive("c", 7, 20)
    steps = rounds(rig, 3)
    assert steps == [{"a": 5}, {"a": 1}, {"a": 1}, {"a": 1, "b": 6, "c": 7}]
    assert list(steps[-1]) == ["a", "b", "c"]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_passes_are_an_interval_of_decode_steps_apart(interval: int, mixed: bool) -> None:
    rig = rig_of(
        "aggressive", toy_limits(), 200, admission_interval=interval, max_new_per_pass=1, mixed=mixed
    )
    for id in "abc":
        rig.arrive(id, 3, 99)
    steps = rounds(rig, 3 * interval + 4)
    prompts = [k for k, step in enumerate(steps) if 3 in step.values()]
    apart = interval + (not mixed)  # a step of prompts alone is no decode step
    assert prompts == [0, interval + 1, interval + 1 + apart]


def test_a_failed_pass_is_repeated_an_interval_later() -> None:
    rig = rig_of("conservative", toy_limits(model_len=60), 60, admission_interval=4)
    rig.arrive("a", 10, 99, cap=40)
    rig.arrive("b", 10, 99, cap=40)
    for _ in range(13):
        rig.finish()
    asked = [p.step for p in rig.records if getattr(p, "deferred", None)]
    assert asked == [5, 9, 13]


def test_an_eviction_begins_the_interval_anew() -> None:
    rig = rig_of("aggressive", toy_limits(model_len=20), 20, admission_interval=5, watermark=1.0)
    rig.arrive("a", 4, 99)
    rig.arrive("b", 4, 99)
    rig.drain()
    plans = [r for r in rig.records if isinstance(r, Planned)]
    evicted = next(p.step for p in plans if p.preempted)
    asked = [p.step for p in plans if p.step > evicted and p.deferred]
    assert (evicted - 7) % 5, "not when a pass was due"
    assert asked[0] == evicted + 5


def test_an_empty_batch_is_filled_at_once() -> None:
    rig = rig_of("aggressive", toy_limits(), 200, admission_interval=50)
    rig.arrive("a", 5, 2)
    rig.arrive("b", 6, 9)
    assert rounds(rig, 2) == [{"a": 5}, {"a": 1}, {"b": 6}]


def test_no_more_per_pass_than_allowed() -> None:
    limits = toy_limits()
    items = trace(Random(0), 30, gap=1)
    for most in (1, 2):
        new = serve("aggressive", items, pages=300, limits=limits, max_new_per_pass=most).decisions()
        assert max(sum(n > 1 for _, n in work) for _, _, work, _, _ in new) <= most


def test_the_prompts_of_a_pass_fit_the_token_budget() -> None:
    rig = rig_of("aggressive", toy_limits(tokens=20), 200, admission_interval=1)
    rig.arrive("z", 1, 2)
    for id, prompt in (("a", 9), ("b", 9), ("c", 9)):
        rig.arrive(id, prompt, 99)
    rig.finish()
    rig.finish()
    assert ran(rig) == {"a": 9, "b": 9}
    assert rig.records[-1].deferred == [("c", "prompt of 9 tokens, 2 left in this pass")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_prompt_longer_than_the_budget_runs_alone_in_chunks(mixed: bool) -> None:
    rig = rig_of("aggressive", toy_limits(tokens=10, requests=4), 200, admission_interval=1, mixed=mixed)
    rig.arrive("a", 4, 99)
    rig.arrive("long", 25, 99)
    rig.arrive("b", 3, 99)
    steps = rounds(rig, 6)
    decodes = {"a": 1, "long": 1}
    expected = [{"a": 4}, {"a": 1}, {"long": 10}, {"long": 10}, {"long": 5}, decodes]
    assert steps == [*expected, {**decodes, "b": 3} if mixed else {"b": 3}]


def test_the_newest_is_dropped_until_the_rest_fits() -> None:
    """Three requests of two pages each in six pages; all need another page at once."""
    rig = rig_of("aggressive", toy_limits(), 6, page_tokens=4, watermark=1.0, admission_interval=2)
    rig.arrive("z", 1, 2)
    for id in "abc":
        rig.arrive(id, 8, 30)
    rig.finish()
    rig.finish()
    assert ran(rig) == {"a": 8, "b": 8, "c": 8}
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1}
    assert list(rig.engine.waiting) == ["c"]
    for _ in range(4):
        rig.finish()
    assert ran(rig) == {"a": 1}
    assert list(rig.engine.waiting) == ["b", "c"], "the older of two victims stands in front"
    assert rig.request("b").generated == 5
    rig.engine.check_integrity()


def test_nobody_takes_the_place_of_a_victim_in_the_same_step() -> None:
    """Twelve pages of one token; b is evicted, and c would fit where it was."""
    rig = rig_of(
        "conservative", toy_limits(model_len=12), 12, overcommit=3.0, admission_interval=1, mixed=True
    )
    for id, prompt in (("a", 4), ("b", 4), ("c", 3)):
        rig.arrive(id, prompt, 99)
    while not rig.request("b").preemptions:
        rig.finish()
    assert ran(rig) == {"a": 1}
    assert list(rig.engine.waiting) == ["b", "c"]


def test_a_refused_head_takes_no_pages_from_the_decodes() -> None:
    """Three pages are free: the candidate would fit in them, and the decode needs one."""
    rig = rig_of("conservative", toy_limits(model_len=24), 6, page_tokens=4, admission_interval=1)
    rig.arrive("a", 11, 12, cap=12)
    rig.arrive("b", 12, 12, cap=12)
    rig.finish()
    rig.finish()
    assert ran(rig) == {"a": 1}
    assert rig.records[-1].deferred == [("b", "worst case 48 of 24.0 KV tokens")]  # type: ignore[attr-defined]
    assert not rig.request("a").preemptions
    rig.drain()
    assert [end.preemptions for end in rig.ends()] == [0, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_alone_on_the_device_the_head_is_admitted_whatever_its_peak(name: str) -> None:
    """Each of them could take the whole pool, which no bound allows."""
    items = [arrival(f"r{k}", 60, 4, cap=4) for k in range(3)]
    served = serve(name, items, pages=64, limits=toy_limits(model_len=64))
    assert served.evictions == 0


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("settings", "what", "why"),
    [
        (
            {"max_num_batched_tokens": 65},
            "scheduler.max_num_batched_tokens is 65",
            "the engine accepts 64 per launch",
        ),
        ({"max_num_seqs": 17}, "scheduler.max_num_seqs is 17", "the engine accepts 16 per launch"),
        (
            {"max_num_seqs": 9, "max_num_batched_tokens": 8},
            "scheduler.max_num_seqs is 9",
            "a decode step runs one token of every running request, and max_num_batched_tokens is 8",
        ),
    ],
)
def test_settings_the_device_cannot_take_are_refused(
    name: str, settings: dict[str, int], what: str, why: str
) -> None:
    error = raises_in(lambda: build(name, toy_limits(), {}, **settings))
    assert type(error) is ConfigError
    assert (error.what, error.why) == (what, why)
    assert error.where == f"scheduler {name!r}" and error.do


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pastfuture", {"window": 0}),
        ("pastfuture", {"reserve": 1.0}),
        ("pastfuture", {"reserve": -0.1}),
        ("pastfuture", {"scenarios": 0}),
        ("pastfuture", {"scenario_budget": -1}),
        ("pastfuture", {"initial_length": 0}),
        ("aggressive", {"watermark": 0}),
        ("aggressive", {"watermark": 1.01}),
        ("aggressive", {"window": 3}),
        ("conservative", {"overcommit": 0}),
        ("pf_oracle", {"reserve": 0.1}),
        ("pf_oracle", {"admission_interval": 0}),
        ("aggressive", {"max_new_per_pass": 0}),
    ],
)
def test_settings_out_of_bounds_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        build(name, toy_limits(), {}, **settings)


# ------------------------------------------------------------ ends of late requests


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("gap_ns", [150, 900])
def test_late_requests_are_ended_and_no_others(name: str, gap_ns: int) -> None:
    """Rejected: waited longer than the limit and never ran. Aborted: no token for longer than the limit."""
    items, queue_ns = trace(Random(0), 80, gap=900), 6_000
    limits = toy_limits(tokens=60, requests=32, model_len=100)
    late = {"queue_limit_ms": queue_ns / 1e6, "gap_limit_ms": gap_ns / 1e6}
    served = serve(name, items, pages=150, limits=limits, complete=False, **late)
    arrived = {item.spec.id: item.time_ns for item in items}
    admitted: dict[str, int] = {}
    last: dict[str, int] = {}
    ends: dict[str, int] = {}
    for record in served.records:
        if isinstance(record, RequestAdmitted):
            admitted.setdefault(record.request, record.t_ns)
        elif isinstance(record, StepDone):
            emitting = zip(record.requests, record.emitted, strict=True)
            last |= {name: record.t_ns for name, emitted in emitting if emitted}
        elif isinstance(record, RequestFinished):
            ends[record.outcome] = ends.get(record.outcome, 0) + 1
            if record.outcome == "rejected":
                assert record.request not in admitted
                assert record.t_ns - arrived[record.request] > queue_ns and "waited" in record.reason
            elif record.outcome == "aborted":
                assert record.t_ns - last.get(record.request, arrived[record.request]) > gap_ns
    assert ends["completed"] > 5 and (ends.get("rejected", 0) > 5 or gap_ns == 150)
    assert all(at - arrived[name] <= queue_ns for name, at in admitted.items())
    assert ends.get("aborted", 0) > 0 or (name != "aggressive" and gap_ns == 900)  # evicted, or held up


def test_who_is_ended_by_hand() -> None:
    """At 20 ms, with limits of 8 ms in the queue and 5 ms between tokens."""

    def one(id: str, arrived: int, last: int | None, admitted: int | None) -> Any:
        ns = 1_000_000
        return SimpleNamespace(
            id=id,
            arrival_ns=arrived * ns,
            last_token_ns=None if last is None else last * ns,
            admitted_ns=None if admitted is None else admitted * ns,
        )

    view = SimpleNamespace(
        now_ns=20_000_000,
        waiting=[
            one("waits", 12, None, None),
            one("late", 11, None, None),
            one("dropped before its first token", 11, None, 12),
            one("evicted", 0, 14, 1),
            one("evicted lately", 0, 15, 1),
        ],
        running=[one("decodes", 0, 19, 1), one("stalled", 0, 14, 1), one("computes its prompt", 0, None, 1)],
    )
    given_back: list[str] = []
    pages = SimpleNamespace(give_back=lambda request: given_back.append(request.id))
    scheduler = build("aggressive", toy_limits(), queue_limit_ms=8, gap_limit_ms=5)
    plan = StepPlan()
    left = scheduler._give_up(view, plan, pages)
    assert [request.id for request in left] == ["decodes", "computes its prompt"]
    assert [(v.request.id, v.reason) for v in plan.rejections] == [("late", "waited 9 ms")]
    assert [v.request.id for v in plan.aborts] == ["dropped before its first token", "evicted", "stalled"]
    assert given_back == ["stalled"]


def test_without_limits_nobody_is_ended() -> None:
    items = trace(Random(0), 80, gap=900)
    served = serve("aggressive", items, pages=150, limits=toy_limits(tokens=60, requests=32, model_len=100))
    assert {record.outcome for record in served.of(RequestFinished)} == {"completed"}

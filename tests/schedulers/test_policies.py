"""What each of the four admits; card (b), (c), (d)."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.draws import seeds
from tests.schedulers.runs import POLICIES, build, serve, trace

from servelab.core.errors import ConfigError, WorkloadError
from servelab.core.facts import Limits
from servelab.core.records import Planned, RequestFinished
from servelab.core.request import Arrival, Truth
from servelab.core.testing.fakes import (
    Rig,
    ToyKV,
    arrival,
    make_engine,
    raises_in,
    toy_layout,
    toy_limits,
)
from servelab.plugins.schedulers._lightllm import Judge, Room

WIDE = toy_limits(tokens=4096, requests=64, model_len=400)
WHOLE_PAST = {"window": 200_000, "reserve": 0.0}
"""Its W/2 entries are so many that interpolation beyond them would take a draw of chance 1e-5."""


def first_pass(name: str, items: list[Arrival], *, pages: int, limits: Limits = WIDE, **more: Any) -> int:
    """How many of the requests that all stand there at the start are admitted together."""
    return len(serve(name, items, pages=pages, limits=limits, **more).of(Planned)[0].work)


def queue(*lengths: tuple[int, int], cap: int = 100) -> list[Arrival]:
    """Requests of (prompt, output) that arrive together."""
    return [arrival(f"r{k}", p, o, cap=cap) for k, (p, o) in enumerate(lengths)]


# ---------------------------------------------------------------- the two simple rules


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(400, 600))
@settings(max_examples=50)
def test_aggressive_fills_up_to_the_watermark(prompts: list[int], pages: int) -> None:
    admitted = first_pass("aggressive", queue(*((p, 2) for p in prompts)), pages=pages, watermark=0.25)
    sums = [sum(prompts[: k + 1]) for k in range(len(prompts))]
    assert admitted == max(1, sum(total <= 0.25 * pages for total in sums))


def test_aggressive_starts_nobody_when_exactly_as_much_is_used() -> None:
    items = queue((50, 2), (1, 2))
    assert first_pass("aggressive", items, pages=100, watermark=1.0, start_below=0.5) == 1
    assert first_pass("aggressive", items, pages=101, watermark=1.0, start_below=0.5) == 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(64, 300))
@settings(max_examples=50)
def test_aggressive_starts_nobody_beyond_what_the_server_keeps(prompts: list[int], pages: int) -> None:
    """The artifact's server: used < 0.5 of the memory before, and no more than all of it after."""
    admitted = first_pass(
        "aggressive", queue(*((p, 2) for p in prompts)), pages=pages, watermark=1.0, start_below=0.5
    )
    expected = used = 0
    while expected < len(prompts) and used < 0.5 * pages and used + prompts[expected] <= pages:
        used += prompts[expected]
        expected += 1
    assert admitted == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.sampled_from([0.5, 1.0, 1.5]))
@settings(max_examples=50)
def test_conservative_promises_up_to_the_overcommit(prompts: list[int], overcommit: float) -> None:
    items = queue(*((p, 2) for p in prompts), cap=80)
    admitted = first_pass("conservative", items, pages=500, overcommit=overcommit)
    sums = [sum(p + 80 for p in prompts[: k + 1]) for k in range(len(prompts))]
    assert admitted == max(1, sum(total <= overcommit * 500 for total in sums))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 120))
@settings(max_examples=50)
def test_conservative_can_assume_one_output_for_all(prompts: list[int], assumed: int) -> None:
    """Whatever the requests' own caps are, also where these are lower or higher."""
    admitted = first_pass(
        "conservative", queue(*((p, 2) for p in prompts), cap=80), pages=500, assumed_output_tokens=assumed
    )
    sums = [sum(p + assumed for p in prompts[: k + 1]) for k in range(len(prompts))]
    assert admitted == max(1, sum(total <= 500 for total in sums))


@pytest.mark.parametrize("name", ["aggressive", "conservative"])
def test_whole_pages_count(name: str) -> None:
    """17 tokens take two pages of 16, so six of them fit in 12 pages, not seven."""
    items = [arrival(f"r{k}", 16 if name == "conservative" else 17, 1, cap=1) for k in range(7)]
    limits = toy_limits(tokens=400, model_len=100)
    rule = {"watermark": 1.0} if name == "aggressive" else {}
    assert first_pass(name, items, pages=12, page_tokens=16, limits=limits, **rule) == 6


def judge(scheduler: Any, running: list[Any], capacity: int, used: int = 0) -> Judge:
    room = Room(capacity=capacity, used=used, kept=0, page_tokens=1)
    judge: Judge = scheduler.admission(running, room)
    return judge


def request(prompt: int, produced: int = 0, cap: int = 100, forks: int = 0) -> Any:
    return SimpleNamespace(
        id="x", prompt_tokens=prompt, generated_tokens=produced, max_new_tokens=cap, forks=forks
    )


def test_an_evicted_request_wants_room_for_its_output_too() -> None:
    """Under aggressive; conservative had promised it already."""
    for produced, fits in ((0, True), (20, True), (21, False)):
        ask = judge(build("aggressive", WIDE, watermark=0.9), [], 100, used=60)
        assert (ask(request(10, produced)) is None) == fits
        ask = judge(build("conservative", WIDE), [], 110)
        assert ask(request(10, produced)) is None


def test_every_sample_of_a_prompt_wants_room() -> None:
    """Worst case of 110 tokens each: two of four fit in 230, a prompt with three further samples does not."""
    ask = judge(build("conservative", WIDE), [], 230)
    assert ask(request(10)) is None and ask(request(10)) is None
    assert judge(build("conservative", WIDE), [], 230)(request(10, forks=1)) is None
    assert (
        judge(build("conservative", WIDE), [], 230)(request(10, forks=3))
        == "worst case 440 of 230.0 KV tokens"
    )
    assert judge(build("conservative", WIDE), [request(10, forks=1)], 230)(request(10)) is not None
    peaks = []
    for forks in (0, 1, 2):
        scheduler = build("pastfuture", WIDE, window=10, initial_length=20, reserve=0.0)
        reason = judge(scheduler, [], 1)(request(10, forks=forks))
        assert reason is not None
        peaks.append(int(reason.split()[2]))
    assert peaks == [30, 60, 90]


def test_an_evicted_request_is_drawn_on_what_it_has_produced() -> None:
    """History says 20; having produced 30 of at most 40 it is drawn between these, not below."""
    for seed in range(50):
        scheduler = build("pastfuture", WIDE, rng=Random(seed), window=10, initial_length=20, reserve=0.0)
        reason = judge(scheduler, [], 1)(request(10, 30, cap=40))
        assert reason is not None and 40 <= int(reason.split()[2]) <= 50


# ------------------------------------------------------------------------ past-future


def test_worked_example_by_its_true_lengths() -> None:
    """M* of (10, 5), (20, 2), (8, 3) is 44: admitted together from a capacity of 45 on."""
    items = queue((10, 5), (20, 2), (8, 3))
    limits = toy_limits(tokens=64, model_len=44)
    assert first_pass("pf_oracle", items, pages=44, limits=limits) == 2
    assert first_pass("pf_oracle", items, pages=45, limits=limits) == 3


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("page_tokens", [1, 16])
@pytest.mark.parametrize("seed", seeds(4))
def test_with_the_true_constant_length_it_is_the_oracle(page_tokens: int, mixed: bool, seed: int) -> None:
    """(b), with no reserve."""
    rng, length = Random(seed), 25
    items = [arrival(f"r{k}", rng.randint(1, 60), length, cap=200, at=k * 700) for k in range(50)]
    common: dict[str, Any] = {
        "pages": 640 // page_tokens,
        "page_tokens": page_tokens,
        "limits": toy_limits(tokens=200, requests=32, model_len=300),
        "mixed": mixed,
    }
    oracle = serve("pf_oracle", items, **common)
    ours = serve("pastfuture", items, initial_length=length, **WHOLE_PAST, **common)

    def admissions(served: Any) -> list[Any]:
        return [
            (p.t_ns, p.work, [id for id, _ in p.deferred], p.preempted, p.held) for p in served.of(Planned)
        ]

    assert admissions(ours) == admissions(oracle)
    assert any(deferred for _, _, deferred, _, _ in admissions(ours))


@given(
    seed=st.integers(0, 1 << 20),
    window=st.integers(2, 40),
    copies=st.sampled_from([None, 1, 2]),
    page_tokens=st.sampled_from([1, 16]),
)
@settings(max_examples=40)
def test_a_cold_start_admits_no_more_than_conservative(
    seed: int, window: int, copies: int | None, page_tokens: int
) -> None:
    """(c): requests with one cap, none of which has begun."""
    rng = Random(seed)
    items = [arrival(f"r{k}", rng.randint(1, 60), rng.randint(1, 40), cap=50) for k in range(40)]
    common: dict[str, Any] = {"pages": 1600 // page_tokens, "page_tokens": page_tokens}
    assert (
        1
        <= first_pass("pastfuture", items, window=window, initial_copies=copies, **common)
        <= first_pass("conservative", items, **common)
    )


@pytest.mark.parametrize("seed", seeds(5))
def test_while_nothing_is_known_nobody_is_evicted(seed: int) -> None:
    """The peak of worst cases is above the true one (but for the interpolated draws of chance 1e-5)."""
    items = trace(Random(seed), 60)
    limits = toy_limits(tokens=60, requests=32, model_len=100)
    assert serve("pastfuture", items, pages=150, limits=limits, **WHOLE_PAST).evictions == 0
    assert serve("aggressive", items, pages=150, limits=limits).evictions > 0


def finished(outcome: Any, tokens: int) -> RequestFinished:
    return RequestFinished(t_ns=0, request="r", outcome=outcome, reason="length", output_tokens=tokens)


def test_completed_requests_are_history_and_no_others() -> None:
    scheduler = build("pastfuture", WIDE, window=10)
    for outcome in ("rejected", "aborted", "cancelled", "failed", "unfinished"):
        scheduler.on_event(finished(outcome, 3))
    assert scheduler.past.seen == 0
    scheduler.on_event(finished("completed", 3))
    assert scheduler.past.seen == 1


def test_it_begins_with_the_longest_output_the_model_allows() -> None:
    assert build("pastfuture", WIDE, window=10).past.draw(10**9) == 399
    assert build("pastfuture", WIDE, window=10, initial_length=7).past.draw(10**9) == 7


def test_the_worst_scenario_counts() -> None:
    """Lengths of 10 and 90 are known; the draws of the two scenarios come out as one of each."""

    class Two(Random):
        def random(self) -> float:
            return next(draws)

    for order in ((0.1, 0.9), (0.9, 0.1)):
        draws = iter([0.9, 0.9, *order])
        scheduler = build("pastfuture", WIDE, rng=Two(), window=2, scenarios=2, reserve=0.0)
        scheduler.past.record(10)
        scheduler.past.record(90)
        reason = judge(scheduler, [request(5, 1)], 1)(request(20))
        assert reason == "predicted peak 206 of 1.0 KV tokens, S=2, 2 of 2 lengths known"


class Counting(Random):
    """Counts its draws."""

    drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return super().random()


@pytest.mark.parametrize(
    ("running", "scenarios"), [(0, 1), (1, 5), (40, 5), (50, 5), (51, 4), (100, 3), (200, 2), (201, 1)]
)
def test_scenarios_per_pass(running: int, scenarios: int) -> None:
    """S = min(5, 200 // running + 1), 1 when nothing runs; one draw per scenario and request."""
    limits = toy_limits(tokens=4096, requests=512, model_len=64)
    rng = Counting(1)
    scheduler = build("pastfuture", limits, rng=rng, admission_interval=1, hold_steps=1, initial_length=20)
    rig = Rig(make_engine(scheduler, kvcache=ToyKV(toy_layout(1)), pages=40_000, limits=limits), auto=False)
    for k in range(running):
        rig.arrive(f"r{k}", 2, 40)
    if running:
        rig.schedule()
        rig.finish()
        rig.schedule()
        rig.finish()
    rng.drawn = 0
    rig.arrive("x", 3, 40)
    rig.schedule()
    assert "x" in rig.engine.running
    assert rng.drawn == scenarios * (running + 1)


def test_the_reserve_stays_free() -> None:
    """Prompts of 10 and outputs of 10: M* of n is 20 n, to stay below 200 (1 - reserve)."""
    items = [arrival(f"r{k}", 10, 10, cap=10) for k in range(20)]
    limits = toy_limits(tokens=400, requests=32, model_len=100)
    got = [first_pass("pastfuture", items, pages=200, limits=limits, reserve=r) for r in (0, 0.05, 0.1, 0.5)]
    assert got == [9, 9, 8, 4]


def test_the_reason_has_the_numbers() -> None:
    items = [arrival(f"r{k}", 10, 10, cap=10) for k in range(20)]
    limits = toy_limits(tokens=400, requests=32, model_len=100)
    plan = serve("pastfuture", items, pages=200, limits=limits, window=8).of(Planned)[0]
    assert plan.deferred == [("r9", "predicted peak 200 of 190.0 KV tokens, S=1, 0 of 8 lengths known")]


def test_an_empty_queue_draws_nothing() -> None:
    rng = Counting(1)
    limits = toy_limits()
    scheduler = build("pastfuture", limits, rng=rng, admission_interval=1, hold_steps=1)
    rig = Rig(make_engine(scheduler, pages=40, limits=limits))
    rig.arrive("a", 5, 30)
    assert rng.drawn == 1
    rig.drain()
    assert rng.drawn == 1


# ------------------------------------------------------------------ KV of nobody who runs


@pytest.mark.parametrize("name", ["pastfuture", "conservative", "pf_oracle"])
def test_kept_kv_is_not_capacity(name: str) -> None:
    """A paused request holds 30 of 100 tokens: three requests of 20 fit instead of four."""
    limits = toy_limits(tokens=200, requests=16, model_len=100)
    truths: dict[str, Truth] = {}
    inner = build(name, limits, truths, admission_interval=1, hold_steps=1, **_no_reserve(name))

    class Pausing:
        """Pauses the first request when it has begun."""

        def plan(self, view: Any) -> Any:
            plan = inner.plan(view)
            if view.running.first() is not None and view.running.first().id == "kept":
                plan.work.clear()
                plan.hold = None
                plan.preempt(view.running.first(), "pause", "drawn")
            return plan

    rig = Rig(make_engine(Pausing(), kvcache=ToyKV(toy_layout(1)), pages=100, limits=limits), truths=truths)
    rig.arrive("kept", 30, 9, cap=9)
    rig.auto = False
    for k in range(6):
        rig.arrive(f"r{k}", 10, 10, cap=10)
    rig.finish()
    rig.schedule()
    assert list(rig.engine.paused) == ["kept"]
    while not rig.engine.running:
        rig.schedule()
    assert len(rig.engine.running) == 3


def _no_reserve(name: str) -> dict[str, Any]:
    return {"reserve": 0.0} if name == "pastfuture" else {}


# ------------------------------------------------------------------------- the oracle


def test_a_workload_without_truth_is_refused_by_name() -> None:
    scheduler = build("pf_oracle", toy_limits(), {})
    rig = Rig(make_engine(scheduler, limits=toy_limits()), auto=False)
    rig.arrive("a", 3, 3)
    error = raises_in(rig.schedule)
    assert type(error) is WorkloadError
    assert error.what == "request a has no true output length"
    assert error.where == "scheduler 'pf_oracle'" and error.why and error.do


def test_it_needs_the_truths() -> None:
    error = raises_in(lambda: build("pf_oracle", toy_limits(), None))
    assert type(error) is ConfigError
    assert error.where is not None and error.why and error.do


def test_true_lengths_are_cut_at_the_cap() -> None:
    """Lengths of 90 with caps of 5: all of them fit."""
    items = [arrival(f"r{k}", 10, 90, cap=5) for k in range(6)]
    assert first_pass("pf_oracle", items, pages=100, limits=toy_limits(tokens=64, model_len=100)) == 6


# --------------------------------------------------------- (d): how full the memory is

STUDIES = {
    "decode-heavy": ((1, 128), (64, 128)),
    "balanced": ((94, 156), (94, 156)),
    "prefill-heavy": ((64, 128), (1, 128)),
}
"""D1, D2, D3 of the artifact's toy study, every length and the capacity divided by 32."""


@pytest.mark.parametrize("study", STUDIES)
def test_order_of_kv_use(study: str) -> None:
    rng, (prompt, output) = Random(11), STUDIES[study]
    items = [arrival(f"r{k}", rng.randint(*prompt), rng.randint(*output), cap=output[1]) for k in range(300)]
    use, evicted = {}, {}
    for name in POLICIES:
        window = {"window": 100} if name == "pastfuture" else {}
        limits = toy_limits(tokens=1024, requests=256, model_len=400)
        served = serve(name, items, pages=3750, limits=limits, admission_interval=1, **window)
        use[name], evicted[name] = served.use(), served.evictions / len(items)
    assert use["conservative"] + 0.1 < use["pastfuture"] < use["pf_oracle"] < use["aggressive"]
    assert evicted["conservative"] == evicted["pf_oracle"] == 0
    assert evicted["pastfuture"] < evicted["aggressive"] / 4

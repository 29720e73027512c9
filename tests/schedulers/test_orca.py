"""``orca`` against its card (techniques/scheduling: orca, *faithful when*), and examples by hand."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
from tests.draws import seeds
from tests.schedulers.classic import (
    PAGE,
    Seen,
    build,
    deferred,
    first_come_first_served,
    ran,
    rig_of,
    seats,
    serve,
    together,
    trace,
)

from servelab.core.errors import ConfigError
from servelab.core.records import RequestPreempted, StepDone
from servelab.core.testing.fakes import arrival, raises_in, step_by_step, toy_limits

LIMITS = toy_limits(tokens=64, requests=8, model_len=66)


def reserved(seen: Seen, id: str) -> int:
    """Pages promised to a request of one sample, by the formula."""
    r = seen.engine.requests[id]
    longest = seen.policy.config.reserve == "model_max"
    tokens = seen.engine.limits.max_model_len if longest else r.prompt_tokens + r.max_new_tokens
    return -(-tokens // PAGE)


def whole_prompts(seen: Seen) -> None:
    """(b)"""
    assert all(n == seen.pending[id] for id, n in seen.items.items())


def everybody_decodes(seen: Seen) -> None:
    assert set(seen.running) <= seen.items.keys()


def nobody_is_preempted(seen: Seen) -> None:
    """(c)"""
    assert not seen.plan.preemptions


def reservations_fit(seen: Seen) -> None:
    assert sum(reserved(seen, id) for id in {*seen.running, *seen.items}) <= seen.engine.ledger.total()[0]


def open_to_all_who_fit(seen: Seen) -> None:
    """(a) The first who stays outside lacks a place, a reservation or room in the launch."""
    outside = [id for id in seen.waiting if id not in seen.items]
    if outside:
        inside = {*seen.running, *seen.items}
        promised = sum(reserved(seen, id) for id in {*inside, outside[0]})
        tokens = sum(seen.items.values()) + seen.pending[outside[0]]
        assert (
            len(inside) == seen.policy.config.max_num_seqs
            or promised > seen.engine.ledger.total()[0]
            or tokens > seen.engine.limits.max_batch_tokens
        )


CHECKS = (
    whole_prompts,
    everybody_decodes,
    nobody_is_preempted,
    reservations_fit,
    open_to_all_who_fit,
    first_come_first_served,
    seats,
)


@pytest.mark.parametrize("hold_steps", [1, 4096])
@pytest.mark.parametrize("reserve", ["request_max", "model_max"])
def test_faithful_over_random_traces(reserve: str, hold_steps: int) -> None:
    happened: dict[str, int] = {}
    for seed in seeds(4):
        rng = Random(seed)
        got = serve(
            "orca",
            trace(rng, 40),
            pages=rng.choice([18, 40, 80]),
            limits=LIMITS,
            checks=CHECKS,
            reserve=reserve,
            max_num_seqs=rng.choice([2, 8]),
            hold_steps=hold_steps,
        )
        for what, count in got.tally.items():
            happened[what] = happened.get(what, 0) + count
    assert happened["preempted"] == happened["cut"] == 0 and happened["mixed"] > 20
    assert happened["held"] > 0 or hold_steps == 1


@pytest.mark.parametrize("more", [{"windows": (None, 9)}, {"shares": True}, {}])
@pytest.mark.parametrize("seed", seeds(3))
def test_nobody_is_preempted_with_windows_or_samples(seed: int, more: dict[str, Any]) -> None:
    items = trace(Random(seed), 40, samples=True)
    got = serve("orca", items, pages=60, limits=LIMITS, checks=(nobody_is_preempted, whole_prompts), **more)
    assert sum(len(x.requests) > 1 for x in got.of(StepDone)) > 10


def test_tokens_are_those_of_runs_one_at_a_time() -> None:
    """(d)"""
    items = trace(Random(9), 30)
    many = serve("orca", items, pages=60, limits=LIMITS)
    assert serve("orca", items, pages=60, limits=LIMITS, max_num_seqs=1).outputs == many.outputs


def test_an_admission_stalls_who_runs_by_the_length_of_its_prompt() -> None:
    """(e) 5 ns a token: the gap in which p is admitted is 5 p longer."""
    gaps = {}
    for prompt in (8, 60):
        items = [arrival("a", 4, 60), arrival("p", prompt, 1, at=3000)]
        got = serve("orca", items, pages=1000, limits=LIMITS)
        steps = [x for x in got.of(StepDone) if "p" in x.requests and "a" in x.requests]
        assert len(steps) == 1
        (step,) = steps
        ends = [end for x in got.of(StepDone) if "a" in x.requests for end in x.ends_ns]
        gap = next(b - a for a, b in pairwise(ends) if b == step.ends_ns[0])
        usual = min(b - a for a, b in pairwise(ends))
        gaps[prompt] = gap
        assert gap >= usual + 5 * prompt
    assert gaps[60] - gaps[8] == 5 * (60 - 8)


@pytest.mark.parametrize(("pages", "together"), [(5, 1), (6, 2)])
def test_a_window_reserves_what_it_may_hold_at_once(pages: int, together: int) -> None:
    """A window of 8 tokens touches three pages of 4 at most, however long the request."""
    items = [arrival(id, 4, 40, cap=40) for id in "ab"]
    got = serve("orca", items, pages=pages, limits=LIMITS, windows=(8,), checks=(nobody_is_preempted,))
    assert max(len(x.requests) for x in got.of(StepDone)) == together


# -------------------------------------------------------------------- small examples


def test_the_cap_is_reserved_and_the_next_waits_for_it() -> None:
    """Ten pages: a may come to 4 + 20 tokens, six pages; b to 4 + 16, five: it waits until a has ended."""
    rig = rig_of("orca", toy_limits(), 10)
    together(rig, a=(4, 3, 20), b=(4, 3, 16), c=(4, 3, 4))
    assert ran(rig) == {"a": 4} and deferred(rig) == {"b": "(4,) KV pages are not reserved"}
    rig.finish()
    assert ran(rig) == {"a": 1}
    while not rig.ends("a"):
        rig.finish()
    assert ran(rig) == {"b": 4, "c": 4}


def test_the_longest_request_is_reserved_for_everybody() -> None:
    limits = toy_limits(model_len=20)
    rig = rig_of("orca", limits, 14, reserve="model_max")
    together(rig, a=(1, 2, 2), b=(1, 2, 2), c=(1, 2, 2))
    assert ran(rig) == {"a": 1, "b": 1}, "five pages each"


def test_with_reserve_kvcache_nothing_is_added_to_what_the_cache_takes() -> None:
    rig = rig_of("orca", toy_limits(), 10, reserve="kvcache")
    together(rig, a=(4, 30, 40), b=(4, 30, 40))
    assert ran(rig) == {"a": 4, "b": 4}
    rig.drain()
    assert any(isinstance(x, RequestPreempted) for x in rig.records), "a paged cache reserves nothing"
    assert {x.outcome for x in rig.ends()} == {"completed"}


def test_a_prompt_that_does_not_fit_beside_the_decodes_waits_and_one_that_never_fits_is_rejected() -> None:
    rig = rig_of("orca", toy_limits(tokens=10, requests=4), 64)
    rig.arrive("a", 4, 2)
    rig.arrive("b", 10, 2)
    rig.arrive("long", 11, 2)
    rig.finish()
    assert ran(rig) == {"a": 1} and deferred(rig) == {"b": "prompt of 10 tokens, 9 left in this iteration"}
    rig.finish()
    assert ran(rig) == {"b": 10}
    (end,) = rig.ends("long")
    assert end.outcome == "rejected"
    assert end.reason == "its prompt of 11 tokens runs whole; engine.max_batch_tokens is 10"


def test_each_sample_reserves_and_all_must_fit() -> None:
    rig = rig_of("orca", toy_limits(), 12, shares=True)
    rig.arrive("first", 1, 1, cap=1)
    rig.arrive("a", 4, 3, cap=12, n=3)
    rig.arrive("b", 1, 1, cap=1)
    rig.finish()
    assert ran(rig) == {"a": 4}, "three times four pages"
    assert deferred(rig) == {"b": "(0,) KV pages are not reserved"}
    rig.finish()
    assert ran(rig) == {"a": 1, "a#1": 1, "a#2": 1, "b": 1}, "they share the first page"
    rig = rig_of("orca", toy_limits(), 11, shares=True)
    rig.arrive("a", 4, 3, cap=12, n=3)
    (end, *_) = rig.ends()
    assert end.outcome == "rejected" and end.reason == "its 3 samples may need more than (11,) KV pages"


def test_a_pool_that_shrinks_is_the_only_reason_to_drop_somebody() -> None:
    rig = rig_of("orca", toy_limits(), 12)
    together(rig, a=(4, 20, 20), b=(4, 20, 20))
    rig.engine.ledger.device[0].resize(-4)
    rig.drain()
    assert [x.request for x in rig.records if isinstance(x, RequestPreempted)] == ["b"]
    assert [x.output_tokens for x in rig.ends()] == [20, 20]


def test_alone_a_request_runs_although_its_reservation_can_never_fit() -> None:
    """Eight pages are left; its worst case is eleven."""
    rig = rig_of("orca", toy_limits(), 12)
    rig.engine.ledger.device[0].resize(-4)
    together(rig, a=(4, 5, 40), b=(4, 5, 40))
    assert ran(rig) == {"a": 4} and "b" in deferred(rig)
    rig.drain()
    assert {x.outcome for x in rig.ends()} == {"completed"}


def test_planned_ahead_nothing_is_held_while_a_last_token_is_in_flight() -> None:
    """a, at its cap, is not in the batch that is planned: when it ends, c must get its place."""
    limits = toy_limits(in_flight=2)
    rig = rig_of("orca", limits, 64, max_num_seqs=2, hold_steps=50)
    together(rig, a=(4, 3, 3), b=(4, 40, 40), c=(4, 3, 3))
    while not rig.ends("a"):
        rig.finish(steps=1)
    rig.finish(steps=1)
    assert "c" in rig.engine.running


@pytest.mark.parametrize("seed", seeds(4))
def test_steps_are_the_same_held_or_not_where_memory_runs_out(seed: int) -> None:
    """As the suite checks of the defaults: here nothing is reserved."""
    items = trace(Random(seed), 40)
    made = [
        serve("orca", items, pages=20, limits=LIMITS, reserve="kvcache", hold_steps=n).records
        for n in (1, 4096)
    ]
    assert step_by_step(made[0]) == step_by_step(made[1])
    assert any(isinstance(x, RequestPreempted) for x in made[0])


def test_asking_for_more_than_the_device_takes_is_refused() -> None:
    error = raises_in(lambda: build("orca", toy_limits(), max_num_seqs=17))
    assert type(error) is ConfigError and error.what == "scheduler.max_num_seqs is 17"

"""``splitfuse`` against its card (techniques/scheduling, *faithful when*), and examples by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.draws import seeds
from tests.schedulers.classic import Seen, build, deferred, ran, rig_of, serve, together, trace

from servelab.core.errors import ConfigError
from servelab.core.records import RequestPreempted, StepDone
from servelab.core.testing.fakes import raises_in, step_by_step, toy_limits
from servelab.plugins.schedulers.splitfuse import SplitFuseConfig

LIMITS = toy_limits(tokens=64, requests=8, model_len=66)


def one_size(seen: Seen) -> None:
    """(a) Never more, and all of it whenever so much is pending and KV permits."""
    most, used = seen.policy.config.max_ragged_batch_size, sum(seen.items.values())
    assert used <= most and len(seen.items) <= seen.policy.config.max_ragged_sequence_count
    idle = [id for id in seen.pending if id not in seen.items]
    skipped = [id for id in idle if id in seen.decoding]
    if used < min(most, sum(seen.pending.values())) and len(seen.items) < seen.policy._most and not skipped:
        kv, live = seen.view.kv, seen.engine.requests
        taken = sum(kv.pages_needed(live[id].view, n)[0] for id, n in seen.items.items())
        left = seen.free[0] - taken
        assert any(kv.pages_needed(live[id].view, seen.pending[id])[0] > left for id in idle), "it would fit"


def at_most_one_cut(seen: Seen) -> None:
    """(c)"""
    cut = [id for id, n in seen.items.items() if n < seen.pending[id]]
    assert len(cut) <= 1
    assert not cut or cut == [*seen.items][-1:], "the last one"
    assert not cut or sum(seen.items.values()) == seen.policy.config.max_ragged_batch_size


def generations_first(seen: Seen) -> None:
    """(d)"""
    kinds = [id in seen.decoding for id in seen.items]
    assert kinds == sorted(kinds, reverse=True)


def reset_only_when_stuck(seen: Seen) -> None:
    assert not (seen.plan.preemptions and seen.plan.work)
    assert len(seen.plan.preemptions) <= 1


CHECKS = (one_size, at_most_one_cut, generations_first, reset_only_when_stuck)


@pytest.mark.parametrize("hold_steps", [1, 4096])
def test_faithful_over_random_traces(hold_steps: int) -> None:
    happened: dict[str, int] = {}
    for seed in seeds(6):
        rng = Random(seed)
        got = serve(
            "splitfuse",
            trace(rng, 40),
            pages=rng.choice([17, 20]),
            limits=LIMITS,
            checks=CHECKS,
            max_ragged_batch_size=rng.choice([9, 16, 40]),
            max_ragged_sequence_count=rng.choice([3, 8]),
            hold_steps=hold_steps,
        )
        for what, count in got.tally.items():
            happened[what] = happened.get(what, 0) + count
    assert happened["preempted"] > 3 and happened["mixed"] > 30 and happened["cut"] > 10
    assert happened["held"] > 0 or hold_steps == 1


@pytest.mark.parametrize("more", [{"windows": (None, 9)}, {"shares": True, "samples": True}])
def test_windows_and_samples(more: dict[str, Any]) -> None:
    more = dict(more)
    items = trace(Random(3), 40, samples=more.pop("samples", False))
    got = serve("splitfuse", items, pages=30, limits=LIMITS, checks=CHECKS[1:], **more)
    assert got.tally["mixed"]


@pytest.mark.parametrize("seed", seeds(3))
def test_steps_are_the_same_held_or_not_where_some_are_left_out(seed: int) -> None:
    items = trace(Random(seed), 40, samples=True)
    more: dict[str, Any] = {"max_ragged_sequence_count": 2, "shares": True}
    made = [
        serve("splitfuse", items, pages=40, limits=LIMITS, hold_steps=n, **more).records for n in (1, 4096)
    ]
    assert step_by_step(made[0]) == step_by_step(made[1])


def test_only_the_last_piece_of_a_prompt_samples() -> None:
    """(b)"""
    got = serve("splitfuse", trace(Random(4), 30), pages=40, limits=LIMITS, max_ragged_batch_size=8)
    left = {item.spec.id: item.spec.prompt_tokens for item in got.items}
    for step in got.of(StepDone):
        for id, n, emitted in zip(step.requests, step.tokens, step.emitted, strict=True):
            if left[id] > 0:
                left[id] -= n
                assert emitted == (left[id] == 0)


def test_tokens_are_those_of_unsplit_runs() -> None:
    """(e)"""
    items = trace(Random(9), 30)
    whole = serve("splitfuse", items, pages=1000, limits=LIMITS)
    cut = serve("splitfuse", items, pages=18, limits=LIMITS, max_ragged_batch_size=8)
    assert whole.tally["preempted"] == 0 < cut.tally["preempted"] and cut.tally["cut"] > 10
    assert whole.outputs == cut.outputs


def test_a_backlog_fills_every_pass() -> None:
    rng = Random(0)
    limits = toy_limits(tokens=768, requests=512, model_len=4000)
    rig = rig_of("splitfuse", limits, 100_000, max_ragged_sequence_count=512)
    together(rig, **{f"r{k}": (rng.randint(1, 2600), 900, 900) for k in range(9)})
    pending = sum(r.pending for r in rig.engine.requests.values()) + 768
    while pending >= 768:
        assert sum(ran(rig).values()) == 768
        rig.finish()
        pending = sum(r.pending for r in rig.engine.requests.values())
    assert SplitFuseConfig().max_ragged_batch_size == 768
    assert SplitFuseConfig().max_ragged_sequence_count == 512


# -------------------------------------------------------------------- small examples


def test_generations_then_prompts_composed_and_cut() -> None:
    rig = rig_of("splitfuse", toy_limits(tokens=10, requests=8), 64)
    rig.arrive("a", 4, 20)
    together(rig, b=3, c=9, d=2)
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 3, "c": 6}
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1, "c": 3, "d": 2}, "the rest of c is in front of d"
    assert [r.id for r in rig.batches[-1].requests] == ["a", "b", "c", "d"]


def test_a_prompt_waits_until_all_that_is_left_of_it_fits() -> None:
    """Eight pages: a holds one, b wants 30 tokens, eight pages; nobody goes before it."""
    rig = rig_of("splitfuse", toy_limits(tokens=10), 8)
    rig.arrive("a", 3, 2)
    rig.arrive("b", 30, 2)
    rig.arrive("c", 1, 2)
    rig.finish()
    assert ran(rig) == {"a": 1} and deferred(rig) == {"b": "30 tokens do not fit in (7,) pages"}
    rig.finish()
    assert ran(rig) == {"b": 10}


def test_a_generation_without_a_page_is_skipped() -> None:
    """Four pages: a and b need a page each and one is free. b keeps its two until it is stuck."""
    rig = rig_of("splitfuse", toy_limits(), 4)
    together(rig, a=(4, 6, 50), b=(8, 6, 50))
    rig.finish()
    assert ran(rig) == {"a": 1}
    assert [*rig.engine.running] == ["a", "b"]
    rig.drain()
    assert [x.output_tokens for x in rig.ends()] == [6, 6]


def test_who_is_left_out_goes_first_next_time() -> None:
    """Six generations, four per pass: those skipped stand at the front of the buffer."""
    rig = rig_of("splitfuse", toy_limits(), 64, max_ragged_sequence_count=4, shares=True)
    rig.arrive("first", 1, 1)
    rig.arrive("a", 4, 30, n=3)
    rig.arrive("b", 4, 30, n=3)
    rig.finish()
    passes = []
    for _ in "1234":
        rig.finish()
        passes.append([*ran(rig)])
    assert passes == [
        ["a", "b", "a#1", "a#2"],
        ["b#1", "b#2", "a", "b"],
        ["a#1", "a#2", "b#1", "b#2"],
        ["a", "b", "a#1", "a#2"],
    ]


def test_stuck_the_last_holder_goes_to_the_end_of_the_buffer() -> None:
    """Four pages, two each for a and b: when both need a third, b is reset: behind c, before d. Then a and c
    are stuck, and a, which had the last token, goes to the end.
    """
    rig = rig_of("splitfuse", toy_limits(), 4)
    together(rig, a=(7, 9, 50), b=(7, 9, 50))
    rig.finish()
    rig.arrive("c", 4, 2)
    rig.finish()
    (x,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
    assert (x.request, x.reason) == ("b", "nothing fits in free KV pages; last in the buffer")
    assert ran(rig) == {"a": 1, "c": 4} and [*rig.engine.waiting] == ["b"]
    rig.arrive("d", 4, 2)
    order: list[str] = []
    while rig.flights[0]:
        rig.finish()
        order += [id for id, n in ran(rig).items() if n > 1 and id not in order]
    assert order == ["b", "d", "a"]
    assert [x.request for x in rig.records if isinstance(x, RequestPreempted)][:2] == ["b", "a"]
    assert {x.request: x.output_tokens for x in rig.ends()} == {"a": 9, "b": 9, "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_ragged_batch_size": 65}, "max_ragged_batch_size is 65"),
        ({"max_ragged_sequence_count": 17}, "max_ragged_sequence_count is 17"),
    ],
)
def test_asking_for_more_than_the_device_takes_is_refused(settings: dict[str, int], what: str) -> None:
    error = raises_in(lambda: build("splitfuse", toy_limits(), **settings))
    assert type(error) is ConfigError and error.what == f"scheduler.{what}"

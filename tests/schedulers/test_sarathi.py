"""``sarathi`` against its card (techniques/scheduling: sarathi, *faithful when*), and examples by hand."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError
from tests.draws import seeds
from tests.schedulers.classic import (
    Seen,
    build,
    deferred,
    first_come_first_served,
    none_in_who_preempts,
    preempted_first,
    ran,
    rig_of,
    seats,
    serve,
    together,
    trace,
    youngest_first,
)

from servelab.core.errors import ConfigError
from servelab.core.records import RequestPreempted, StepDone
from servelab.core.testing.fakes import Rig, arrival, raises_in, toy_limits
from servelab.plugins.schedulers.sarathi import ChunkSchedule, SarathiConfig

LIMITS = toy_limits(tokens=64, requests=8, model_len=66)


def every_decode_runs(seen: Seen) -> None:
    """(a)"""
    assert set(seen.decoding) - set(seen.victims) <= seen.items.keys()


def within_the_chunk_or_the_decodes(seen: Seen) -> None:
    """(b)"""
    size = max(seen.policy.chunks.sizes)
    assert sum(seen.items.values()) <= max(size, len(set(seen.items) & set(seen.decoding)))


def prompts_have_their_pages(seen: Seen) -> None:
    """No prompt under way ever lacks a page for its chunk."""
    assert all(p.reason == "out of KV pages; youngest running request" for p in seen.plan.preemptions)


def all_of_the_chunk(seen: Seen) -> None:
    """What decodes leave of C goes to prompts, as long as there are any that fit."""
    size, used = seen.policy.config.chunk_size, sum(seen.items.values())
    if len(seen.policy.chunks.sizes) == 1 and used < size and not seen.victims:
        assert all(seen.items[id] == seen.pending[id] for id in seen.prompts), "a prompt was cut too early"
        assert set(seen.running) <= seen.items.keys()


CHECKS = (
    every_decode_runs,
    within_the_chunk_or_the_decodes,
    prompts_have_their_pages,
    all_of_the_chunk,
    youngest_first,
    preempted_first,
    none_in_who_preempts,
    first_come_first_served,
    seats,
)
DYNAMIC = {
    "enable_dynamic_chunking_schedule": True,
    "low_chunk_size": 32,
    "high_chunk_size": 64,
    "chunk_schedule_stages": 3,
    "chunk_schedule_max_tokens": 40,
}


@pytest.mark.parametrize("hold_steps", [1, 4096])
@pytest.mark.parametrize("more", [{}, {"windows": (None, 9)}, DYNAMIC], ids=["plain", "window", "dynamic"])
def test_faithful_over_random_traces(more: dict[str, Any], hold_steps: int) -> None:
    happened: dict[str, int] = {}
    for seed in seeds(4):
        rng = Random(seed)
        settings = {
            "chunk_size": rng.choice([5, 12, 40]),
            "max_num_seqs": rng.choice([3, 8]),
            "watermark": rng.choice([0.0, 0.1]),
            "hold_steps": hold_steps,
            **more,
        }
        got = serve(
            "sarathi", trace(rng, 40), pages=rng.choice([18, 22]), limits=LIMITS, checks=CHECKS, **settings
        )
        for what, count in got.tally.items():
            happened[what] = happened.get(what, 0) + count
    assert happened["preempted"] > 3 and happened["mixed"] > 30
    assert happened["cut"] > 0 and (happened["held"] > 0 or hold_steps == 1)


def test_tokens_do_not_depend_on_chunks_or_memory() -> None:
    """(e)"""
    items = trace(Random(9), 30)
    whole = serve("sarathi", items, pages=1000, limits=LIMITS)
    cut = serve("sarathi", items, pages=18, limits=LIMITS, chunk_size=7)
    assert whole.tally["preempted"] == 0 < cut.tally["preempted"] and cut.tally["cut"] > 10
    assert whole.outputs == cut.outputs


# -------------------------------------------------------------------- small examples


def decoding(rig: Rig, count: int) -> None:
    together(rig, **{f"d{k}": (1, 500, 500) for k in range(count)})
    rig.finish()
    assert ran(rig) == {f"d{k}": 1 for k in range(count)}


@pytest.mark.parametrize(
    ("c", "d", "p", "chunks"),
    [
        (512, 30, 1000, [482, 482, 36]),
        (512, 0, 1024, [512, 512]),
        (512, 30, 482, [482]),
        (100, 99, 3, [1, 1, 1]),
    ],
)
def test_a_prompt_takes_what_decodes_leave(c: int, d: int, p: int, chunks: list[int]) -> None:
    """(c) The card's worked example first."""
    limits = toy_limits(tokens=512, requests=128, model_len=2048)
    rig = rig_of("sarathi", limits, 4000, chunk_size=c)
    if d:
        decoding(rig, d)
    rig.arrive("p", p, 9)
    if d:
        rig.finish()
    got = [ran(rig)["p"]]
    while sum(got) < p:
        rig.finish()
        got.append(ran(rig)["p"])
    assert got == chunks and len(got) == -(-p // (c - d))
    assert all(ran(rig)[f"d{k}"] == 1 for k in range(d))


def test_more_decodes_than_c_all_run_and_no_prompt_does() -> None:
    limits = toy_limits(tokens=64, requests=16, model_len=600)
    rig = rig_of("sarathi", limits, 4000, chunk_size=8)
    decoding(rig, 8)
    rig.arrive("p", 5, 9)
    rig.finish()
    assert ran(rig) == {f"d{k}": 1 for k in range(8)}
    assert deferred(rig) == {"p": "no room for a chunk beside 8 tokens"}
    rig.abort("d0")
    rig.finish()
    assert ran(rig)["p"] == 1


def test_a_step_is_no_longer_for_a_longer_prompt() -> None:
    """(d) With a price by the token, the longest gap between tokens is that of C tokens, whatever comes."""
    limits = toy_limits(tokens=64, requests=16, model_len=2000)
    for prompt in (64, 400, 1900):
        items = [arrival("a", 4, 90), arrival("p", prompt, 5, at=3000)]
        got = serve("sarathi", items, pages=1000, limits=limits, chunk_size=32, watermark=0.0)
        ends = [end for x in got.of(StepDone) if "a" in x.requests for end in x.ends_ns]
        tokens = [sum(x.tokens) for x in got.of(StepDone)]
        assert max(tokens) == 32 and max(b - a for a, b in pairwise(ends)) <= 100 + 5 * 32 + 1900 + 90


def test_all_pages_of_a_prompt_are_its_own_from_admission() -> None:
    """Ten pages: a decodes on one, p of 32 tokens has eight. When a needs a third, p goes, though many of
    its pages are not written yet.
    """
    rig = rig_of("sarathi", toy_limits(tokens=16), 10, chunk_size=4, watermark=0.0)
    rig.arrive("a", 4, 50)
    rig.finish()
    rig.arrive("p", 32, 9)
    rig.finish()
    assert ran(rig) == {"a": 1, "p": 3}
    while "p" in rig.engine.running:
        free = rig.free()
        rig.finish()
    assert free[0] > 0, "there were free pages, and all were p's"
    (x,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
    assert (x.request, x.reason) == ("p", "out of KV pages; youngest running request")
    assert ran(rig)["a"] == 1


def test_admission_leaves_a_watermark_while_somebody_runs() -> None:
    rig = rig_of("sarathi", toy_limits(tokens=64), 20, watermark=0.25)
    together(rig, a=36, b=24, c=3)
    assert ran(rig) == {"a": 36, "b": 24}
    assert deferred(rig) == {"c": "out of KV pages for its prompt: (5,) free"}
    rig = rig_of("sarathi", toy_limits(), 16, watermark=0.25)
    rig.arrive("alone", 63, 1)
    assert ran(rig) == {"alone": 63}


def test_a_prompt_longer_than_a_pool_with_a_window_needs_its_window_only() -> None:
    """60 tokens in chunks of 4, a window of 8: four pages of 4 hold what a chunk sees and its own."""
    limits = toy_limits(tokens=16, model_len=80)
    got = serve("sarathi", [arrival("p", 60, 9)], pages=4, limits=limits, windows=(8,), chunk_size=4)
    assert got.tally["cut"] == 14 and got.tally["preempted"] == 0


def test_seats_and_samples() -> None:
    rig = rig_of("sarathi", toy_limits(), 64, max_num_seqs=4, shares=True)
    rig.arrive("a", 4, 9, n=3)
    rig.arrive("b", 4, 9, n=2)
    rig.arrive("c", 4, 9)
    rig.finish()
    assert ran(rig) == {"a": 1, "a#1": 1, "a#2": 1}
    assert deferred(rig) == {"b": "max_num_seqs 4 reached"}


# -------------------------------------------------------------------- the dynamic schedule


def schedule(low: int, high: int, stages: int, tokens: int) -> ChunkSchedule:
    return ChunkSchedule(
        SarathiConfig(
            enable_dynamic_chunking_schedule=True,
            low_chunk_size=low,
            high_chunk_size=high,
            chunk_schedule_stages=stages,
            chunk_schedule_max_tokens=tokens,
        )
    )


def test_chunks_shrink_from_high_to_low_over_the_stages() -> None:
    made = schedule(128, 512, 4, 1000)
    assert made.sizes == (512, 384, 256, 128)
    assert [made.size(done) for done in (0, 249, 250, 499, 500, 749, 750, 5000)] == [
        *(512, 512, 384, 384),
        *(256, 256, 128, 128),
    ]


def test_sizes_between_are_rounded_to_32() -> None:
    """53 and 74 lie between 32 and 96: both are nearest to 64."""
    assert schedule(32, 96, 4, 100).sizes == (96, 64, 64, 32)
    assert schedule(64, 64, 3, 100).sizes == (64, 64, 64)
    assert schedule(32, 64, 1, 100).sizes == (32,)
    assert schedule(32, 64, 3, 100).sizes == (64, 64, 32), "48 is halfway: to the even multiple"


def test_a_prompt_runs_in_the_chunks_of_its_schedule() -> None:
    limits = toy_limits(tokens=512, model_len=2048)
    rig = rig_of(
        "sarathi",
        limits,
        4000,
        enable_dynamic_chunking_schedule=True,
        low_chunk_size=128,
        high_chunk_size=512,
        chunk_schedule_stages=4,
        chunk_schedule_max_tokens=1000,
    )
    rig.arrive("p", 1300, 9)
    got = []
    while not rig.request("p").generated:
        got.append(ran(rig)["p"])
        rig.finish()
    assert got == [512, 256, 128, 128, 128, 128, 20]


@pytest.mark.parametrize(
    "wrong",
    [
        {"low_chunk_size": 32, "high_chunk_size": 64, "chunk_schedule_stages": 4},
        {"low_chunk_size": 64, "high_chunk_size": 32},
        {"low_chunk_size": 20, "high_chunk_size": 64},
        {"low_chunk_size": 32, "high_chunk_size": 65},
    ],
)
def test_a_schedule_is_stated_in_full(wrong: dict[str, int]) -> None:
    more = {"chunk_schedule_stages": 4, "chunk_schedule_max_tokens": 100} if len(wrong) < 3 else {}
    with pytest.raises(ValidationError, match="chunk_size"):
        SarathiConfig(enable_dynamic_chunking_schedule=True, **wrong, **more)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"chunk_size": 65}, "chunk_size is 65"), ({"max_num_seqs": 17}, "max_num_seqs is 17")],
)
def test_asking_for_more_than_the_device_takes_is_refused(settings: dict[str, int], what: str) -> None:
    error = raises_in(lambda: build("sarathi", toy_limits(), **settings))
    assert type(error) is ConfigError and error.what == f"scheduler.{what}"

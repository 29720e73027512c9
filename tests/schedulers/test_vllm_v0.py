"""``vllm_v0`` against its card (techniques/scheduling: vllm_fcfs, *faithful when*), and examples by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.draws import seeds
from tests.schedulers.classic import (
    REGISTRY,
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
from servelab.core.records import Planned, RequestPreempted
from servelab.core.testing.fakes import Rig, arrival, raises_in, toy_limits

LIMITS = toy_limits(tokens=64, requests=8, model_len=66)


def prompts_apart(seen: Seen) -> None:
    """(a)"""
    if not seen.policy.config.enable_chunked_prefill:
        assert not (seen.prompts and set(seen.items) & set(seen.decoding)), "prompts run apart from decodes"
        whole = [id for id in seen.prompts if seen.items[id] < seen.pending[id]]
        assert not whole or (
            len(seen.items) == 1 and seen.pending[whole[0]] > seen.policy.max_num_batched_tokens
        )


def swapped_first(seen: Seen) -> None:
    out = [t for t in seen.engine.transfers.values() if t.direction == "out"]
    back = [verdict.request.id for verdict in seen.plan.swap_ins]
    assert not (back and (seen.victims or out)), "no swap-in beside a swap-out"
    assert back == seen.swapped[: len(back)], "swapped requests come back oldest first"
    if not seen.policy.config.enable_chunked_prefill:
        assert not (seen.new and (seen.swapped or out)), "swapped requests come before prompts"


def seats_of_loading(seen: Seen) -> None:
    """Who is on the way back has a seat."""
    back = sum(t.direction == "in" for t in seen.engine.transfers.values()) + len(seen.plan.swap_ins)
    most = seen.policy.config.max_num_seqs
    assert len(seen.running) - len(seen.victims) + back + len(seen.new) <= most or not (
        seen.new or seen.plan.swap_ins
    )


def budget(seen: Seen) -> None:
    assert sum(seen.items.values()) + len(seen.plan.swap_ins) <= seen.policy.max_num_batched_tokens


CHECKS = (
    prompts_apart,
    youngest_first,
    preempted_first,
    none_in_who_preempts,
    swapped_first,
    seats_of_loading,
    budget,
    seats,
    first_come_first_served,
)
MODES: dict[str, dict[str, Any]] = {
    "recompute": {"preemption_mode": "recompute"},
    "swap": {"preemption_mode": "swap", "host_pages": 60},
    "swap, slow link": {"preemption_mode": "swap", "host_pages": 60, "transfer_ns": 9000},
    "swap, small host": {"preemption_mode": "swap", "host_pages": 12},
    "chunked": {"enable_chunked_prefill": True, "max_num_batched_tokens": 12},
    "chunked swap": {"enable_chunked_prefill": True, "max_num_batched_tokens": 12}
    | {"preemption_mode": "swap", "host_pages": 60},
    "delayed": {"delay_factor": 0.7},
    "delayed, chunked": {"delay_factor": 0.7, "enable_chunked_prefill": True, "max_num_batched_tokens": 20},
    "window": {"windows": (None, 9), "preemption_mode": "swap", "host_pages": 60},
}


@pytest.mark.parametrize("hold_steps", [1, 4096])
@pytest.mark.parametrize("mode", MODES)
def test_faithful_over_random_traces(mode: str, hold_steps: int) -> None:
    """(a) prompts apart, (c) youngest victims, (d), (e), (f) pages conserved, and swaps in order."""
    happened: dict[str, int] = {}
    modes = set()
    for seed in seeds(3):
        rng = Random(seed)
        settings = {"max_num_seqs": rng.choice([3, 8]), "watermark": rng.choice([0.0, 0.1]), **MODES[mode]}
        pages = rng.choice([18, 22])
        got = serve(
            "vllm_v0",
            trace(rng, 40),
            pages=pages,
            limits=LIMITS,
            checks=CHECKS,
            hold_steps=hold_steps,
            **settings,
        )
        assert got.tally["rejected"] == 0
        for what, count in got.tally.items():
            happened[what] = happened.get(what, 0) + count
        modes |= {x.mode for x in got.of(RequestPreempted)}
    assert happened["preempted"] > 3, "the traces must be hard enough to preempt"
    assert happened["held"] > 0 or hold_steps == 1
    assert modes == {
        "recompute": {"recompute"},
        "swap, small host": {"recompute", "swap"},
        "delayed": {"recompute"},
        "delayed, chunked": {"recompute"},
        "chunked": {"recompute"},
    }.get(mode, {"swap"})
    assert (happened["swapped in"] > 0) == ("swap" in modes)
    assert (happened["mixed"] > 0) == ("chunked" in mode)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pages_are_conserved_over_1e5_steps() -> None:
    """(f) All modes in turn, every plan checked."""
    steps, seed = 0, 100
    while steps < 100_000:
        for mode in MODES:
            rng = Random(seed)
            got = serve("vllm_v0", trace(rng, 60), pages=18, limits=LIMITS, checks=CHECKS, **MODES[mode])
            steps, seed = steps + got.steps, seed + 1


def test_samples_of_a_prompt_are_swapped_and_others_recomputed() -> None:
    items = trace(Random(5), 40, samples=True)
    got = serve("vllm_v0", items, pages=26, host_pages=80, limits=LIMITS, shares=True)
    for x in got.of(RequestPreempted):
        several = "#" in x.request or next(i for i in items if i.spec.id == x.request).spec.n > 1
        assert x.mode == ("swap" if several else "recompute")
    assert {x.mode for x in got.of(RequestPreempted)} == {"swap", "recompute"}


@pytest.mark.parametrize("mode", MODES)
def test_preemption_preserves_the_output(mode: str) -> None:
    """(g) Outputs with KV memory tiny equal those with KV memory large."""
    items = trace(Random(9), 30)
    large = serve("vllm_v0", items, pages=1000, limits=LIMITS, **MODES[mode])
    tiny = serve("vllm_v0", items, pages=17, limits=LIMITS, **MODES[mode])
    assert large.tally["preempted"] == 0 < tiny.tally["preempted"]
    assert large.outputs == tiny.outputs


# -------------------------------------------------------------------- small examples


def test_prompts_run_whole_and_decodes_stall() -> None:
    rig = rig_of("vllm_v0", toy_limits(tokens=10), 64)
    rig.arrive("a", 4, 20)
    rig.finish()
    assert ran(rig) == {"a": 1}
    rig.arrive("b", 6, 20)
    rig.arrive("c", 5, 20)
    rig.finish()
    assert ran(rig) == {"b": 6} and deferred(rig) == {"c": "5 tokens, 4 left in this step"}
    rig.finish()
    assert ran(rig) == {"c": 5}
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1, "c": 1}


def test_a_prompt_beyond_the_budget_is_rejected_and_chunked_it_runs() -> None:
    rig = rig_of("vllm_v0", toy_limits(tokens=10), 64)
    rig.arrive("long", 11, 20)
    (end,) = rig.ends("long")
    assert end.outcome == "rejected"
    assert end.reason == "prompt of 11 tokens is longer than max_num_batched_tokens 10"
    rig = rig_of("vllm_v0", toy_limits(tokens=10), 64, enable_chunked_prefill=True)
    rig.arrive("a", 2, 20)
    rig.finish()
    rig.arrive("long", 14, 20)
    rig.finish()
    assert ran(rig) == {"a": 1, "long": 9}
    rig.finish()
    assert ran(rig) == {"a": 1, "long": 5}


def test_seats() -> None:
    rig = rig_of("vllm_v0", toy_limits(), 64, max_num_seqs=2)
    together(rig, a=4, b=4, c=4)
    assert ran(rig) == {"a": 4, "b": 4}
    assert deferred(rig) == {"c": "max_num_seqs 2 reached"}


def test_admission_leaves_a_watermark_while_somebody_runs() -> None:
    """Of 20 pages 5 stay free; alone, a request may take them."""
    rig = rig_of("vllm_v0", toy_limits(), 20, watermark=0.25)
    together(rig, a=36, b=24, c=3)
    assert ran(rig) == {"a": 36, "b": 24}, "9 and 6 pages leave 5"
    assert deferred(rig) == {"c": "out of KV pages: (5,) free"}, "that is not beyond the watermark"
    rig = rig_of("vllm_v0", toy_limits(), 20, watermark=0.25)
    together(rig, a=36, b=28, c=4)
    assert ran(rig) == {"a": 36}, "9 and 7 pages leave 4"
    assert deferred(rig) == {"b": "out of KV pages: (11,) free"}
    rig = rig_of("vllm_v0", toy_limits(), 16, watermark=0.25)
    rig.arrive("alone", 63, 1)
    assert ran(rig) == {"alone": 63}


def test_delay() -> None:
    """Prompts wait until the oldest has waited half as long as the last prompt step took."""
    rig = rig_of("vllm_v0", toy_limits(), 64, delay_factor=0.5)
    rig.arrive("a", 4, 30)
    began = rig.now_ns
    rig.now_ns += 19_000
    rig.finish()  # took 20 us
    assert rig.now_ns - began == 20_000 and ran(rig) == {"a": 1}
    rig.now_ns += 500
    rig.arrive("b", 4, 30)
    came = rig.now_ns
    for _ in range(10):
        rig.finish()
        assert ran(rig) == {"a": 1}
    assert rig.now_ns - came == 10_000, "not yet: it must be longer than that"
    rig.finish()
    assert ran(rig) == {"b": 4}
    rig = rig_of("vllm_v0", toy_limits(), 64, delay_factor=1e6)
    rig.arrive("a", 4, 2)
    rig.arrive("b", 4, 2)
    rig.finish()
    assert ran(rig) == {"a": 1}
    rig.finish()
    assert ran(rig) == {"b": 4}, "nobody runs: at once"


def test_a_hold_ends_when_the_delay_does() -> None:
    rig = rig_of("vllm_v0", toy_limits(), 64, delay_factor=0.5, hold_steps=100)
    rig.arrive("a", 4, 90)
    rig.now_ns += 19_000
    rig.finish()
    rig.arrive("b", 4, 30)
    came = rig.now_ns
    rig.finish(steps=1)
    assert [x.held for x in rig.records if isinstance(x, Planned)][-1] > 1
    assert rig.timers[-1] == came + 10_001


def swapping(rig: Rig) -> None:
    """Three of one page in four pages: a takes the fourth, b needs one too, and c leaves."""
    together(rig, a=(4, 5, 50), b=(4, 9, 50), c=(4, 9, 50))
    rig.finish()


def test_the_youngest_is_swapped_and_comes_back_before_anybody_new() -> None:
    rig = rig_of("vllm_v0", toy_limits(), 4, host_pages=8, preemption_mode="swap")
    swapping(rig)
    assert ran(rig) == {"a": 1}, "b waits for the page that c leaves"
    assert len(rig.transfers) == 1 and rig.request("c").phase == "swapping"
    rig.arrive("new", 1, 1)
    rig.finish()
    assert ran(rig) == {"a": 1}, "nobody is preempted, or admitted, while pages are on their way"
    rig.finish_transfer()
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1} and "new" in rig.engine.waiting
    while not rig.ends("a"):
        assert rig.request("c").phase == "swapped"
        rig.finish()
    assert rig.request("c").phase == "loading" and "new" in rig.engine.waiting
    assert ran(rig) == {"b": 1}, "it runs when it is there"
    rig.finish_transfer()
    rig.finish()
    assert ran(rig) == {"new": 1}, "nobody is swapped out any more"
    rig.finish()
    assert ran(rig).keys() == {"b", "c"}
    rig.drain()
    assert {x.outcome for x in rig.ends()} == {"completed"}


def test_without_room_on_the_host_a_victim_is_recomputed_and_the_log_says_why() -> None:
    for host, why in ((0, "this run has no host pages (executor.num_host_pages)"),):
        rig = rig_of("vllm_v0", toy_limits(), 4, host_pages=host, preemption_mode="swap")
        swapping(rig)
        (x,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
        assert (x.request, x.mode) == ("c", "recompute")
        assert x.reason == f"out of KV pages; youngest running request; not swapped: {why}"
    rig = rig_of("vllm_v0", toy_limits(), 6, host_pages=1, preemption_mode="swap")
    together(rig, a=(8, 9, 50), b=(8, 9, 50), c=(8, 9, 50))
    rig.finish()
    (x,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
    assert x.mode == "recompute" and x.reason.endswith("it holds (2,) pages, (1,) are free on the host")
    assert ran(rig) == {"a": 1, "b": 1}


def test_who_comes_back_from_the_host_is_as_old_as_it_was() -> None:
    """a and b run; b is swapped and back; c came later and is the victim, though b was admitted last."""
    rig = rig_of("vllm_v0", toy_limits(), 64, host_pages=64, preemption_mode="swap")
    together(rig, a=4, b=4, c=4)
    rig.finish()
    policy: Any = rig.engine._plan.__self__  # type: ignore[attr-defined]
    engine = rig.engine
    running = engine.running
    running["b"] = running.pop("b")  # as after a swap
    policy._returned["b"] = None
    assert [r.id for r in policy.by_age(engine._view)] == ["a", "b", "c"]
    policy._returned.clear()
    assert [r.id for r in policy.by_age(engine._view)] == ["a", "c", "b"]


def test_who_has_outgrown_the_budget_is_recomputed_in_parts_and_alone() -> None:
    """Budget 8; b holds 4 + 7 tokens when it is dropped, and comes back in 8 + 3."""
    rig = rig_of("vllm_v0", toy_limits(tokens=8, requests=4), 6, max_num_seqs=2)
    together(rig, a=(4, 11, 50), b=(4, 20, 50))
    while not any(isinstance(x, RequestPreempted) for x in rig.records):
        rig.finish()
    known = rig.request("b").pending
    assert known == 4 + 9
    while rig.request("b").phase == "waiting":
        rig.finish()
    assert ran(rig) == {"b": 8}
    rig.finish()
    assert ran(rig) == {"b": 5}
    rig.drain()
    assert rig.ends("b")[0].output_tokens == 20


def test_samples_take_seats() -> None:
    rig = rig_of("vllm_v0", toy_limits(), 64, max_num_seqs=4, shares=True)
    rig.arrive("a", 4, 9, n=3)
    rig.arrive("b", 4, 9, n=2)
    rig.arrive("c", 4, 9)
    rig.finish()
    assert ran(rig) == {"a": 1, "a#1": 1, "a#2": 1}, "two of b do not fit, and c is behind it"


@pytest.mark.parametrize(
    ("model_len", "most", "chunked", "expected"),
    [
        (1024, 8192, False, 2048),
        (4096, 8192, False, 4096),
        (32768, 8192, False, 8192),
        (4096, 8192, True, 512),
    ],
)
def test_the_budget_unless_stated(model_len: int, most: int, chunked: bool, expected: int) -> None:
    limits = toy_limits(tokens=most, requests=1024, model_len=model_len)
    made = build(
        "vllm_v0", limits, max_num_batched_tokens=None, max_num_seqs=256, enable_chunked_prefill=chunked
    )
    assert made.max_num_batched_tokens == expected


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_num_batched_tokens": 65}, "scheduler.max_num_batched_tokens is 65"),
        ({"max_num_seqs": 17}, "scheduler.max_num_seqs is 17"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "scheduler.max_num_seqs is 9"),
    ],
)
def test_settings_that_no_step_could_follow_are_refused(settings: dict[str, int], what: str) -> None:
    error = raises_in(lambda: build("vllm_v0", toy_limits(), **settings))
    assert type(error) is ConfigError and error.what == what


def test_it_needs_a_cache_that_can_swap() -> None:
    spec = REGISTRY.spec("scheduler", "vllm_v0")
    assert "scheduler.swap" in spec.provides and spec.requires == {"kvcache.swap"}


def test_arrivals_of_the_same_moment_keep_their_order() -> None:
    items = [arrival(f"r{k}", 6, 12, cap=20) for k in range(6)]
    got = serve("vllm_v0", items, pages=17, limits=LIMITS, checks=CHECKS)
    assert got.preemptions("recompute") > 0

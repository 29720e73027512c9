"""Steps of ``transform``: each by hand or by a closed form, and what holds of all."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tests.workloads.test_mix import LOOP, OPEN, made, played

from servelab.core.api import SLO, Arrival, Cancel, RequestSpec, Truth, WorkloadError
from servelab.core.sampling import SamplingParams
from servelab.plugins.workloads._describe import cv
from servelab.plugins.workloads._ids import DrawnIds
from servelab.plugins.workloads._steps import Chance, Step

NS = 1_000_000_000
ADAPTER: TypeAdapter[Any] = TypeAdapter(Step)
BURSTY = {**OPEN, "num_requests": 5000, "process": "gamma", "burstiness": 0.25, "request_rate": 10}


def transform(of: Any, *steps: Any, **more: Any) -> Any:
    return made("transform", of=of, steps=list(steps), **more)


def sent(of: Any, *steps: Any, **more: Any) -> list[Arrival]:
    return [x for x in transform(of, *steps, **more).arrivals() if isinstance(x, Arrival)]


def original(of: Any) -> list[Arrival]:
    return sent(of)


def asked(
    id: str = "r0", prompt: int = 100, out: int = 50, cap: int = 70, at: int = 0, **more: Any
) -> Arrival:
    spec = RequestSpec(id=id, prompt_tokens=prompt, max_new_tokens=cap, **more)
    further = tuple(out + k for k in range(1, spec.n))
    return Arrival(at, spec, Truth(out, further))


def step(items: list[Any], **what: Any) -> list[Any]:
    """One step on given items."""
    chance = Chance("here")
    return list(ADAPTER.validate_python(what).apply(iter(items), chance))


# ---------------------------------------------------------------------- the whole


def test_without_steps_it_is_the_other_workload() -> None:
    """Also with the same chance: what is transformed can be compared with what is not."""
    assert original(OPEN) == list(made("synthetic", **_rest(OPEN)).arrivals())
    assert played(transform(LOOP)) == played(made("closed_loop", **_rest(LOOP)))


def _rest(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}


def test_same_seed_same_bytes_and_each_step_has_its_own_chance() -> None:
    steps = [
        {"step": "thin", "keep": 0.5},
        {"step": "outputs", "length": {"law": "uniform", "min": 1, "max": 99}},
    ]
    workload = transform(BURSTY, *steps)
    first = pickle.dumps(list(workload.arrivals()))
    assert (
        first
        == pickle.dumps(list(workload.arrivals()))
        == pickle.dumps(list(transform(BURSTY, *steps).arrivals()))
    )
    assert first != pickle.dumps(list(transform(BURSTY, *steps, seed=1).arrivals()))
    once, twice = sent(BURSTY, steps[0]), sent(BURSTY, steps[0], steps[0])
    assert len(once) / 5000 == pytest.approx(0.5, abs=0.03)
    assert len(twice) / len(once) == pytest.approx(0.5, abs=0.04), "the second step draws anew"


def test_steps_go_in_the_order_stated() -> None:
    clip, quantise = {"step": "clip", "prompt": 40}, {"step": "quantise", "by": 4}
    even = {**OPEN, "prompt_length": 100}
    assert {x.spec.prompt_tokens for x in sent(even, clip, quantise)} == {10}
    assert {x.spec.prompt_tokens for x in sent(even, quantise, clip)} == {25}


def test_reactions_are_changed_as_arrivals_are() -> None:
    steps = [
        {"step": "quantise", "by": 3},
        {"step": "outputs", "length": {"law": "uniform", "min": 1, "max": 99}},
        {"step": "label", "tenant": "t"},
    ]
    found = played(transform(LOOP, *steps))
    plain = played(transform(LOOP))
    assert len(found) == 30 and {x.spec.tenant for x in found} == {"t"}
    assert [x.spec.prompt_tokens for x in found] == [-(-x.spec.prompt_tokens // 3) for x in plain]
    assert len({x.truth.output_tokens for x in found if x.truth}) > 15


@pytest.mark.parametrize(
    "moving",
    [
        {"step": "scale", "by": 2},
        {"step": "thin", "keep": 1},
        {"step": "slice", "first": 9},
        {"step": "retime", "rate": 1},
        {"step": "modulate", "profile": [1]},
    ],
)
def test_clients_that_wait_are_not_moved(moving: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError, match="'closed_loop' waits for its answers"):
        played(transform(LOOP, moving))


def test_description_is_of_what_comes_out() -> None:
    workload = transform(BURSTY, {"step": "thin", "keep": 0.2}, {"step": "clip", "output": 30})
    described = workload.describe()
    json.dumps(described, allow_nan=False)
    found = list(workload.arrivals())
    assert described["requests"] == len(found) < described["of"]["requests"] == 5000
    assert described["output_tokens"]["max"] == 30
    assert described["steps"][0] == {"step": "thin", "keep": 0.2, "others": False}
    assert described["classes"] == [{"name": "online", "tenant": "default", "requests": len(found)}]
    assert described["settings"]["steps"][1]["step"] == "clip"


def test_nothing_left_is_told() -> None:
    with pytest.raises(WorkloadError, match="no request is left"):
        transform(OPEN, {"step": "slice", "from_s": 1000}).describe()


# ------------------------------------------------------------------------- times


def test_scaling_divides_times_and_keeps_the_cv() -> None:
    before, after = original(BURSTY), sent(BURSTY, {"step": "scale", "by": 4})
    assert [x.time_ns for x in after] == [round(x.time_ns / 4) for x in before]
    assert [x.spec for x in after] == [x.spec for x in before]
    assert cv_of(after) == pytest.approx(cv_of(before), rel=1e-3)


def cv_of(items: list[Arrival]) -> float:
    found = cv([b.time_ns - a.time_ns for a, b in pairwise(items)])
    assert found is not None
    return found


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_thinned_and_complement_are_the_original(keep: float) -> None:
    part = sent(BURSTY, {"step": "thin", "keep": keep})
    rest = sent(BURSTY, {"step": "thin", "keep": keep, "others": True})
    assert sorted(part + rest, key=lambda x: int(x.spec.id[1:])) == original(BURSTY)
    assert len(part) == pytest.approx(5000 * keep, abs=3 * math.sqrt(5000 * keep * (1 - keep)))


def test_thinning_makes_bursts_smaller_and_scaling_does_not() -> None:
    """CV of the gaps of a thinned renewal process: c'^2 = 1 + p (c^2 - 1)."""
    many = {**BURSTY, "num_requests": 30_000}
    thinned = cv_of(sent(many, {"step": "thin", "keep": 0.25}))
    assert thinned == pytest.approx(math.sqrt(1 + 0.25 * (4 - 1)), rel=0.03)
    assert cv_of(original(many)) == pytest.approx(2, rel=0.03)


def test_programs_stay_or_go_as_a_whole() -> None:
    items = [asked(f"p{p}t{t}", at=10 * p + t, program=f"p{p}", turn=t) for p in range(200) for t in range(3)]
    kept = step(items, step="thin", keep=0.5)
    turns: dict[str, list[int]] = {}
    for x in kept:
        turns.setdefault(x.spec.program, []).append(x.spec.turn)
    assert 70 < len(turns) < 130 and set(map(tuple, turns.values())) == {(0, 1, 2)}


def test_cancellations_follow_their_requests() -> None:
    items: list[Any] = []
    for i in range(100):
        program = {"program": f"p{i // 2}", "turn": i % 2} if i < 50 else {}
        items += [asked(f"r{i}", at=10 * i, n=2, **program), Cancel(10 * i + 5, f"r{i}#1")]
    for what in ({"step": "thin", "keep": 0.4}, {"step": "slice", "from_s": 1e-7, "first": 30}):
        kept = step(items, **what)
        ids = [x.spec.id for x in kept if isinstance(x, Arrival)]
        gone = [x.request_id for x in kept if isinstance(x, Cancel)]
        assert gone == [f"{id}#1" for id in ids] and ids
    for x, y in zip(items, step(items, step="scale", by=0.5), strict=True):
        assert y.time_ns == 2 * x.time_ns


def test_slices_begin_at_zero() -> None:
    items = [asked(f"r{i}", at=i * NS) for i in range(10)]
    found = step(items, step="slice", from_s=2.5, until_s=6)
    assert [(x.spec.id, x.time_ns) for x in found] == [
        ("r3", NS // 2),
        ("r4", 3 * NS // 2),
        ("r5", 5 * NS // 2),
    ]
    assert [x.spec.id for x in step(items, step="slice", first=2)] == ["r0", "r1"]
    assert [x.spec.id for x in step(items, step="slice", from_s=8)] == ["r8", "r9"]


def test_a_slice_has_no_turn_without_those_before_it() -> None:
    items = [asked(f"{p}{t}", at=t, program=p, turn=t) for t in range(4) for p in ("a", "b")]
    late = [asked(f"c{t}", at=4 + t, program="c", turn=t) for t in range(3)]
    assert [x.spec.id for x in step(items + late, step="slice", from_s=1e-9)] == ["c0", "c1", "c2"]
    assert [x.spec.id for x in step(items + late, step="slice", first=3)] == ["a0", "b0", "a1"]


def test_a_slice_stops_reading() -> None:
    def endless() -> Iterator[Arrival]:
        i = 0
        while True:
            assert i < 10, "it reads on"
            yield asked(f"r{i}", at=i * NS)
            i += 1

    made_step = ADAPTER.validate_python({"step": "slice", "until_s": 3})
    assert [x.spec.id for x in made_step.apply(endless(), Chance("k"))] == ["r0", "r1", "r2"]
    made_step = ADAPTER.validate_python({"step": "slice", "first": 3})
    assert len(list(made_step.apply(endless(), Chance("k")))) == 3


def gaps(process: str, shape: float) -> float:
    """CV of a law of gaps."""
    if process == "weibull":
        first, second = math.gamma(1 + 1 / shape), math.gamma(1 + 2 / shape)
        return math.sqrt(second / first**2 - 1)
    return {"poisson": 1.0, "constant": 0.0, "gamma": 1 / math.sqrt(shape)}[process]


@pytest.mark.parametrize(
    ("process", "shape"),
    [("poisson", 1), ("gamma", 0.25), ("gamma", 4), ("weibull", 0.7), ("weibull", 2), ("constant", 1)],
)
def test_new_times_have_the_rate_and_the_cv_of_their_law(process: str, shape: float) -> None:
    n, one = 100_000, asked()
    items = (one for _ in range(n))
    made_step = ADAPTER.validate_python({"step": "retime", "rate": 5, "process": process, "shape": shape})
    found = list(made_step.apply(items, Chance("k")))
    spread = gaps(process, shape)
    assert found[-1].time_ns / NS == pytest.approx(n / 5, abs=3 * spread * math.sqrt(n) / 5 + 1e-6)
    assert cv_of(found) == pytest.approx(spread, rel=0.03, abs=1e-6)


def test_new_times_have_no_place_for_cancellations() -> None:
    with pytest.raises(WorkloadError, match="request r0 is cancelled"):
        step([asked(), Cancel(3, "r0")], step="retime", rate=1)


def test_a_day_has_its_profile() -> None:
    """Even traffic of 1000/s over 3 days of 4 s: seconds weigh 1, 3, 5 and 1, order and number stay."""
    items = [asked(f"r{i}", at=i * NS // 1000) for i in range(12_000)]
    found = step(items, step="modulate", period_s=4, profile=[1, 3, 5, 1])
    times = [x.time_ns for x in found]
    assert times == sorted(times) and len(times) == 12_000
    seconds = [sum(second * NS <= t < (second + 1) * NS for t in times) for second in range(12)]
    assert seconds == pytest.approx([400, 1200, 2000, 400] * 3, abs=2)
    flat = step(items, step="modulate", period_s=4, profile=[2, 2, 2])
    assert all(abs(x.time_ns - y.time_ns) <= 1 for x, y in zip(flat, items, strict=True))


@settings(max_examples=50)
@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=24),
    st.floats(0.01, 1e5),
    st.lists(st.integers(0, 10**15), min_size=2, max_size=30),
)
def test_time_never_goes_back(profile: list[float], period: float, times: list[int]) -> None:
    warp = ADAPTER.validate_python({"step": "modulate", "period_s": period, "profile": profile}).warp()
    moved = [warp(t) for t in sorted(times)]
    assert moved == sorted(moved) and moved[0] >= 0


# ----------------------------------------------------------------- lengths, labels


def test_lengths_are_cut() -> None:
    (found,) = step([asked(prompt=100, out=50, cap=70, n=2)], step="clip", prompt=30, output=50, cap=60)
    assert (found.spec.prompt_tokens, found.spec.max_new_tokens) == (30, 60)
    assert found.truth == Truth(50, (50,))
    untouched = asked()
    assert step([untouched], step="clip", prompt=100, output=50, cap=70) == [untouched]
    assert step([untouched], step="clip") == [untouched]


def test_a_total_is_fitted() -> None:
    """The prompt to three quarters, then the output to the rest; the cap says nothing of a true length."""
    cut, short, capped = step(
        [asked(prompt=100, out=50), asked(prompt=60, out=50), asked(prompt=79, out=900, cap=1)],
        step="fit",
        total=80,
    )
    assert (cut.spec.prompt_tokens, cut.truth.output_tokens, cut.spec.max_new_tokens) == (60, 20, 70)
    assert (short.spec.prompt_tokens, short.truth.output_tokens) == (60, 20)
    assert (capped.spec.prompt_tokens, capped.truth.output_tokens) == (79, 900)
    (untold,) = step([Arrival(0, asked(prompt=100, cap=70).spec)], step="fit", total=80)
    assert (untold.spec.prompt_tokens, untold.spec.max_new_tokens) == (60, 20)


def test_lengths_are_divided_and_rounded_up() -> None:
    (found,) = step([asked(prompt=101, out=50, cap=1, n=2)], step="quantise", by=50)
    assert (found.spec.prompt_tokens, found.spec.max_new_tokens, found.truth) == (3, 1, Truth(1, (2,)))


def test_outputs_of_a_law_depend_on_the_request_only() -> None:
    law = {"law": "uniform", "min": 1, "max": 1000}
    items = [asked(f"r{i}", n=2) for i in range(2000)]
    found = step(items, step="outputs", length=law)
    assert step(items[::-1], step="outputs", length=law) == found[::-1]
    drawn = [n for x in found for n in (x.truth.output_tokens, *x.truth.further)]
    assert sum(drawn) / len(drawn) == pytest.approx(500.5, rel=0.03)
    assert [x.spec for x in found] == [x.spec for x in items]
    assert step([Arrival(0, asked().spec)], step="outputs", length=3)[0].truth is None


def test_caps_of_a_law() -> None:
    (found,) = step([asked(sampling=SamplingParams(max_tokens=70))], step="caps", length=9)
    assert found.spec.max_new_tokens == found.spec.sampling.max_tokens == 9
    assert found.truth == Truth(50)


def test_labels() -> None:
    (found,) = step([asked(priority=3)], step="label", request_class="c", e2el_ms=2)
    assert (found.spec.request_class, found.spec.priority, found.spec.tenant) == ("c", 3, "default")
    assert found.spec.slo == SLO(e2el_ns=2_000_000)


def test_cut_prompts_keep_the_beginning_of_their_ids() -> None:
    drawn = DrawnIds("key", 100, 97)
    whole = list(drawn)
    (lazy,) = step([asked(prompt_ids=DrawnIds("key", 100, 97), context_tokens=90)], step="clip", prompt=30)
    assert list(lazy.spec.prompt_ids) == whole[:30] and lazy.spec.context_tokens == 30
    (plain,) = step([asked(prompt_ids=tuple(range(100)))], step="clip", prompt=30)
    assert plain.spec.prompt_ids == tuple(range(30))


def test_prompts_with_hashes_are_not_cut() -> None:
    hashed = asked(features={"block_hashes": (1, 2), "block_tokens": 64})
    assert step([hashed], step="clip", prompt=100) == [hashed]
    with pytest.raises(WorkloadError, match="cannot be cut to 99 tokens"):
        step([hashed], step="clip", prompt=99)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"step": "retime", "rate": 1, "shape": 2}, "shape=2 has no effect on process 'poisson'"),
        ({"step": "slice", "from_s": 3, "until_s": 3}, "until_s=3 is not after from_s=3"),
        ({"step": "modulate", "profile": []}, "at least 1"),
        ({"step": "modulate", "profile": [0, 1]}, "greater than 0"),
        ({"step": "fit", "total": 1}, "greater than or equal to 2"),
        ({"step": "thin", "keep": 0}, "greater than 0"),
        ({"step": "shrink"}, "does not match any of the expected tags"),
    ],
)
def test_refused_settings(what: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ADAPTER.validate_python(what)

"""The synthetic workload as a run sees it."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations, islice, pairwise
from typing import Any

import pytest
from pydantic import ValidationError

from servelab.core.api import SLO, Arrival, Cancel, Context, Workload, WorkloadError
from servelab.core.records import RequestFinished
from servelab.plugins.workloads import _describe
from servelab.plugins.workloads import synthetic as module
from servelab.plugins.workloads._arrivals import RampUp
from servelab.plugins.workloads._requests import RequestClass
from servelab.plugins.workloads.synthetic import Synthetic, SyntheticConfig

Build = Callable[..., Synthetic]
NS = 1_000_000_000

UNIFORM = {"law": "uniform", "min": 1, "max": 200}
VARIED: dict[str, Any] = {
    "num_requests": 200,
    "max_new_tokens": UNIFORM,
    "classes": [{"name": "latency", "ttft_ms": 200}, {"name": "offline", "weight": 2}],
    "cancel_fraction": 0.3,
}


def requests(workload: Workload) -> list[Arrival]:
    return [item for item in workload.arrivals() if isinstance(item, Arrival)]


def cancels(workload: Workload) -> list[Cancel]:
    return [item for item in workload.arrivals() if isinstance(item, Cancel)]


def truths(workload: Workload) -> list[int]:
    return [a.truth.output_tokens for a in requests(workload) if a.truth is not None]


# --- reproducibility ---------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_twice_the_same(build: Build) -> None:
    first, second = build(seed=3, **VARIED), build(seed=3, **VARIED)
    items = list(first.arrivals())
    assert pickle.dumps(items) == pickle.dumps(list(first.arrivals()))
    assert pickle.dumps(items) == pickle.dumps(list(second.arrivals()))
    assert first.describe() == second.describe()


def test_two_readers_do_not_disturb_each_other(build: Build) -> None:
    workload = build(**VARIED)
    left, right = workload.arrivals(), workload.arrivals()
    assert all(a == b for a, b in zip(left, right, strict=True))


def test_another_seed_differs(build: Build) -> None:
    a, b = requests(build(seed=3, num_requests=8)), requests(build(seed=4, num_requests=8))
    assert [x.time_ns for x in a] != [x.time_ns for x in b]
    assert [x.spec.prompt_tokens for x in a] != [x.spec.prompt_tokens for x in b]
    assert [x.truth for x in a] != [x.truth for x in b]
    assert [x.spec.prompt_ids for x in a] != [x.spec.prompt_ids for x in b]


def test_the_same_in_every_process() -> None:
    """String hashing differs between processes; nothing here may depend on it."""
    program = """
import hashlib
from servelab.core.api import Context, Limits, ModelFacts
from servelab.core.context import seeded
from servelab.plugins.workloads._requests import RequestClass
from servelab.plugins.workloads.synthetic import Synthetic, SyntheticConfig
model = ModelFacts(name="t", layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8, ffn=8, vocab=259,
                   max_position=4096)
limits = Limits(max_batch_tokens=512, max_batch_requests=8, max_model_len=4096)
ctx = Context(kind="workload", name="synthetic", rng=seeded(0, "workload", "synthetic"), model=model,
              hardware=None, limits=limits)
config = SyntheticConfig(classes=[{"name": "a"}, {"name": "b"}], cancel_fraction=0.5)
print(hashlib.sha256(repr(list(Synthetic(config, ctx).arrivals())).encode()).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_only_the_given_generator_is_used(build: Build) -> None:
    before = random.getstate()
    list(build(**VARIED).arrivals())
    assert random.getstate() == before


LAWS: dict[str, tuple[dict[str, Any], str]] = {
    "output": ({"output_length": UNIFORM}, "truth"),
    "cap": ({"max_new_tokens": 700}, "cap"),
    "prompt": ({"prompt_length": UNIFORM}, "prompt"),
    "arrival": ({"process": "gamma", "burstiness": 0.25, "normalize_arrivals": False}, "time"),
    "class": ({"classes": [{"name": "latency"}, {"name": "offline", "weight": 9}]}, "class"),
    "cancel": ({"cancel_fraction": 0.9}, "cancelled"),
    "patience": ({"patience_ms": UNIFORM}, "patience"),
}


def columns(workload: Workload) -> dict[str, list[Any]]:
    arrivals = requests(workload)
    at = {a.spec.id: a.time_ns for a in arrivals}
    gone = sorted(cancels(workload), key=lambda c: int(c.request_id[1:]))
    return {
        "time": [a.time_ns for a in arrivals],
        "prompt": [a.spec.prompt_tokens for a in arrivals],
        "truth": [a.truth for a in arrivals],
        "cap": [a.spec.max_new_tokens for a in arrivals],
        "class": [a.spec.request_class for a in arrivals],
        "cancelled": [c.request_id for c in gone],
        "patience": [c.time_ns - at[c.request_id] for c in gone],
    }


@pytest.mark.parametrize("changed", LAWS)
def test_each_quantity_has_a_stream_of_its_own(build: Build, changed: str) -> None:
    """Changing one law changes that quantity and nothing else."""
    settings, column = LAWS[changed]
    before, after = columns(build(**VARIED)), columns(build(**{**VARIED, **settings}))
    if changed == "cancel":  # those who gave up before still do, after the same wait
        old = dict(zip(before.pop("cancelled"), before.pop("patience"), strict=True))
        new = dict(zip(after.pop("cancelled"), after.pop("patience"), strict=True))
        assert old.items() < new.items()
        wanted = set()
    else:
        wanted = {column}
    assert {name for name in before if before[name] != after[name]} == wanted


def test_more_requests_extend_an_unscaled_run(build: Build) -> None:
    short = requests(build(num_requests=50, normalize_arrivals=False))
    assert requests(build(num_requests=80, normalize_arrivals=False))[:50] == short


# --- the truth stays hidden --------------------------------------------------------------------------------


def test_no_truth_in_the_spec(build: Build) -> None:
    canary = 7919
    settings = {"num_requests": 64, "max_new_tokens": 16_000, "max_model_len": 20_000}
    marked, other = build(output_length=canary, **settings), build(output_length=3, **settings)
    assert truths(marked) == [canary] * 64
    assert [a.spec for a in requests(marked)] == [a.spec for a in requests(other)]
    assert not any(str(canary) in repr(a.spec) for a in requests(marked))


def test_lengths_caps_and_patience_are_independent(build: Build) -> None:
    n = 20_000
    workload = build(
        num_requests=n,
        with_prompt_ids=False,
        prompt_length=UNIFORM,
        output_length=UNIFORM,
        max_new_tokens=UNIFORM,
        cancel_fraction=1,
        patience_ms=UNIFORM,
    )
    drawn = columns(workload)
    series = [drawn["prompt"], [t.output_tokens for t in drawn["truth"]], drawn["cap"], drawn["patience"]]
    for x, y in combinations(series, 2):
        mx, my = sum(x) / n, sum(y) / n
        covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        norm = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
        assert abs(covariance / norm) < 3 / math.sqrt(n)


def test_capped_outputs_are_counted(build: Build) -> None:
    workload = build(num_requests=500, output_length=UNIFORM, max_new_tokens=UNIFORM)
    capped = sum(a.truth.output_tokens > a.spec.max_new_tokens for a in requests(workload) if a.truth)
    assert 150 < capped < 350
    assert workload.describe()["length_capped"] == capped
    assert build(output_length=64, max_new_tokens=64).describe()["length_capped"] == 0


# --- arrivals ----------------------------------------------------------------------------------------------


def test_defaults_fit_a_small_model(build: Build) -> None:
    workload = build()
    arrivals = requests(workload)
    assert [a.spec.id for a in arrivals] == [f"r{i}" for i in range(64)]
    assert arrivals[-1].time_ns == 8 * NS
    for a in arrivals:
        assert 16 <= a.spec.prompt_tokens <= 1024
        assert a.spec.max_new_tokens == 1024
        assert a.truth is not None and 1 <= a.truth.output_tokens <= 512
        assert (a.spec.request_class, a.spec.tenant, a.spec.priority, a.spec.slo) == (
            "online",
            "default",
            0,
            None,
        )
        assert a.spec.is_last_turn and a.spec.program is None
    assert cancels(workload) == []


def test_poisson_is_gamma_of_shape_one(build: Build) -> None:
    poisson, gamma = build(process="poisson"), build(process="gamma", burstiness=1)
    assert list(poisson.arrivals()) == list(gamma.arrivals())


def test_constant_is_gamma_of_infinite_shape(build: Build) -> None:
    even = requests(build(process="constant", request_rate=4))
    assert [a.time_ns for a in even] == [i * NS // 4 for i in range(1, 65)]
    assert even == requests(build(process="gamma", burstiness=math.inf, request_rate=4))


def test_the_word_inf_is_a_rate(build: Build) -> None:
    assert {a.time_ns for a in requests(build(request_rate="inf"))} == {0}


def test_ramp_up_replaces_the_rate(build: Build) -> None:
    ramp = {"strategy": "linear", "start_rate": 1, "end_rate": 3}
    workload = build(num_requests=3, process="constant", request_rate="inf", ramp_up=ramp)
    assert [a.time_ns for a in requests(workload)] == pytest.approx([NS, 1.5 * NS, NS * 11 / 6], abs=1)


def test_nothing_follows_a_completion(build: Build) -> None:
    done = RequestFinished(t_ns=1, request="r0", outcome="completed", reason="stop", output_tokens=1)
    assert list(build().react(done)) == []


def test_requests_are_made_when_asked_for(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = module.uniform_ids

    def spy(n: int, vocab: int, rng: random.Random) -> tuple[int, ...]:
        made.append(n)
        return real(n, vocab, rng)

    monkeypatch.setattr(module, "uniform_ids", spy)
    workload = build(num_requests=1000, prefix_tokens=5)
    assert made == []
    two = [item.spec.prompt_tokens for item in islice(workload.arrivals(), 2) if isinstance(item, Arrival)]
    assert made == [5, two[0] - 5, two[1] - 5]


# --- token ids ---------------------------------------------------------------------------------------------


def test_prompt_ids_have_the_length_and_range(build: Build) -> None:
    seen: Counter[int] = Counter()
    for a in requests(build(num_requests=300)):
        assert a.spec.prompt_ids is not None and len(a.spec.prompt_ids) == a.spec.prompt_tokens
        seen.update(a.spec.prompt_ids)
    assert set(seen) == set(range(259))
    mean = seen.total() / 259
    chi_square = sum((count - mean) ** 2 / mean for count in seen.values())
    assert abs(chi_square - 258) < 3 * math.sqrt(2 * 258)


def test_without_prompt_ids_only_the_ids_go(build: Build) -> None:
    with_ids, without = requests(build()), requests(build(with_prompt_ids=False))
    assert all(a.spec.prompt_ids is None for a in without)
    assert [a.spec.prompt_tokens for a in without] == [a.spec.prompt_tokens for a in with_ids]


def test_a_shared_prefix_is_shared_and_comes_on_top(build: Build) -> None:
    plain, shared = requests(build()), requests(build(prefix_tokens=48))
    heads = {tuple(a.spec.prompt_ids or ())[:48] for a in shared}
    tails = {tuple(a.spec.prompt_ids or ())[48:64] for a in shared}
    assert len(heads) == 1 and len(tails) == 64
    assert [a.spec.prompt_tokens - 48 for a in shared] == [a.spec.prompt_tokens for a in plain]
    described = build(prefix_tokens=48).describe()
    assert described["shared_prefix_share"] == pytest.approx(48 * 63 / described["prompt_tokens"]["total"])


# --- classes and cancellations -----------------------------------------------------------------------------


def test_classes_carry_their_bounds_and_shares(build: Build) -> None:
    n = 10_000
    classes = [
        {"name": "latency", "weight": 1, "tenant": "a", "priority": 5, "ttft_ms": 200, "tpot_ms": 0.5},
        {"name": "deadline", "weight": 3, "tenant": "b", "e2el_ms": 30_000},
        {"name": "offline", "weight": 6},
    ]
    workload = build(num_requests=n, with_prompt_ids=False, classes=classes)
    by_class = {a.spec.request_class: a.spec for a in requests(workload)}
    latency, deadline, offline = (by_class[name] for name in ("latency", "deadline", "offline"))
    assert (latency.tenant, latency.priority) == ("a", 5)
    assert latency.slo == SLO(ttft_ns=200_000_000, tpot_ns=500_000)
    assert deadline.slo == SLO(e2el_ns=30 * NS)
    assert (offline.tenant, offline.priority, offline.slo) == ("default", 0, None)
    counts = Counter(a.spec.request_class for a in requests(workload))
    for name, share in (("latency", 0.1), ("deadline", 0.3), ("offline", 0.6)):
        assert counts[name] == pytest.approx(share * n, abs=3 * math.sqrt(share * (1 - share) * n))
    assert {c["name"]: c["requests"] for c in workload.describe()["classes"]} == counts


def test_cancellations_follow_their_requests_in_time_order(build: Build) -> None:
    patience = {"law": "uniform", "min": 1, "max": 5000}
    workload = build(num_requests=2000, with_prompt_ids=False, cancel_fraction=0.25, patience_ms=patience)
    items = list(workload.arrivals())
    assert all(a.time_ns <= b.time_ns for a, b in pairwise(items))
    arrived: dict[str, int] = {}
    cancelled: list[str] = []
    for item in items:
        if isinstance(item, Arrival):
            arrived[item.spec.id] = item.time_ns
        else:
            waited = item.time_ns - arrived[item.request_id]  # KeyError: cancelled before it arrived
            assert 1_000_000 <= waited <= 5 * NS and waited % 1_000_000 == 0
            cancelled.append(item.request_id)
    assert len(set(cancelled)) == len(cancelled)
    assert len(cancelled) == pytest.approx(500, abs=3 * math.sqrt(2000 * 0.25 * 0.75))
    described = workload.describe()
    assert described["cancellations"] == len(cancelled)
    assert described["patience_ms"]["min"] >= 1


def test_everyone_or_no_one_cancels_at_the_extremes(build: Build) -> None:
    assert len(cancels(build(cancel_fraction=1))) == 64
    assert cancels(build(cancel_fraction=0)) == []


def test_a_cancellation_goes_before_an_arrival_of_the_same_time(build: Build) -> None:
    workload = build(
        num_requests=2,
        process="constant",
        request_rate=1000,
        cancel_fraction=1,
        patience_ms=1,
        with_prompt_ids=False,
    )
    order = [
        (i.time_ns, i.spec.id if isinstance(i, Arrival) else f"-{i.request_id}") for i in workload.arrivals()
    ]
    assert order == [(1_000_000, "r0"), (2_000_000, "-r0"), (2_000_000, "r1"), (3_000_000, "-r1")]


# --- describe ----------------------------------------------------------------------------------------------


def test_describe_counts_what_arrives(build: Build) -> None:
    workload = build(num_requests=2000, request_rate=7.3, process="gamma", burstiness=0.5)
    described = workload.describe()
    arrivals = requests(workload)
    assert described["requests"] == 2000
    assert described["realised_rate"] == pytest.approx(7.3, rel=1e-9)
    assert described["duration_s"] == arrivals[-1].time_ns / NS
    assert described["prompt_tokens"]["total"] == sum(a.spec.prompt_tokens for a in arrivals)
    assert described["output_tokens"]["mean"] == sum(truths(workload)) / 2000
    assert described["max_new_tokens"]["cv"] == 0
    assert described["iat_cv"] == pytest.approx(math.sqrt(2), rel=0.1)
    assert described["iat_cv_60s"]["windows"] == 5
    assert described["iat_cv_60s"]["p50"] == pytest.approx(math.sqrt(2), rel=0.2)
    series = described["rate_series"]
    assert series["window_s"] == 60
    whole = sum(rate * 60 for rate in series["requests_per_s"][:-1])
    last_s = described["duration_s"] - 60 * (len(series["requests_per_s"]) - 1)
    assert whole + series["requests_per_s"][-1] * last_s == pytest.approx(2000)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_requests": 1},
        {"request_rate": "inf"},
        {"process": "gamma", "burstiness": "inf"},
        {"request_rate": "inf", "ramp_up": {"strategy": "linear", "start_rate": 1, "end_rate": 2}},
        VARIED,
    ],
)
def test_describe_is_json_and_gives_back_the_settings(build: Build, settings: dict[str, Any]) -> None:
    text = json.dumps(build(**settings).describe(), allow_nan=False)
    assert SyntheticConfig.model_validate(json.loads(text)["settings"]) == SyntheticConfig.model_validate(
        settings
    )


def test_describe_without_duration_says_so(build: Build) -> None:
    described = build(request_rate="inf").describe()
    assert (described["realised_rate"], described["iat_cv"]) == (None, None)
    assert described["rate_series"]["requests_per_s"] == []


def test_percentiles_interpolate_as_vllm_does() -> None:
    assert _describe.percentile([1, 2, 3, 4], 50) == 2.5
    assert _describe.percentile([5], 99) == 5
    assert _describe.statistics([1, 2, 3, 4]) == {
        "mean": 2.5,
        "cv": pytest.approx(math.sqrt(1.25) / 2.5),
        "min": 1,
        "p10": pytest.approx(1.3),
        "p50": 2.5,
        "p90": pytest.approx(3.7),
        "p99": pytest.approx(3.97),
        "max": 4,
        "total": 10,
    }


def test_window_statistics_of_a_known_series() -> None:
    """Eleven even arrivals in the first minute, eleven in the third, none between."""
    burst = [5 * i * NS for i in range(11)]
    times = burst + [t + 120 * NS for t in burst]
    assert _describe.windowed_iat_cv(times) == {"windows": 2, "p50": 0, "p90": 0}
    assert _describe.windowed_iat_cv(burst[:10])["windows"] == 0
    assert _describe.rate_series(times) == {
        "window_s": 60,
        "requests_per_s": [11 / 60, 1 / 60, 10 / 50],  # an arrival on an edge belongs to the window it ends
    }


def test_a_long_run_gets_wider_windows_not_a_long_series() -> None:
    series = _describe.rate_series([i * 60 * NS for i in range(1, 1001)])
    assert series["window_s"] == 540
    assert len(series["requests_per_s"]) == math.ceil(1000 / 9)


# --- refusals ----------------------------------------------------------------------------------------------


def test_a_request_beyond_the_model_names_everything(build: Build) -> None:
    with pytest.raises(WorkloadError) as caught:
        build(num_requests=3, prompt_length=200, output_length=100, max_model_len=256)
    error = caught.value
    assert error.what == "request r0 is longer than the model allows"
    assert "workload 'synthetic'" in error.where
    assert "prompt_length constant(value=200)" in error.where
    assert "prompt of 200 tokens plus 100 of output is 300, limit 256 (max_model_len)" in error.why
    assert "lower them to 256" in error.do
    assert "raise engine.max_model_len (the model allows 4096)" in error.do
    with pytest.raises(WorkloadError) as caught:
        build(num_requests=3, prompt_length=4000, output_length=100)
    assert caught.value.do.endswith("or choose a model with a longer context")


def test_the_length_that_counts_includes_the_prefix_and_stops_at_the_cap(build: Build) -> None:
    fits = {"prompt_length": 200, "output_length": 56, "max_model_len": 256}
    assert len(requests(build(**fits))) == 64
    with pytest.raises(WorkloadError, match="201 tokens with 1 of prefix_tokens plus 56 of output is 257"):
        build(prefix_tokens=1, **fits)
    either = {"law": "empirical", "values": [1, 300]}
    with pytest.raises(WorkloadError, match="200 tokens plus 300 of output is 500"):
        build(**{**fits, "output_length": either})
    cut = build(**{**fits, "output_length": either, "max_new_tokens": 56})
    assert set(truths(cut)) == {1, 300}


def test_the_first_offender_is_named(build: Build) -> None:
    lengths = [a.spec.prompt_tokens for a in requests(build(output_length=1))]
    limit = max(lengths)
    first = next(i for i, length in enumerate(lengths) if length + 1 > limit)
    with pytest.raises(WorkloadError, match=f"request r{first} is longer"):
        build(output_length=1, max_model_len=limit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"burstiness": 0.5}, "set process to 'gamma'"),
        ({"process": "constant", "burstiness": 2}, "has no effect on process 'constant'"),
        (
            {"ramp_up": {"strategy": "linear", "start_rate": 1, "end_rate": 2}},
            "set request_rate to inf, or remove ramp_up",
        ),
        ({"with_prompt_ids": False, "prefix_tokens": 8}, "set with_prompt_ids to true"),
        (
            {"max_new_tokens": 9, "output_length": {"law": "uniform", "min": 10, "max": 20}},
            "every request would be cut",
        ),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "class 'a' of tenant 'default' is listed 2 times"),
        ({"request_rate": 0}, "greater than or equal to 0.001"),
        ({"request_rate": math.nan}, "greater than or equal to 0.001"),
        ({"process": "gamma", "burstiness": 0}, "greater than or equal to 0.001"),
        ({"num_requests": 0}, "greater than or equal to 1"),
        ({"cancel_fraction": 1.5}, "less than or equal to 1"),
        ({"classes": [{"name": "a", "ttft_ms": 0}]}, "greater than 0"),
        ({"request_rat": 3}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused_with_what_to_change(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SyntheticConfig.model_validate(settings)
    assert message in str(caught.value)


def test_a_cap_that_sometimes_suffices_is_allowed(build: Build) -> None:
    workload = build(max_new_tokens=10, output_length={"law": "uniform", "min": 10, "max": 20})
    assert workload.describe()["length_capped"] > 0


def test_every_setting_is_documented_and_frozen() -> None:
    for model in (SyntheticConfig, RequestClass, RampUp):
        assert all(field.description for field in model.model_fields.values())
    config = SyntheticConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.num_requests = 3  # type: ignore[misc, unused-ignore]


def test_construction_reads_the_generator_once(context: Callable[..., Context]) -> None:
    """Later use of the plugin's generator cannot change what arrives."""
    ctx = context()
    workload = Synthetic(SyntheticConfig(num_requests=8), ctx)
    before = list(workload.arrivals())
    ctx.rng.random()
    assert list(workload.arrivals()) == before

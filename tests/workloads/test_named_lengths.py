"""Laws by name show the published figures; classes and phases have laws of their own."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from servelab.core.api import SLO, Arrival
from servelab.plugins.workloads._describe import percentile
from servelab.plugins.workloads._laws import Sampler
from servelab.plugins.workloads._named_lengths import NAMED
from servelab.plugins.workloads._requests import Kind, RequestClass, Requests
from servelab.plugins.workloads.synthetic import Synthetic, SyntheticConfig

Build = Callable[..., Synthetic]
GRID = 20_000
CONFIGS = Path(__file__).parents[2] / "configs" / "workload"


def kinds(name: str) -> list[Kind]:
    return Requests.model_validate({"lengths": name}).kinds()[0]


def grid(sample: Sampler, n: int) -> list[int]:
    return [sample((i + 0.5) / n) for i in range(n)]


def lengths(name: str) -> tuple[list[int], list[int]]:
    """Prompts and outputs of a name: samples without chance, in order."""
    parts = kinds(name)
    whole = sum(kind.request_class.weight for kind in parts)
    prompts, outputs = list[int](), list[int]()
    for kind in parts:
        n = round(GRID * kind.request_class.weight / whole)
        prompts += grid(kind.prompt.sampler(), n)
        outputs += grid(kind.output.sampler(), n)
    return sorted(prompts), sorted(outputs)


def mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("pastfuture_d1", (32 + 4096) / 2, (2048 + 4096) / 2),
        ("pastfuture_d2", 4000, 4000),
        ("pastfuture_d3", (2048 + 4096) / 2, (32 + 4096) / 2),
        ("sharegpt_o1_like", 381, 2160),
        ("sharegpt_like", 857, 652),
        ("lmsys_like", 61.7, 162.1),
        ("arxiv_like", 2588, 291),
        ("reasoning_like", 1596, None),
    ],
)
def test_published_means(name: str, prompt: float, output: float | None) -> None:
    prompts, outputs = lengths(name)
    assert mean(prompts) == pytest.approx(prompt, rel=0.02)
    if output is not None:
        assert mean(outputs) == pytest.approx(output, rel=0.02)


@pytest.mark.parametrize(
    ("name", "which", "published"),
    [
        ("sharegpt_o1_like", 0, {10: 17, 50: 209, 90: 839, 99: 2594}),
        ("sharegpt_o1_like", 1, {10: 663, 50: 1954, 90: 3872, 99: 6428}),
        ("sharegpt_like", 0, {50: 732, 90: 1460}),
        ("lmsys_like", 0, {50: 17, 90: 177}),
        ("lmsys_like", 1, {50: 117, 90: 389}),
        ("arxiv_like", 0, {10: 1242, 50: 2730, 90: 3702, 99: 3933}),
        ("arxiv_like", 1, {10: 78, 50: 167, 90: 372, 99: 3271}),
        ("sharegpt_sarathi_like", 0, {50: 1730, 90: 5696}),
        ("sharegpt_sarathi_like", 1, {50: 415, 90: 834}),
        ("arxiv_sarathi_like", 0, {50: 7059, 90: 12985}),
        ("arxiv_sarathi_like", 1, {50: 208, 90: 371}),
    ],
)
def test_published_percentiles(name: str, which: int, published: dict[int, float]) -> None:
    drawn = lengths(name)[which]
    found = {level: percentile(drawn, level) for level in published}
    assert found == pytest.approx(published, rel=0.03)


def test_past_future_sets_are_the_artifacts_ranges() -> None:
    ranges = {
        name: (kind.prompt.lowest, kind.prompt.highest, kind.output.lowest, kind.output.highest)
        for name in ("pastfuture_d1", "pastfuture_d2", "pastfuture_d3")
        for kind in kinds(name)
    }
    assert ranges == {
        "pastfuture_d1": (32, 4096, 2048, 4096),
        "pastfuture_d2": (3000, 5000, 3000, 5000),
        "pastfuture_d3": (2048, 4096, 32, 4096),
    }


def test_zipf_is_ordered_by_alpha_and_reaches_its_cap() -> None:
    """The percentiles of its generator, from 1e5 draws."""
    published = {
        "zipf_128": (35, 35, 206, 1711),
        "zipf_256": (15, 30, 503, 4642),
        "zipf_512": (6, 54, 1703, 5317),
        "zipf_1024": (5, 137, 3691, 6144),
    }
    tails = []
    for name, wanted in published.items():
        prompts, outputs = lengths(name)
        assert prompts == outputs
        assert [percentile(prompts, q) for q in (10, 50, 90, 99)] == pytest.approx(wanted, rel=0.06, abs=1)
        tails.append(prompts[-GRID // 100])
        target = int(name.removeprefix("zipf_"))
        assert mean(prompts) == pytest.approx(982 if target == 1024 else target, rel=0.02)
    assert tails == sorted(tails) and tails[-1] == 6144


def test_reasoning_has_a_heavy_right_tail_that_no_policy_sees() -> None:
    """Stragglers: P99 over P50; half of all tokens are in a small part of the requests."""
    _, outputs = lengths("reasoning_like")
    assert percentile(outputs, 99) / percentile(outputs, 50) > 8
    longest = outputs[-len(outputs) // 5 :]
    assert sum(longest) > sum(outputs) / 2
    assert outputs[-1] == 20480
    assert {
        (k.request_class.name, k.request_class.priority, k.request_class.slo())
        for k in kinds("reasoning_like")
    } == {("online", 0, None)}
    medians = [grid(kind.output.sampler(), 1001)[500] for kind in kinds("reasoning_like")]
    assert medians == [600, 1800, 5000]


def test_every_name_has_a_file_and_only_states_laws() -> None:
    for name, laws in NAMED.items():
        assert OmegaConf.load(CONFIGS / f"{name}.yaml") == {"name": "synthetic", "lengths": name}
        assert laws.keys() <= {"prompt_length", "output_length", "max_new_tokens", "classes"}
        for kind in kinds(name):
            assert kind.cap.lowest >= kind.output.highest, "no output of the set is cut by its cap"


@pytest.mark.parametrize(
    ("file", "columns", "name"),
    [
        (
            "sharegpt_lengths/arxiv_summarization_llama2_tokens.csv",
            ("num_prefill_tokens", "num_decode_tokens"),
            "arxiv_like",
        ),
        (
            "sharegpt_lengths/sharegpt_300_llama-3.1-8b.csv",
            ("input_tokens", "output_tokens"),
            "sharegpt_like",
        ),
        ("apex_traces/llama_lmsys_05.csv", ("input_tokens", "output_tokens"), "lmsys_like"),
    ],
)
def test_measured_laws_are_those_of_the_files(file: str, columns: tuple[str, str], name: str) -> None:
    data = os.environ.get("SERVELAB_DATA")
    if not data or not (Path(data) / file).exists():
        pytest.skip(f"SERVELAB_DATA names no folder with {file}")
    with (Path(data) / file).open() as lines:
        rows = list(csv.DictReader(lines))
    for column, drawn in zip(columns, lengths(name), strict=True):
        real = sorted(int(row[column]) for row in rows)
        assert mean(drawn) == pytest.approx(mean(real), rel=0.02)
        for level in (10, 50, 90, 99):
            assert percentile(drawn, level) == pytest.approx(percentile(real, level), rel=0.05, abs=1)


# ------------------------------------------------------------------ names in settings


def test_what_is_stated_comes_before_what_is_named(build: Build) -> None:
    config = SyntheticConfig.model_validate({"lengths": "pastfuture_d1", "output_length": 5})
    assert (config.prompt_length.highest, config.output_length.highest) == (4096, 5)


def test_settings_with_a_name_read_back_as_they_are() -> None:
    for name in NAMED:
        config = SyntheticConfig.model_validate({"lengths": name})
        dumped = json.loads(json.dumps(config.model_dump(mode="json")))
        assert SyntheticConfig.model_validate(dumped) == config
        assert dumped["max_new_tokens"]["law"] == "constant", (
            "the whole settings state what the name stands for"
        )
        assert config.model_dump(mode="json", exclude_defaults=True) == {"lengths": name}
    part = SyntheticConfig.model_validate({"lengths": "zipf_128", "max_new_tokens": 7000})
    assert part.model_dump(mode="json", exclude_defaults=True) == {
        "lengths": "zipf_128",
        "max_new_tokens": {"law": "constant", "value": 7000},
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": "pastfuture_d4"}, "no lengths are called 'pastfuture_d4'; did you mean 'pastfuture_d"),
        ({"lengths": "reasoning_like", "classes": [{"name": "a"}]}, "classes would replace it"),
        ({"classes": [{"name": "a", "lengths": "reasoning_like"}]}, "are a mixture of 3 parts"),
        ({"phases": [{"output_length": 3}]}, "a phase begins after"),
        ({"phases": [{"after": 3, "after_s": 3}]}, "a phase begins after"),
        ({"phases": [{"after": 3}, {"after_s": 3}]}, "some phases begin after requests"),
        ({"phases": [{"after": 3}, {"after": 3}]}, "phases must begin one after the other"),
        ({"phases": [{"after": 3, "max_new_tokens": 3, "output_length": 4}]}, "phases.0: every request"),
        ({"classes": [{"name": "a", "max_new_tokens": 3, "output_length": 4}]}, "every request would be cut"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "listed 2 times with equal laws"),
        (
            {"classes": [{"name": "a"}, {"name": "a", "output_length": 3, "priority": 1}]},
            "listed with different priorities or bounds",
        ),
    ],
)  # fmt: skip
def test_refused_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SyntheticConfig.model_validate(settings)


# ------------------------------------------------------------------ classes and phases


def drawn(workload: Synthetic) -> list[Arrival]:
    return [x for x in workload.arrivals() if isinstance(x, Arrival)]


def test_a_class_has_laws_of_its_own(build: Build) -> None:
    classes = [
        {"name": "chat", "weight": 3, "output_length": 7, "ttft_ms": 100},
        {"name": "batch", "lengths": "zipf_128", "prompt_length": 50, "priority": -1},
    ]
    workload = build(num_requests=400, classes=classes, max_model_len=10_000, with_prompt_ids=False)
    plain = build(num_requests=400, max_model_len=10_000, with_prompt_ids=False)
    for x, y in zip(drawn(workload), drawn(plain), strict=True):
        assert x.truth is not None
        if x.spec.request_class == "chat":
            assert x.truth.output_tokens == 7 and x.spec.prompt_tokens == y.spec.prompt_tokens
            assert x.spec.slo == SLO(ttft_ns=100_000_000)
        else:
            assert x.spec.prompt_tokens == 50 and x.spec.max_new_tokens == 6144
            assert x.truth.output_tokens >= 35 and x.spec.priority == -1
    shares = Counter(x.spec.request_class for x in drawn(workload))
    assert 270 < shares["chat"] < 330


def test_parts_of_one_class_are_counted_together(build: Build) -> None:
    classes = [{"name": "a", "output_length": 3}, {"name": "a", "output_length": 4}, {"name": "b"}]
    workload = build(num_requests=300, classes=classes)
    counts = Counter(x.spec.request_class for x in drawn(workload))
    assert workload.describe()["classes"] == [
        {"name": "a", "tenant": "default", "requests": counts["a"]},
        {"name": "b", "tenant": "default", "requests": counts["b"]},
    ]
    assert {x.truth.output_tokens for x in drawn(workload) if x.spec.request_class == "a" and x.truth} == {
        3,
        4,
    }


def test_bounds_scale_together() -> None:
    one = RequestClass(name="a", ttft_ms=100, tbt_ms=3)
    assert one.slo(0.4) == SLO(ttft_ns=40_000_000, tbt_ns=1_200_000)


def test_slo_scale_reaches_every_class(build: Build) -> None:
    classes = [{"name": "a", "e2el_ms": 10}, {"name": "b"}]
    bounds = {x.spec.request_class: x.spec.slo for x in drawn(build(classes=classes, slo_scale=2))}
    assert bounds == {"a": SLO(e2el_ns=20_000_000), "b": None}


def test_laws_switch_at_a_request_number(build: Build) -> None:
    """The study's drift: D1, then D3. Numbers drawn are those of the runs without a switch."""
    settings = {"num_requests": 60, "with_prompt_ids": False, "max_model_len": 9000}
    both = drawn(
        build(lengths="pastfuture_d1", phases=[{"after": 25, "lengths": "pastfuture_d3"}], **settings)
    )
    first, then = (drawn(build(lengths=f"pastfuture_{d}", **settings)) for d in ("d1", "d3"))
    assert both == first[:25] + then[25:]


def test_laws_switch_at_a_time_and_what_is_left_out_stays(build: Build) -> None:
    settings = {"num_requests": 40, "request_rate": 10, "process": "constant", "output_length": 3}
    phases = [{"after_s": 1, "output_length": 9}, {"after_s": 2, "prompt_length": 77}]
    found = [
        (x.spec.prompt_tokens == 77, x.truth.output_tokens)
        for x in drawn(build(phases=phases, **settings))
        if x.truth
    ]
    assert found == [(False, 3)] * 9 + [(False, 9)] * 10 + [(True, 9)] * 21


def test_the_mixture_may_change(build: Build) -> None:
    workload = build(
        num_requests=20,
        classes=[{"name": "a", "output_length": 3}],
        phases=[{"after": 5, "output_length": 4}, {"after": 10, "classes": [{"name": "b"}]}],
    )
    found = [(x.spec.request_class, x.truth.output_tokens) for x in drawn(workload) if x.truth]
    assert found == [("a", 3)] * 10 + [("b", 4)] * 10


def test_requests_too_long_are_cut_on_demand(build: Build) -> None:
    workload = build(num_requests=50, over_length="clip", prompt_length=5000, output_length=900, samples=2)
    for x in drawn(workload):
        assert x.truth is not None and x.spec.prompt_tokens == 3072
        assert (x.truth.output_tokens, x.truth.further) == (900, (900,))
    assert workload.describe()["clipped"] == 50
    long = build(
        num_requests=5, over_length="clip", prompt_length=3000, output_length=1500, max_new_tokens=2000
    )
    assert {(x.spec.prompt_tokens, x.truth.output_tokens) for x in drawn(long) if x.truth} == {(3000, 1096)}
    assert build(over_length="clip").describe()["clipped"] == 0

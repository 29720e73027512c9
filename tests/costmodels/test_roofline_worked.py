"""The roofline against values worked by hand: bytes, FLOPs and times of published models and devices."""

from __future__ import annotations

from math import inf

import pytest
from tests.costmodels.rooflines import device, ideal, model, roofline

from servelab.core.facts import ModelFacts
from servelab.core.sites import linear_sites
from servelab.core.testing.cost import batch_of

LLAMA3 = model("llama3_8b")


def linears(of: ModelFacts) -> int:
    """Weights of a dense model's layers, embedding and head apart."""
    return sum(site.n * site.k for site in linear_sites(of) if site.role != "head")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama3_8b", 6.979),
        ("llama2_7b", 6.476),
        ("llama2_13b", 12.69),
        ("llama2_70b", 68.45),
        ("qwen3_32b", 31.21),
    ],
)
def test_linear_weights_read_by_a_decode(name: str, billions: float) -> None:
    of = model(name)
    step = ideal(of, device("a100_80g")).breakdown(batch_of([(1, 100)]))
    read = sum(one.count * one.work.weight_bytes for one in step.operations if one.name not in OUTSIDE)
    assert read == linears(of) * of.dtype_bytes
    assert read / of.dtype_bytes / 1e9 == pytest.approx(billions, rel=5e-4)


OUTSIDE = ("head", "embedding")


def test_weights_of_llama3_by_layer_and_head() -> None:
    assert linears(LLAMA3) / 32 / 1e6 == pytest.approx(218.1, abs=0.05)
    step = ideal(LLAMA3, device("a100_80g")).breakdown(batch_of([(1, 0)]))
    (head,) = (one for one in step.operations if one.name == "head")
    assert head.work.weight_bytes / 2 / 1e9 == pytest.approx(0.525, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("llama3_8b", 128),
        ("llama2_7b", 512),
        ("llama2_13b", 800),
        ("llama2_70b", 320),
        ("qwen2_5_7b", 56),
        ("qwen3_32b", 256),
    ],
)
def test_kv_bytes_per_token(name: str, kib: int) -> None:
    """Read by a decode, beyond the token it writes."""
    cost = ideal(model(name), device("a100_80g"))
    long, short = (cost.breakdown(batch_of([(1, n)])).bytes("kv") for n in (1000, 0))
    assert (long - short) / 1000 == kib * 1024


@pytest.mark.parametrize(
    ("requests", "gigabytes", "times"),
    [
        (1, 15.144, {"a100_80g": 7.43, "h100": 4.52, "h200": 3.15}),
        (64, 23.60, {"a100_80g": 11.57, "h100": 7.04, "h200": 4.92}),
        (256, 49.37, {"a100_80g": 24.2, "h100": 14.7, "h200": 10.3}),
    ],
)
def test_ideal_decode_of_llama3(requests: int, gigabytes: float, times: dict[str, float]) -> None:
    """Weights and keys over bandwidth, all else in their shadow: 1,024 tokens of context each."""
    for name, ms in times.items():
        on = device(name)
        step = ideal(LLAMA3, on).breakdown(batch_of([(1, 1023)] * requests))
        written, rows = requests * 131072, requests * 4096 * 2  # the new tokens' KV; rows of the embedding
        moved = step.bytes("weight") + step.bytes("kv") - written - rows
        assert moved / 1e9 == pytest.approx(gigabytes, rel=3e-4)
        assert moved / on.memory_bytes_per_s * 1e3 == pytest.approx(ms, rel=5e-3)
        assert step.flops / requests / 1e9 == pytest.approx(15.55, rel=1e-3)


@pytest.mark.parametrize("requests", [1, 64])
def test_ideal_price_is_those_bytes_and_activations(requests: int) -> None:
    """While weights are read longer than multiplied, operations in turn add little: 2.2 % at 64."""
    cost = ideal(LLAMA3, device("a100_80g"))
    (ns,) = cost.price(batch_of([(1, 1023)] * requests), 1)
    bound = {1: 7.43e6, 64: 11.57e6}[requests]
    assert bound * 0.999 < ns < bound * 1.025


def test_prefill_of_llama3() -> None:
    batch = batch_of([(2048, 0)])
    for name, ideal_ms, at_73 in (("a100_80g", 95.2, 130.3), ("h100", 30.0, 41.1), ("h200", 30.0, 41.1)):
        on = device(name)
        step = ideal(LLAMA3, on).breakdown(batch)
        assert step.flops / 1e12 == pytest.approx(29.69, rel=5e-4)
        assert step.lanes["compute"] / 1e6 == pytest.approx(ideal_ms, rel=2e-3)
        slower = roofline(LLAMA3, on, mfu=0.73, mbu=1, smoothness=inf, op_ns=0, step_ns=0).breakdown(batch)
        assert slower.lanes["compute"] / 1e6 == pytest.approx(at_73, rel=2e-3)


def test_the_price_of_a_prompt_is_compute_and_what_cannot_hide_in_it() -> None:
    """Norms, rotation, KV write and head move bytes while nothing multiplies."""
    cost = ideal(LLAMA3, device("a100_80g"))
    batch = batch_of([(2048, 0)])
    assert 95.1e6 < cost.price(batch, 1)[0] < 95.2e6 * 1.025


@pytest.mark.parametrize(("name", "tokens"), [("a100_80g", 153), ("h100", 295), ("h200", 206)])
def test_ridge(name: str, tokens: int) -> None:
    """Tokens at which multiplying by 16-bit weights takes as long as reading them."""
    cost, on = ideal(LLAMA3, device(name)), device(name)

    def multiplies_longer(n: int) -> bool:
        step = cost.breakdown(batch_of([(n, 0)]))
        (one,) = (one.work for one in step.operations if one.name == "gate+up")
        return one.flops / on.flops > one.weight_bytes / on.memory_bytes_per_s

    assert not multiplies_longer(tokens)
    assert multiplies_longer(tokens + 1)


def test_intensities() -> None:
    """FLOPs per byte: of a linear the tokens, of attention while decoding H / K (both at 16 bits)."""
    for of in (LLAMA3, model("llama2_7b"), model("qwen2_5_7b")):
        step = ideal(of, device("a100_80g")).breakdown(batch_of([(1, 500)] * 24))
        work = {one.name: one.work for one in step.operations}
        assert work["down"].flops / work["down"].weight_bytes == 24
        assert work["attention_decode"].flops / work["attention_decode"].kv_bytes == of.heads / of.kv_heads


def test_every_operation_of_a_prompt_by_hand() -> None:
    """Llama-2-7B, 2,048 tokens, one request, A100: FLOPs, bytes and the greater of the two times."""
    of, on = model("llama2_7b"), device("a100_80g")
    step = ideal(of, on).breakdown(batch_of([(2048, 0)]))
    t, d, f, v = 2048, 4096, 11008, 32000
    pairs = t * (t + 1) // 2
    expected = {
        "q+k+v": (32, 2 * t * d * 3 * d, 2 * (3 * d * d + t * d + t * 3 * d)),
        "o": (32, 2 * t * d * d, 2 * (d * d + 2 * t * d)),
        "gate+up": (32, 4 * t * d * f, 2 * (2 * d * f + t * d + 2 * t * f)),
        "down": (32, 2 * t * d * f, 2 * (d * f + t * f + t * d)),
        "elementwise": (32, 10 * t * d, 4 * t * d * 2),
        "kv_write": (32, 0, 2 * t * d * 2),
        "attention_chunk": (32, 4 * d * pairs, 2 * t * d * 2 + 2 * t * d * 2),
        "embedding": (1, 0, 2 * t * d * 2),
        "head": (1, 2 * d * v, 2 * d * v + 2 * d + 4 * v),
    }
    assert {one.name for one in step.operations} == set(expected)
    total = 0.0
    for one in step.operations:
        count, flops, moved = expected[one.name]
        assert (one.count, one.work.flops, one.work.memory_bytes) == (count, flops, moved), one.name
        ns = count * max(flops / 312e12, moved / 2039e9) * 1e9
        assert one.ns == pytest.approx(ns, rel=1e-12)
        total += ns
    assert ideal(of, on).price(batch_of([(2048, 0)]), 1) == [-int(-total // 1)]
    assert step.lanes["host"] == 0


def test_smooth_maximum_and_overheads_by_hand() -> None:
    """Two decodes at efficiencies of 1/2, exponent 2: every operation takes sqrt(C^2 + M^2) + its launch."""
    of = model("llama2_7b")
    on = device("a100_80g", mfu=0.5, mbu=0.5, smoothness=2.0, op_ns=3, layer_ns=7, step_ns=11, request_ns=13)
    cost, batch = roofline(of, on), batch_of([(1, 63), (1, 255)])
    step = cost.breakdown(batch)
    assert abs(cost.price(batch, 1)[0] - step.ns) < 1.01
    total = 0.0
    for one in step.operations:
        compute, memory = one.work.flops / 156e12, one.work.memory_bytes / 1019.5e9
        total += one.count * ((compute**2 + memory**2) ** 0.5 * 1e9 + 3)
    assert step.overhead_ns == 7 * 32 + 11 + 13 * 2
    assert step.ns == pytest.approx(total + step.overhead_ns, rel=1e-12)
    (keys,) = (one.work.kv_bytes for one in step.operations if one.name == "attention_decode")
    assert keys == (64 + 256) * 2 * 4096 * 2


def test_rows_of_logits() -> None:
    """The head multiplies for rows that sample: decodes and ended prompts, never for every prompt token."""
    cost = ideal(LLAMA3, device("a100_80g"))
    batch = batch_of([(500, 0), (700, 0), (1, 9), (1, 9)])
    batch.samples[0] = False  # the prompt goes on
    (head,) = (one.work for one in cost.breakdown(batch).operations if one.name == "head")
    assert head.flops == 2 * 3 * 4096 * 128256
    batch.samples[:] = [False] * 4
    assert "head" not in {one.name for one in cost.breakdown(batch).operations}
    assert cost.price(batch, 1)[0] == -int(-cost.breakdown(batch).ns // 1)

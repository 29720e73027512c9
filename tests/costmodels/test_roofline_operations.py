"""Operations of the roofline: experts, latents, windows, quantized formats, many devices, unusual batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil
from random import Random
from typing import Any

import pytest
from tests.costmodels.rooflines import device, ideal, model, roofline

from servelab.core.context import Context
from servelab.core.errors import ConfigError
from servelab.core.facts import HardwareFacts, ModelFacts
from servelab.core.families.kernel import OpCost
from servelab.core.families.quant import LinearSite, ScaleLevel, WeightFormat
from servelab.core.layout import KVLayout, Pool
from servelab.core.plan import Background, Tokens
from servelab.core.testing.cost import batch_of
from servelab.core.testing.fakes import toy_limits
from servelab.plugins.costmodels.roofline.cost import Breakdown, Priced
from servelab.plugins.costmodels.roofline.operations import distinct_experts
from servelab.plugins.kernels.sdpa.backend import Sdpa
from servelab.plugins.quant._describe import GroupsConfig, LayersConfig
from servelab.plugins.quant.w4a8 import W4A8
from servelab.plugins.quant.w4a16 import W4A16, W4A16Config
from servelab.plugins.quant.w8a8 import W8A8
from servelab.plugins.quant.w8a16 import W8A16

LLAMA3, A100 = model("llama3_8b"), device("a100_80g")


def context_of(kind: str, of: ModelFacts = LLAMA3) -> Context:
    return Context(kind=kind, name=kind, rng=Random(0), model=of, hardware=A100, limits=toy_limits())


def operation(step: Breakdown, name: str) -> Priced:
    (found,) = (one for one in step.operations if one.name == name)
    return found


# ---------------------------------------------------------------------- experts


def test_coverage_of_experts_in_closed_form() -> None:
    """128 experts of which 8: one token reads 8, many all; in between as often drawn by chance."""
    of = model("qwen3_30b_a3b")
    assert (of.experts, of.experts_per_token) == (128, 8)
    assert distinct_experts(of, 1) == pytest.approx(8, rel=1e-12)
    assert distinct_experts(of, 16) == pytest.approx(128 * (1 - (120 / 128) ** 16), rel=1e-12)
    assert distinct_experts(of, 10_000) == pytest.approx(128, rel=1e-12)
    rng, seen = Random(1), 0
    for _ in range(400):
        seen += len({e for _ in range(16) for e in rng.sample(range(128), 8)})
    assert seen / 400 == pytest.approx(distinct_experts(of, 16), rel=0.01)


def test_experts_by_hand() -> None:
    """Weights of the experts that are read, FLOPs of those each token runs through, the router beside."""
    of = model("qwen3_30b_a3b")
    step = ideal(of, A100).breakdown(batch_of([(1, 9)] * 16))
    read, width = distinct_experts(of, 16), of.hidden * of.ffn
    up, down = (operation(step, name).work for name in ("expert_gate+expert_up", "expert_down"))
    assert up.weight_bytes == pytest.approx(read * 2 * width * 2, rel=1e-12)
    assert down.weight_bytes == pytest.approx(read * width * 2, rel=1e-12)
    assert up.flops + down.flops == 6 * 16 * 8 * width
    assert up.activation_bytes == 16 * 8 * (of.hidden + 2 * of.ffn) * 2
    assert operation(step, "router").work.flops == 2 * 16 * of.hidden * 128


def test_dense_layers_and_shared_experts_are_counted() -> None:
    of = model("deepseek_v3_like")
    assert (of.dense_layers, of.shared_experts) == ((0, 1, 2), 1)
    step = ideal(of, replace(A100, tp=8)).breakdown(batch_of([(1, 9)]))
    up = [one for one in step.operations if one.name == "gate+up"]
    found = {one.count: one.work.flops for one in up}
    assert found == {3: 2 * 2 * of.hidden * of.dense_ffn / 8, 58: 2 * 2 * of.hidden * of.ffn / 8}
    assert operation(step, "expert_down").count == 58


def test_networks_without_a_gate() -> None:
    step = ideal(replace(LLAMA3, gated=False), A100).breakdown(batch_of([(7, 0)]))
    flops = operation(step, "up").work.flops + operation(step, "down").work.flops
    assert flops == 4 * 7 * LLAMA3.hidden * LLAMA3.ffn


# -------------------------------------------------------------------- attention


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V3: a decode works in the latent's space (absorbed), a prompt with keys of 192 and values of
    128; each token keeps 576 elements, on every device.
    """
    of, t = model("deepseek_v3_like"), 8
    assert (of.kv_latent, of.rope_dim, of.head_dim, of.v_dim, of.heads) == (512, 64, 192, 128, 128)
    cost = ideal(of, replace(A100, tp=t))
    decode = operation(cost.breakdown(batch_of([(1, 999)])), "attention_decode").work
    assert decode.flops == 2 * 128 / t * (512 + 64 + 512) * 1000
    assert decode.kv_bytes == 576 * 2 * 1000
    chunk = operation(cost.breakdown(batch_of([(100, 0)])), "attention_chunk").work
    assert chunk.flops == 2 * 128 / t * (192 + 128) * 5050
    later = operation(cost.breakdown(batch_of([(4, 1000)])), "attention_chunk").work
    pairs = 4 * 1000 + 10  # few queries: cheaper in the latent's space than to expand 1,000 keys
    assert later.flops == 2 * 128 / t * (512 + 64 + 512) * pairs
    names = {one.name: one for one in cost.breakdown(batch_of([(4, 1000)])).operations}
    assert {"k+q", "v", "q"} <= names.keys()
    assert names["k+q"].work.weight_bytes == of.hidden * (1536 + 576) * 2  # on every device
    assert names["v"].work.flops == 2 * 4 * 512 * 128 * (128 + 128) / t


def test_windows_limit_keys() -> None:
    of = replace(LLAMA3, windows=(None, 100) * 16)
    step = ideal(of, A100).breakdown(batch_of([(1, 999), (1, 20)]))
    keys = {one.work.kv_bytes: one.count for one in step.operations if one.name == "attention_decode"}
    assert keys == {1021 * 4096: 16, 121 * 4096: 16}


@pytest.mark.parametrize("rows", [[(1, 700)], [(1, 5), (1, 900)], [(300, 0)], [(64, 500)], [(5, 3)]])
@pytest.mark.parametrize("windows", [(), (128,) * 32])
def test_attention_is_what_the_reference_kernel_counts(
    rows: list[tuple[int, int]], windows: tuple[int, ...]
) -> None:
    """FLOPs of all pairs, and each key read once per row."""
    of = replace(LLAMA3, windows=windows)
    pool = Pool(id="kv", layers=tuple(range(32)), page_tokens=16, bytes_per_page=16 * 32 * 4096)
    layout = KVLayout(addressing="block_table", pools=(pool,))
    step = ideal(of, A100, layout=layout).breakdown(batch_of(rows))
    ours = [one.work for one in step.operations if one.name.startswith("attention")]
    tokens, starts = zip(*rows, strict=True)
    theirs = Sdpa(None, context_of("kernel", of)).cost(0, tokens, starts, layout)
    assert sum(one.flops for one in ours) == theirs.flops
    assert sum(one.kv_bytes for one in ours) == theirs.device_bytes


def test_kv_bytes_are_those_of_the_layout() -> None:
    """KV in 8 bits, scales of 2 bytes per head and token: c = 1 + 2 * 2 / h bytes; half the layers each."""
    eight = round(16 * 16 * 2 * 8 * (128 * (1 + 2 * 2 / 128) - 2))
    pools = (
        Pool(id="full", layers=tuple(range(16)), page_tokens=16, bytes_per_page=16 * 16 * 4096),
        Pool(id="int8", layers=tuple(range(16, 32)), page_tokens=16, bytes_per_page=eight, codec="int8"),
    )
    cost = ideal(LLAMA3, A100, layout=KVLayout(addressing="block_table", pools=pools))
    step = cost.breakdown(batch_of([(1, 99)]))
    read = sorted(one.work.kv_bytes for one in step.operations if one.name == "attention_decode")
    assert read == [100 * 2 * 8 * (128 + 2), 100 * 4096]
    assert [one.count for one in step.operations if one.name == "attention_decode"] == [16, 16]


# -------------------------------------------------------------------- quantized


def test_bytes_per_weight_of_four_bits() -> None:
    """0.5 + (16 + 4) / 8 / 128 = 0.5195 with a scale in 16 bits and a zero in 4 per 128."""
    scales = (ScaleLevel(group=128, bits=16, zero_bits=4, zero="int"),)
    format = WeightFormat(kind="int", bits=4, scales=scales)
    assert format.bytes_per_weight == pytest.approx(0.5195, abs=5e-5)
    step = ideal(LLAMA3, A100, quant=Formats(format)).breakdown(batch_of([(1, 0)]))
    assert operation(step, "down").work.weight_bytes == 4096 * 14336 * (0.5 + 2.5 / 128)


class Formats:
    """A quantizer of one format for all layers, at 16 bits of arithmetic."""

    def __init__(self, format: WeightFormat, math_bits: int = 16) -> None:
        self._format, self._bits = format, math_bits

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        return None if site.role == "head" else self._format

    def cost(
        self, site: LinearSite, tokens: int, model: ModelFacts, hardware: HardwareFacts | None
    ) -> OpCost:
        return OpCost(
            flops=2 * tokens * site.n * site.k,
            math_bits=self._bits,
            device_bytes=self._format.nbytes(site.n, site.k) + 2 * tokens * (site.n + site.k),
        )


@pytest.mark.parametrize(
    ("quant", "peak"),
    [
        (W4A16(W4A16Config(), context_of("quant")), 312e12),
        (W8A16(LayersConfig(), context_of("quant")), 312e12),
        (W8A8(LayersConfig(), context_of("quant")), 624e12),
        (W4A8(GroupsConfig(), context_of("quant")), 624e12),
    ],
)
def test_the_peak_is_that_of_the_wider_operand(quant: Any, peak: float) -> None:
    """Weights of few bits multiply at 16 with activations of 16, at 8 with those of 8; half is reached."""
    cost = ideal(LLAMA3, A100, quant=quant, mfu=0.5)
    step = cost.breakdown(batch_of([(4096, 0)]))
    for one in step.operations:
        if one.name in ("q+k+v", "o", "gate+up", "down"):
            assert one.compute_ns == pytest.approx(one.count * one.work.flops / peak * 2e9, rel=1e-12)
            site = LinearSite(name="x", layer=0, role="down", n=4096, k=14336)
            format = quant.format(site, LLAMA3)
            assert one.work.weight_bytes < one.work.flops / 4096  # less than two bytes each
    assert operation(step, "down").work.weight_bytes == format.nbytes(4096, 14336)
    assert operation(step, "head").work.weight_bytes == 2 * 4096 * 128256


def test_four_bits_move_the_ridge_by_four() -> None:
    """From 153 tokens to a quarter and the scales' share."""
    quant = W4A16(W4A16Config(), context_of("quant"))
    format = quant.format(LinearSite(name="x", layer=0, role="down", n=4096, k=14336), LLAMA3)
    assert format is not None
    cost = ideal(LLAMA3, A100, quant=quant)
    crossed = next(
        n
        for n in range(1, 400)
        if (one := operation(cost.breakdown(batch_of([(n, 0)])), "down").work)
        and one.flops / 312e12 > one.weight_bytes / 2039e9
    )
    assert 153 / 4 < crossed == ceil(312e12 / 2039e9 * format.bytes_per_weight / 2) < 153 / 3.7


def test_fused_linears_read_their_input_once() -> None:
    cost = ideal(LLAMA3, A100, quant=W8A16(LayersConfig(), context_of("quant")))
    work = operation(cost.breakdown(batch_of([(10, 0)])), "q+k+v").work
    assert work.activation_bytes == 10 * (4096 + 4096 + 2 * 1024) * 2


def test_fused_linears_quantize_their_input_once() -> None:
    """Read, written as codes with a scale of 4 bytes per token, and read again: once for q, k and v."""
    cost = ideal(LLAMA3, A100, quant=W8A8(LayersConfig(), context_of("quant")))
    one = operation(cost.breakdown(batch_of([(10, 0)])), "q+k+v").work
    assert one.activation_bytes == pytest.approx(10 * (2 * 4096 + 2 * (4096 + 4) + 2 * 6144), abs=1)
    assert one.launches == 2


def test_linears_of_two_formats_are_two_products() -> None:
    quant = W8A16(LayersConfig(skip=("k",)), context_of("quant"))
    names = {one.name for one in ideal(LLAMA3, A100, quant=quant).breakdown(batch_of([(1, 0)])).operations}
    assert {"q", "k", "v"} <= names


def test_a_missing_peak_is_no_other_peak() -> None:
    quant = W8A8(LayersConfig(), context_of("quant"))
    with pytest.raises(ConfigError, match="does not state flops_int8") as caught:
        ideal(LLAMA3, replace(A100, flops_int8=None), quant=quant)
    assert "hardware.flops_int8" in caught.value.do
    with pytest.raises(ConfigError, match="does not state flops_fp8"):
        ideal(LLAMA3, A100, quant=Formats(WeightFormat(kind="float", bits=8), math_bits=8))
    with pytest.raises(ConfigError, match="multiplies at 4 bits"):
        ideal(LLAMA3, A100, quant=Formats(WeightFormat(kind="int", bits=4), math_bits=4))


def test_quantized_experts_read_as_many() -> None:
    of = model("mixtral_8x7b")
    quant = W8A16(LayersConfig(), context_of("quant", of))
    step = ideal(of, A100, quant=quant).breakdown(batch_of([(1, 0)] * 3))
    site = LinearSite(name="x", layer=0, role="expert_down", n=of.hidden, k=of.ffn)
    format = quant.format(site, of)
    assert format is not None
    expected = distinct_experts(of, 3) * format.nbytes(of.hidden, of.ffn)
    assert operation(step, "expert_down").work.weight_bytes == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------- many devices


@pytest.mark.parametrize("t", [2, 4, 8])
def test_devices_share_every_layer(t: int) -> None:
    one, many = (ideal(LLAMA3, replace(A100, tp=n)).breakdown(batch_of([(2000, 0)])) for n in (1, t))
    for name in ("q+k+v", "o", "gate+up", "down", "head"):
        a, b = operation(one, name).work, operation(many, name).work
        assert (b.flops, b.weight_bytes) == (a.flops / t, a.weight_bytes / t), name
    inner, ffn = LLAMA3.heads * LLAMA3.head_dim // t, LLAMA3.ffn // t  # a device's part of the inputs
    assert operation(many, "o").work.activation_bytes == 2000 * (inner + 4096) * 2
    assert operation(many, "down").work.activation_bytes == 2000 * (ffn + 4096) * 2
    assert operation(many, "gate+up").work.activation_bytes == 2000 * (4096 + 2 * ffn) * 2
    chunk = operation(many, "attention_chunk").work
    assert chunk.kv_bytes == operation(one, "attention_chunk").work.kv_bytes / t
    reduce = operation(many, "all_reduce")
    assert reduce.count == 64
    assert reduce.work.network_bytes == 2000 * 4096 * 2


def test_all_reduces_by_hand() -> None:
    """Measured: a + 2 (n - 1) / n * bytes / bandwidth; unmeasured: GenZ's start and hops over the link."""
    message = 100 * 4096 * 2
    measured = roofline(LLAMA3, replace(A100, tp=4)).breakdown(batch_of([(100, 0)]))
    assert operation(measured, "all_reduce").ns == pytest.approx(
        64 * (29000 + 1.5 * message / 154), rel=1e-12
    )
    plain = replace(A100, tp=4, all_reduce=())
    derived = roofline(LLAMA3, plain).breakdown(batch_of([(100, 0)]))
    expected = 64 * (5000 + 6 * 1900 + 1.5 * message / 300)
    assert operation(derived, "all_reduce").ns == pytest.approx(expected, rel=1e-12)
    (head,) = (one.ns for one in derived.operations if one.name == "gather")
    assert derived.lanes["network"] == operation(derived, "all_reduce").ns + head


def test_logits_are_gathered_by_hand() -> None:
    """Once round the ring, 4 bytes a logit, for the rows that sample: all-gather, half an all-reduce."""
    rows, message = [(100, 0), (1, 9), (1, 9)], 2 * 128256 * 4
    batch = batch_of(rows)
    batch.samples[0] = False
    cost = roofline(LLAMA3, replace(A100, tp=4))
    measured = operation(cost.breakdown(batch), "gather").ns
    assert measured == pytest.approx(29000 + 0.75 * message / 154, rel=1e-12)
    derived = roofline(LLAMA3, replace(A100, tp=4, all_reduce=())).breakdown(batch)
    assert operation(derived, "gather").ns == pytest.approx(5000 + 3 * 1900 + 0.75 * message / 300, rel=1e-12)
    assert cost.price(batch, 1) == [ceil(cost.breakdown(batch).ns)]
    two = roofline(LLAMA3, replace(A100, tp=2)).breakdown(batch)
    assert operation(two, "gather").ns == pytest.approx(36000 + 0.5 * message / 158, rel=1e-12)
    batch.samples[:] = [False] * 3
    assert "gather" not in {one.name for one in cost.breakdown(batch).operations}
    assert "gather" not in {one.name for one in roofline(LLAMA3, A100).breakdown(batch_of(rows)).operations}


def test_scarce_kv_heads_are_copied() -> None:
    """Eight KV heads on 16 devices: each keeps one, and its K and V."""
    step = ideal(LLAMA3, replace(A100, tp=16, all_reduce=())).breakdown(batch_of([(1, 99)]))
    assert operation(step, "attention_decode").work.kv_bytes == 100 * 4096 / 8
    assert operation(step, "q+k+v").work.weight_bytes == 4096 * (2 * 128 + 2 * 128) * 2


def test_more_devices_are_faster_and_never_perfectly() -> None:
    prices = [roofline(LLAMA3, replace(A100, tp=n)).price(batch_of([(2048, 0)]), 1)[0] for n in (1, 2, 4, 8)]
    assert all(a / 2 < b < a for a, b in pairwise(prices))


# ------------------------------------------------------------- unusual batches


def test_drafts_are_queries_and_rows_of_logits() -> None:
    cost = ideal(LLAMA3, A100)
    drafted = cost.breakdown(batch_of([(1, 50), (1, 900)], drafts=(4, 0)))
    plain = cost.breakdown(batch_of([(5, 50), (1, 900)]))
    assert operation(drafted, "attention_chunk").work == operation(plain, "attention_chunk").work
    assert operation(drafted, "down").work == operation(plain, "down").work
    assert operation(drafted, "head").work.flops == 6 / 2 * operation(plain, "head").work.flops
    assert cost.price(batch_of([(1, 50)], drafts=(4,)), 1) > cost.price(batch_of([(5, 50)]), 1)


def test_a_range_of_layers_is_its_share() -> None:
    """A prompt in three parts: its layers once each, embedding with the first, head with the last."""
    cost = ideal(LLAMA3, A100, step_ns=5, layer_ns=7)
    whole = cost.breakdown(batch_of([(512, 0)]))
    parts = []
    for first, end in ((0, 10), (10, 11), (11, 32)):
        batch = batch_of([(512, 0)])
        batch.samples[0] = end == 32
        batch.extras[0] = Tokens(batch.requests[0].view, 512, layers=(first, end))
        parts.append(cost.breakdown(batch))
    assert sum(part.ns for part in parts) == pytest.approx(whole.ns + 2 * 5, rel=1e-12)
    assert [len([one for one in part.operations if one.name == "embedding"]) for part in parts] == [1, 0, 0]
    assert [part.overhead_ns for part in parts] == [5 + 7 * 10, 5 + 7, 5 + 7 * 21]


def test_layers_are_run_for_the_rows_that_are_there() -> None:
    """Two chunks in different layers: each layer multiplies for the rows in it."""
    cost = ideal(LLAMA3, A100)
    batch = batch_of([(100, 0), (1, 700)])
    batch.samples[0] = False
    batch.extras[0] = Tokens(batch.requests[0].view, 100, layers=(0, 20))
    counts = {one.work.flops: one.count for one in cost.breakdown(batch).operations if one.name == "down"}
    each = 2 * LLAMA3.hidden * LLAMA3.ffn
    assert counts == {101 * each: 20, 1 * each: 12}


def test_background_work_and_copies_take_time() -> None:
    pool = Pool(id="kv", layers=tuple(range(32)), page_tokens=16, bytes_per_page=2**21)
    cost = ideal(LLAMA3, A100, layout=KVLayout(addressing="block_table", pools=(pool,)))
    plain, batch = batch_of([(1, 9)]), batch_of([(1, 9)])
    batch.background = (Background("draft training", 10**12),)
    batch.copies = ((0, 1, 2), (0, 3, 4))
    more = cost.breakdown(batch).ns - cost.breakdown(plain).ns
    assert more == pytest.approx(1e12 / 312e12 * 1e9 + 4 * 2**21 / 2039, rel=1e-6)
    alone = batch_of([])
    alone.background = batch.background
    assert cost.price(alone, 1) == [ceil(1e12 / 312e12 * 1e9)]
    assert cost.price(alone, 3) == cost.price(alone, 1) * 3


def test_a_held_step_of_nothing_is_a_step() -> None:
    cost = roofline(LLAMA3, replace(A100, idle_watts=60.0))
    assert cost.price(batch_of([]), 4) == [1_000_000] * 4
    assert cost.energy(batch_of([]), 4) == [0.0] * 4


def test_further_samples_of_a_prompt_are_requests() -> None:
    cost = ideal(LLAMA3, A100, request_ns=1000)
    batch = batch_of([(64, 0)])
    before = cost.price(batch, 1)[0]
    batch.forks = {0: batch.requests * 3}
    assert cost.price(batch, 1) == [before + 3000]

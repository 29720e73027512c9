"""What is true of every roofline: dense, of experts, windowed, with latents, quantized, on many devices."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import ceil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.costmodels.rooflines import device, ideal, model, roofline
from tests.costmodels.test_roofline_operations import Formats

from servelab.core.context import Context
from servelab.core.families.quant import WeightFormat
from servelab.core.testing.cost import TOY_DEVICE, batch_of
from servelab.core.testing.fakes import toy_limits
from servelab.plugins.costmodels.roofline.cost import RooflineCost
from servelab.plugins.quant._describe import LayersConfig
from servelab.plugins.quant.w8a8 import W8A8

DENSE = model("llama3_8b")
WINDOWED = replace(DENSE, name="windowed", windows=(None, 100, 700, 100) * 8)
EXPERTS = model("qwen3_30b_a3b")
LATENT = replace(model("deepseek_v3_like"), layers=5)
UNEVEN, ROUTED = model("qwen2_5_7b"), replace(model("mixtral_8x7b"), layers=3)
FLOAT8 = WeightFormat(kind="float", bits=8)


def w8a8() -> W8A8:
    context = Context(
        kind="quant", name="w8a8", rng=Random(0), model=DENSE, hardware=None, limits=toy_limits()
    )
    return W8A8(LayersConfig(), context)


@cache
def costs() -> dict[str, RooflineCost]:
    power = {"idle_watts": 50.0, "peak_watts": 400.0}
    measured, datasheet = device("a100_80g", **power), device("h100", **power)
    return {
        "dense": roofline(DENSE, measured),
        "dense, ideal": ideal(DENSE, measured),
        "windowed": roofline(WINDOWED, measured),
        "windowed, ideal": ideal(WINDOWED, measured),
        "experts": roofline(EXPERTS, datasheet),
        "experts, ideal": ideal(EXPERTS, datasheet),
        "latent": roofline(LATENT, replace(datasheet, tp=8)),
        "latent, ideal": ideal(LATENT, replace(datasheet, tp=8)),
        "8 devices": roofline(DENSE, replace(measured, tp=8)),
        "other": roofline(DENSE, TOY_DEVICE, layer_ns=7000, request_ns=500),
        "uneven heads": roofline(UNEVEN, replace(datasheet, tp=7, all_reduce=())),
        "8 bits": roofline(DENSE, measured, quant=w8a8()),
        "experts in floats of 8 bits": ideal(ROUTED, replace(datasheet, tp=4), quant=Formats(FLOAT8, 8)),
    }


every = pytest.mark.parametrize("name", list(costs()))
few = settings(max_examples=25)
chunk = st.one_of(st.just(1), st.just(1), st.integers(1, 700))
context = st.one_of(st.integers(0, 40), st.integers(0, 4000), st.integers(0, 131_072))
rows_of = st.lists(st.tuples(chunk, context), min_size=1, max_size=12)
contexts_of = st.lists(context, min_size=1, max_size=12)


@every
@few
@given(rows=rows_of, where=st.integers(0, 11), more=st.integers(1, 300))
def test_one_token_or_one_key_more_costs_no_less(
    name: str, rows: list[tuple[int, int]], where: int, more: int
) -> None:
    cost, i = costs()[name], where % len(rows)
    (price,) = cost.price(batch_of(rows), 1)
    n, p = rows[i]
    for changed in ((n + more, p), (n + 1, p), (n, p + more), (n, p + 1)):
        (other,) = cost.price(batch_of([*rows[:i], changed, *rows[i + 1 :]]), 1)
        assert other >= price > 0
    assert cost.price(batch_of([*rows, (more, 5)]), 1)[0] >= price


@every
@few
@given(n=st.integers(2, 3000), p=st.integers(0, 3000), cuts=st.lists(st.integers(1, 2999), max_size=4))
def test_chunks_cost_at_least_the_whole(name: str, n: int, p: int, cuts: list[int]) -> None:
    """Weights and context are read again."""
    cost = costs()[name]
    whole = batch_of([(n, p)])
    ends = [0, *sorted({cut for cut in cuts if cut < n}), n]
    parts = 0
    for a, b in pairwise(ends):
        part = batch_of([(b - a, p + a)])
        part.samples[0] = b == n
        parts += cost.price(part, 1)[0]
    assert parts >= cost.price(whole, 1)[0]


@every
@few
@given(contexts=contexts_of)
def test_a_batch_of_decodes_costs_at_most_its_members(name: str, contexts: list[int]) -> None:
    cost = costs()[name]
    (together,) = cost.price(batch_of([(1, p) for p in contexts]), 1)
    assert together <= sum(cost.price(batch_of([(1, p)]), 1)[0] for p in contexts)


@every
@few
@given(rows=rows_of)
def test_the_breakdown_adds_up(name: str, rows: list[tuple[int, int]]) -> None:
    """To the price; each operation takes at least its longer lane, at most both and its launches."""
    cost = costs()[name]
    step = cost.breakdown(batch_of(rows))
    assert abs(cost.price(batch_of(rows), 1)[0] - step.ns) < 1 + 1e-9 * step.ns
    for one in step.operations:
        longest = max(one.compute_ns, one.memory_ns, one.network_ns)
        launches = one.count * one.work.launches * cost.factors.op_ns
        assert longest <= one.ns * (1 + 1e-12)
        assert one.ns <= (one.compute_ns + one.memory_ns + one.network_ns + launches) * (1 + 1e-12)
    lanes = step.lanes
    assert max(lanes.values()) <= step.ns * (1 + 1e-12)
    for lane, ns in cost.busy(batch_of(rows)).items():
        assert lanes[lane] * (1 - 1e-9) - 1 <= ns <= lanes[lane] * (1 + 1e-9)
        assert ns <= cost.price(batch_of(rows), 1)[0]
    busy = cost.power.joules(lanes["compute"], lanes["memory"]) if cost.power else None
    assert busy is not None
    assert cost.energy(batch_of(rows), 1)[0] == pytest.approx(busy, rel=1e-9)
    assert busy <= cost.power.busy_watts * step.ns * 1e-9 * (1 + 1e-12)


@every
@few
@given(contexts=contexts_of, steps=st.integers(1, 150))
def test_a_hold_is_its_steps(name: str, contexts: list[int], steps: int) -> None:
    cost = costs()[name]
    held = batch_of([(1, p) for p in contexts], steps=steps)
    prices, joules = cost.price(held, steps), cost.energy(held, steps)
    assert len(prices) == len(joules) == steps
    for k in {0, 1, steps // 2, steps - 1} & set(range(steps)):
        alone = batch_of([(1, p + k) for p in contexts])
        assert [prices[k]] == cost.price(alone, 1)
        assert cost.energy(alone, 1)[0] == pytest.approx(joules[k], rel=1e-12)


@every
@few
@given(rows=rows_of, steps=st.integers(2, 30))
def test_steps_after_a_mixed_one_are_decodes(name: str, rows: list[tuple[int, int]], steps: int) -> None:
    cost = costs()[name]
    first, *rest = cost.price(batch_of(rows), steps)
    assert [first] == cost.price(batch_of(rows), 1)
    assert rest == cost.price(batch_of([(1, p + n) for n, p in rows]), steps - 1)


@few
@given(batches=st.lists(rows_of, min_size=2, max_size=5))
def test_what_is_kept_does_not_change_prices(batches: list[list[tuple[int, int]]]) -> None:
    used = roofline(DENSE, device("a100_80g"))
    first = [used.price(batch_of(rows), 1) for rows in batches]
    assert [used.price(batch_of(rows), 1) for rows in batches] == first
    for rows, price in zip(batches, first, strict=True):
        assert roofline(DENSE, device("a100_80g")).price(batch_of(rows), 1) == price


@few
@given(contexts=contexts_of, steps=st.integers(1, 1500))
def test_keys_of_a_window_by_counting(contexts: list[int], steps: int) -> None:
    """Step by step, the sum of min(context, window) over rows, against a sum over all tokens."""
    window = costs()["windowed"]._decodes[1]
    assert window.window is not None
    counted = [sum(min(p + 1 + k, window.window) for p in contexts) for k in range(steps)]
    assert list(window.keys(contexts, steps)) == counted


@few
@given(n=st.integers(1, 60), p=st.integers(0, 60), width=st.integers(1, 50))
def test_pairs_of_a_window_by_counting(n: int, p: int, width: int) -> None:
    one = replace(costs()["windowed"]._all.attention[0], window=width, pair_flops=1.0, chunk_pair_flops=1.0)
    seen = [range(max(0, p + i + 1 - width), p + i + 1) for i in range(n)]
    work = one.chunk(n, p)
    assert work.flops == sum(map(len, seen))
    assert work.kv_bytes == one.kv_bytes * len(set().union(*seen))


def test_prices_are_rounded_up() -> None:
    cost = ideal(DENSE, device("a100_80g"))
    batch = batch_of([(1, 10)])
    assert cost.price(batch, 1) == [ceil(cost.breakdown(batch).ns)]

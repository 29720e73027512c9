"""Packed weights against their formulas, written down here in float64 or worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quant.worlds import (
    DTYPES,
    NAMES,
    ROUNDING,
    dequantized,
    made,
    nibbles,
    per_input,
    quantizer,
    site,
    weights,
)
from torch import Tensor

from servelab.core.families.quant import QTensor
from servelab.plugins.quant.w4a8_impl import second_level
from servelab.plugins.quant.w4a16_impl import asymmetric, symmetric


def packed(name: str, weight: Tensor, **settings: Any) -> QTensor:
    impl = quantizer(name, weight.dtype, **settings).load()
    t = impl.pack(site(*weight.shape), weight, None, None)
    assert isinstance(t, QTensor)
    return t


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
floats = st.floats(-(2.0**100), 2.0**100, width=32)


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_packing_keeps_nothing_and_repeats(name: str, dtype: torch.dtype) -> None:
    weight = weights(6, 64, dtype)
    before = weight.clone()
    first = packed(name, weight)
    assert torch.equal(weight, before)
    weight.zero_()
    second = packed(name, before.t().contiguous().t())  # in another order of memory
    for a, b in zip(
        (*first.codes, *first.scales, *first.zeros),
        (*second.codes, *second.scales, *second.zeros),
        strict=True,
    ):
        assert torch.equal(a, b)


# ------------------------------------------------------------- int8 per output


@pytest.mark.parametrize("name", ["w8a16", "w8a8"])
class TestRows:
    def test_by_hand(self, name: str) -> None:
        t = packed(name, torch.tensor([[1.27, -0.5, 0.012, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        assert t.codes[0].tolist() == [[127, -50, 1, 0], [0, 0, 0, 0]]
        assert t.scales[0].tolist() == pytest.approx([0.01, 1e-5 / 127])

    @each_dtype
    def test_no_weight_is_off_by_more_than_half_a_step(self, name: str, dtype: torch.dtype) -> None:
        weight = weights(12, 64, dtype)
        weight[5] = 0
        weight[6] = 3e-6
        t = packed(name, weight)
        assert t.codes[0].dtype == torch.int8 and t.codes[0].abs().max() == 127
        assert t.scales[0].dtype == torch.float32
        step = t.scales[0].double()[:, None]
        assert ((dequantized(t) - weight.double()).abs() <= step * (0.5 + 1e-5)).all()
        assert not dequantized(t)[5].any()

    @settings(max_examples=40)
    @given(rows=st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=4))
    def test_what_was_dequantized_stays(self, name: str, rows: list[list[float]]) -> None:
        t = packed(name, torch.tensor(rows, dtype=torch.float64))
        again = packed(name, dequantized(t))
        assert torch.equal(again.codes[0], t.codes[0])


# --------------------------------------------------------------- 4-bit, groups


def test_groups_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.44, 0.3, 0.1, 0.2, 1.5]])
    t = packed("w4a16", weight, group_size=4)
    # -1..2: s = 3 / 15, z = 5; then only positive: s = 1.4 / 15, z = 0, and 1.5 is above 15 s
    assert nibbles(t).tolist() == [[0, 5, 15, 7, 3, 1, 2, 15]]
    assert t.zeros[0].tolist() == [[5], [0]]
    assert t.scales[0].flatten().tolist() == pytest.approx([0.2, 1.4 / 15])
    t = packed("w4a16", torch.tensor([[0.7, -0.7, 0.12, -0.38]]), group_size=4, symmetric=True)
    assert nibbles(t).tolist() == [[15, 1, 9, 4]] and t.zeros == ()
    assert t.scales[0].item() == pytest.approx(0.1)


@each_dtype
@pytest.mark.parametrize("group", [2, 32, 64])
def test_groups_follow_the_formula(group: int, dtype: torch.dtype) -> None:
    n, k = 10, 128
    weight = weights(n, k, dtype)
    t = packed("w4a16", weight, group_size=group)
    codes, zero, step = nibbles(t), per_input(t.zeros[0], k), per_input(t.scales[0], k)
    assert codes.min() >= 0 and codes.max() <= 15 and zero.min() >= 0 and zero.max() <= 15
    assert t.scales[0].dtype == (dtype if dtype.itemsize == 2 else torch.float32)
    grouped = weight.double().view(n, -1, group)
    low, high = (m[..., None].expand_as(grouped).flatten(1) for m in (grouped.amin(2), grouped.amax(2)))
    unit = ROUNDING[t.scales[0].dtype]
    assert torch.allclose(step, (high - low).clamp(min=1e-5) / 15, rtol=unit, atol=6e-8 * (unit > 2**-12))
    # with the scale as it is stored, everything else is exact but for ties
    off = (codes - (weight.double() / step + zero).clamp(0, 15)).abs()
    assert (off <= 0.5 + 1e-4).all()
    assert ((zero - (-low / step).clamp(0, 15)).abs() <= 0.5 + 1e-4).all()
    # both ends of a group around zero come back
    ends = ((weight == low) | (weight == high)) & (low <= 0) & (high >= 0)
    assert ends.any()
    error = (dequantized(t) - weight.double()).abs() / step
    assert (error[ends] <= 0.5 + 16 * unit).all()


def test_positive_groups_lose_what_is_above_fifteen_steps() -> None:
    weight = torch.linspace(1.0, 2.0, 32).repeat(2, 1)
    weight[1] *= -1
    t = packed("w4a16", weight, group_size=32)
    assert t.zeros[0].tolist() == [[0, 15]]
    assert torch.allclose(t.scales[0], torch.tensor(1 / 15))
    assert torch.allclose(dequantized(t), torch.tensor([[1.0], [-1.0]]).double().expand(2, 32))


@each_dtype
def test_symmetric_groups(dtype: torch.dtype) -> None:
    weight = weights(10, 128, dtype)
    weight[2] = 0
    t = packed("w4a16", weight, group_size=32, symmetric=True)
    codes, step = nibbles(t) - 8, per_input(t.scales[0], 128)
    assert codes.min() >= -8 and codes.max() <= 7
    assert ((codes - (weight.double() / step).clamp(-8, 7)).abs() <= 0.5 + 1e-4).all()
    absmax = weight.double().view(10, 4, 32).abs().amax(2).repeat_interleave(32, 1)
    unit = ROUNDING[t.scales[0].dtype]
    assert torch.allclose(step, absmax.clamp(min=1e-5) / 7, rtol=unit, atol=6e-8 * (unit > 2**-12))
    assert not dequantized(t)[2].any()


def test_one_group_per_row_is_per_output() -> None:
    n, k = 6, 64
    weight = weights(n, k)
    for quantize in (asymmetric, symmetric):
        codes, scale, zero = quantize(weight, k)
        assert scale.shape == (1, n)
        for row in range(n):
            alone = quantize(weight[row : row + 1], k)
            assert torch.equal(alone[0][0], codes[row]) and alone[1][0, 0] == scale[0, row]
            assert zero is None or (alone[2] is not None and alone[2][0, 0] == zero[0, row])
    low, high = weight.double().amin(1), weight.double().amax(1)
    assert torch.allclose(asymmetric(weight, k)[1][0].double(), (high - low) / 15)


@pytest.mark.parametrize("name", ["w4a16", "w4a8"])
def test_smaller_groups_lose_less(name: str) -> None:
    weight = weights(48, 512)
    errors = [
        float((dequantized(packed(name, weight, group_size=g)) - weight).norm() / weight.norm())
        for g in (32, 64, 128, 512)
    ]
    assert errors == sorted(errors) and errors[0] < 0.12


# ------------------------------------------------------------------ two levels


def decoded(codes: Tensor, group: int) -> Tensor:
    """``(w4 - z) s2`` of int8 codes, int64."""
    small, scale, zero = second_level(codes, group)
    assert small.min() >= 0 and small.max() <= 15 and zero.min() >= 0 and zero.max() <= 15
    assert scale.min() >= 1
    k = codes.shape[1]
    return ((small - per_input(zero.t(), k)) * per_input(scale.t(), k)).long()


def test_two_levels_by_hand() -> None:
    rows = torch.tensor([[-119.0, 17, 0, 119, 3, 5, -2, 7, 60, 80, 100, 110]])
    t = packed("w4a8", rows / 2, group_size=4)
    # s1 = 59.5 / 119; groups: 238 / 15 -> 16, 119 / 16 -> 7; 9 / 15 -> 1, 2; 50 / 15 -> 3, below 0 -> 0
    assert t.scales[0].tolist() == [0.5]
    assert t.scales[1].flatten().tolist() == [16, 1, 3] and t.zeros[0].flatten().tolist() == [7, 2, 0]
    assert nibbles(t).tolist() == [[0, 8, 7, 14, 5, 7, 0, 9, 15, 15, 15, 15]]
    assert (dequantized(t) * 2).tolist() == [[-112, 16, 0, 112, 3, 5, -2, 7, 45, 45, 45, 45]]
    assert {part.dtype for part in (t.scales[1], t.zeros[0])} == {torch.int8}


def every_range() -> tuple[Tensor, Tensor]:
    """All values of every range within +-119, one range a row, and which ranges hold 0."""
    low, high = torch.meshgrid(torch.arange(-119, 120), torch.arange(-119, 120), indexing="ij")
    low, high = (t[low <= high][:, None] for t in (low, high))
    values = torch.maximum(low, torch.minimum(high, torch.arange(-119, 121)))
    return values.to(torch.int8), (low <= 0)[:, 0] & (high >= 0)[:, 0]


def test_every_group_decodes_to_int8_and_the_worst_error_is_14() -> None:
    values, around_zero = every_range()
    out = decoded(values, 240)
    assert out.min() >= -128 and out.max() <= 127
    assert (out - values)[around_zero].abs().max() == 14


def test_without_the_protective_range_it_overflows() -> None:
    assert decoded(torch.tensor([[-127, 17]], dtype=torch.int8), 2).tolist() == [[-130, 20]]


@settings(max_examples=80)
@given(
    groups=st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_weights_decode_to_int8(groups: list[list[float]], dtype: torch.dtype) -> None:
    weight = torch.tensor(groups, dtype=dtype).view(1, -1)
    op, (t,) = made("w4a8", [weight], group_size=4)
    whole = dequantized(t) / t.scales[0].double()[:, None]
    assert whole.min() >= -128 and whole.max() <= 127
    assert torch.equal(op.weight().double(), whole)  # nothing carried into a neighbour


@pytest.mark.parametrize(("k", "group"), [(96, 32), (36, 12), (24, 4), (12, 6), (4, 2), (32, 2), (576, 64)])
def test_codes_are_scaled_several_at_a_time_as_one_by_one(k: int, group: int) -> None:
    """Halves and groups that eight or four codes at a time divide, and those that they do not."""
    weight = weights(6, k)
    op, (t,) = made("w4a8", [weight], group_size=group)
    assert torch.equal(op.weight().double(), (dequantized(t) / t.scales[0].double()[:, None]).round())


@each_dtype
def test_first_level_keeps_to_the_protective_range(dtype: torch.dtype) -> None:
    weight = weights(12, 64, dtype)
    weight[5] = 0
    weight[6] *= 1e-7
    t = packed("w4a8", weight, group_size=32)
    step = t.scales[0].double()
    assert t.scales[0].dtype == (dtype if dtype.itemsize == 2 else torch.float32)
    absmax = weight.double().abs().amax(1).clamp(min=1e-5)
    unit = ROUNDING[t.scales[0].dtype]
    assert torch.allclose(step, absmax / 119, rtol=unit, atol=6e-8 * (unit > 2**-12))
    rows = (weight.double() / step[:, None]).round().clamp(-119, 119)
    whole = dequantized(t) / step[:, None]
    assert (whole - rows).abs().max() <= 14  # each group of these weights holds 0
    assert not whole[5].any()

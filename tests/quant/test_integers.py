"""Packing, rounding and products of integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quant.worlds import DTYPES, inputs

from servelab.plugins.quant._integers import (
    Scratch,
    integer_product,
    pack_halves,
    quantize_tokens,
    unpack_halves,
)


def random_codes(n: int, k: int, low: int, high: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (n, k), dtype=torch.int8, generator=rng)


def test_halves_by_hand() -> None:
    packed = pack_halves(torch.tensor([[1, 2, 3, 4], [15, 0, 9, 8]], dtype=torch.int8))
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.tolist() == [[0x31, 0x9F], [0x42, 0x80]]


@settings(max_examples=60)
@given(n=st.integers(1, 40), half=st.integers(1, 80), seed=st.integers(0, 99))
def test_packing_halves_comes_back(n: int, half: int, seed: int) -> None:
    codes = random_codes(n, 2 * half, 0, 15, seed)
    packed = pack_halves(codes)
    assert packed.shape == (half, n) and packed.nbytes == n * half
    assert torch.equal(torch.cat([packed.long() % 16, packed.long() // 16]).t(), codes.long())
    assert torch.equal(unpack_halves(packed), codes.t())
    out = torch.empty(2 * half, n, dtype=torch.int8)
    assert unpack_halves(packed, out) is out and torch.equal(out, codes.t())


@pytest.mark.parametrize(("tokens", "k", "n"), [(0, 64, 8), (1, 64, 7), (3, 576, 33), (65, 100, 12)])
def test_products_are_exact(tokens: int, k: int, n: int) -> None:
    x, weight = random_codes(tokens, k, -127, 127), random_codes(n, k, -128, 127, seed=1)
    for right in (weight.t(), weight.t().contiguous()):
        out = torch.empty(tokens, n, dtype=torch.int32)
        assert integer_product(x, right, out) is out
        assert torch.equal(out.long(), x.long() @ right.long())


def test_the_longest_sum_fits() -> None:
    k = 133_000  # 127 * 127 * k is just below 2^31
    x, weight = torch.full((2, k), 127, dtype=torch.int8), torch.full((k, 2), 127, dtype=torch.int8)
    weight[:, 1] = -127
    sums = integer_product(x, weight, torch.empty(2, 2, dtype=torch.int32))
    assert sums.tolist() == [[127 * 127 * k, -127 * 127 * k]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_tokens(dtype: torch.dtype) -> None:
    x = inputs(9, 64, dtype)
    x[3] = 0
    x[4] = 1e-6
    tokens = quantize_tokens(x)
    assert tokens.codes.dtype == torch.int8 and tokens.codes.shape == (9, 64)
    assert tokens.scale.dtype == torch.promote_types(dtype, torch.float32) and tokens.dtype == dtype
    absmax = x.double().abs().amax(1, keepdim=True)
    assert torch.allclose(tokens.scale.double() * 127, absmax.clamp(min=1e-5), rtol=1e-6)
    off = (tokens.codes * tokens.scale.double() - x.double()).abs()
    assert (off <= tokens.scale.double() * (0.5 + 1e-5)).all()
    largest = tokens.codes.abs().amax(1)
    assert largest.tolist() == [127, 127, 127, 0, 13, 127, 127, 127, 127]
    for i in range(9):  # whatever else is in the batch
        alone = quantize_tokens(x[i : i + 1])
        assert torch.equal(alone.codes[0], tokens.codes[i]) and torch.equal(alone.scale[0], tokens.scale[i])


def test_tokens_by_hand() -> None:
    tokens = quantize_tokens(torch.tensor([[0.5, -1.27, 0.013], [0.0, 0.0, 0.0]]))
    assert tokens.codes.tolist() == [[50, -127, 1], [0, 0, 0]]
    assert tokens.scale[0].item() == pytest.approx(0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_codes_of_tokens_that_are_no_numbers_are_defined(bad: float) -> None:
    tokens = quantize_tokens(torch.tensor([[1.0, bad, -3.0], [1.0, 2.0, -3.0]]))
    assert tokens.codes[0].tolist() == [0, 0, 0] and not tokens.scale[0].isfinite()
    assert tokens.codes[1].tolist() == [42, 85, -127]


def test_scratch_is_as_large_as_its_largest_use() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    small, large = scratch("a", (2, 3), torch.int8, cpu), scratch("a", (5, 4), torch.int8, cpu)
    assert small.shape == (2, 3) and large.shape == (5, 4)
    again = scratch("a", (4, 5), torch.int8, cpu)
    assert again.data_ptr() == large.data_ptr()
    for other in (scratch("b", (2,), torch.int8, cpu), scratch("a", (2,), torch.int16, cpu)):
        assert other.data_ptr() != again.data_ptr()

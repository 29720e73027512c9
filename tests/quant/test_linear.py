"""Quantized linears against products in float64 with the weights their codes stand for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.quant.worlds import (
    DTYPES,
    NAMES,
    ROUNDING,
    dequantized,
    inputs,
    made,
    per_input,
    quantizer,
    run,
    site,
    weights,
)
from torch import Tensor

from servelab.core.families.quant import QTensor
from servelab.plugins.quant._integers import integer_product
from servelab.plugins.quant.w4a16_impl import has_kernel, unpack_blocks

EIGHT = ("w8a8", "w4a8")
SIZES = (24, 8, 9)
WHOLE_BLOCKS = (64, 128)
"""Outputs that PyTorch's 4-bit kernel takes."""
K = 192
TOKENS = (0, 1, 2, 8, 9, 32, 33, 64, 65, 130)
"""On both sides of every limit at which operations change their way."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_name = pytest.mark.parametrize("name", NAMES)


def parts(dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    return [weights(n, K, dtype, seed) for seed, n in enumerate(sizes)]


def biases(dtype: torch.dtype) -> list[Tensor | None]:
    return [weights(1, SIZES[0], dtype, 7)[0], None, weights(1, SIZES[2], dtype, 8)[0]]


def as_quantized(x: Tensor) -> Tensor:
    """Fake quantization of each token in float32 (float64), as float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-5) / 127
    return (wide / scale).round().double() * scale.double()


def shifts(t: QTensor) -> Tensor:
    """``|8 - zero| * scale``, which PyTorch's 4-bit kernel takes rounded."""
    zeros = t.zeros[0] if t.zeros else torch.full(t.scales[0].shape, 8)
    return per_input((8 - zeros).abs() * t.scales[0].double(), K)


def check(name: str, x: Tensor, y: Tensor, tensors: list[QTensor], bias: Tensor | None = None) -> None:
    """Within what the roundings on the way may add up to."""
    weight = torch.cat([dequantized(t) for t in tensors])
    exact = x.double() if name not in EIGHT else as_quantized(x)
    product = exact @ weight.t()
    expected = product if bias is None else product + bias
    assert y.dtype == x.dtype and y.shape == expected.shape
    unit, wide = ROUNDING[x.dtype], ROUNDING[torch.promote_types(x.dtype, torch.float32)]
    bound = unit * expected.abs() + 4 * wide * (product.abs() + expected.abs())
    absolute = exact.abs() @ weight.abs().t()
    bound += K * 2.0**-52 * absolute  # of the expectation itself
    if name not in EIGHT:  # sums of floats; and weights or sums rounded to 16 bits
        bound += unit * product.abs() + K * wide * absolute
    if name == "w4a16":
        bound += unit * exact.abs() @ (weight.abs() + torch.cat([shifts(t) for t in tensors])).t()
    tiny = 2.0**-24 if x.dtype is torch.float16 else 0  # below its normal numbers
    assert ((y.double() - expected).abs() <= bound + tiny).all()


@each_dtype
@each_name
@pytest.mark.parametrize("sizes", [SIZES, WHOLE_BLOCKS])
def test_against_float64(sizes: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    op, tensors = made(name, parts(dtype, sizes))
    for tokens in TOKENS:
        x = inputs(tokens, K, dtype)
        check(name, x, run(op, x), tensors)


@each_dtype
@pytest.mark.parametrize("sizes", [SIZES, WHOLE_BLOCKS])
def test_symmetric_groups(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    op, tensors = made("w4a16", parts(dtype, sizes), symmetric=True, group_size=32)
    for tokens in TOKENS:
        x = inputs(tokens, K, dtype)
        check("w4a16", x, run(op, x), tensors)


@pytest.mark.skipif("avx512" not in torch.backends.cpu.get_cpu_capability().lower(), reason="needs AVX-512")
def test_the_four_bit_kernel_is_used_where_it_can_be() -> None:
    scale = torch.ones(2, 64, dtype=torch.bfloat16)
    assert has_kernel(64, 32, scale) and has_kernel(192, 128, scale)
    assert not has_kernel(65, 32, scale) and not has_kernel(64, 16, scale)
    assert not has_kernel(64, 32, scale.float()) and not has_kernel(64, 32, scale.half())
    codes = torch.randint(16, (128, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert packed.nbytes == 128 * 64 // 2
    assert torch.equal(unpack_blocks(packed, torch.empty(64, 128, dtype=torch.int8)).t(), codes)


@each_dtype
@each_name
def test_biases(name: str, dtype: torch.dtype) -> None:
    given = biases(dtype)
    op, tensors = made(name, parts(dtype), given)
    bias = torch.cat([torch.zeros(n) if b is None else b for b, n in zip(given, SIZES, strict=True)]).double()
    for tokens in (1, 20):
        x = inputs(tokens, K, dtype)
        check(name, x, run(op, x), tensors, bias)


@each_name
def test_it_is_near_the_unquantized_product(name: str) -> None:
    """Independent of how codes are read back."""
    weight, x = weights(64, K, torch.bfloat16), torch.randn(40, K, generator=torch.Generator().manual_seed(2))
    op, _ = made(name, [weight])
    exact = x.bfloat16().double() @ weight.double().t()
    error = (run(op, x.bfloat16()).double() - exact).norm() / exact.norm()
    assert error < (0.02 if name.startswith("w8") else 0.15)


@each_dtype
@each_name
def test_linears_side_by_side_equal_linears_alone(name: str, dtype: torch.dtype) -> None:
    given = biases(dtype)
    fused, tensors = made(name, parts(dtype), given)
    alone = [made(name, [w], [b])[0] for w, b in zip(parts(dtype), given, strict=True)]
    for tokens in (1, 9, 40):
        x = inputs(tokens, K, dtype)
        together, apart = run(fused, x), torch.cat([run(op, x) for op in alone], 1)
        if name in EIGHT:
            assert torch.equal(together, apart)
        else:  # sums of floats may be ordered otherwise
            bias = torch.cat([torch.zeros(n) if b is None else b for b, n in zip(given, SIZES, strict=True)])
            check(name, x, apart, tensors, bias.double())
            check(name, x, together, tensors, bias.double())


@each_dtype
@pytest.mark.parametrize("name", EIGHT)
def test_a_token_does_not_depend_on_its_batch(name: str, dtype: torch.dtype) -> None:
    op, _ = made(name, parts(dtype), biases(dtype))
    x = inputs(130, K, dtype)
    x[::7] *= 100
    whole = run(op, x)
    for i in (0, 1, 63, 64, 129):
        assert torch.equal(run(op, x[i : i + 1])[0], whole[i])
    assert torch.equal(run(op, x.flip(0)), whole.flip(0))


@pytest.mark.parametrize("name", EIGHT)
def test_integer_path_equals_fake_quantization(name: str) -> None:
    """The accumulator bit by bit, and what is made of it."""
    op, tensors = made(name, parts(torch.float32))
    x = inputs(20, K)
    tokens = op.prepare(x)
    weight = torch.cat([dequantized(t) / t.scales[0].double()[:, None] for t in tensors])
    scale = torch.cat([t.scales[0] for t in tensors])
    faked = (as_quantized(x) / tokens.scale.double()).round() @ weight.round().t()  # exact below 2^53
    codes = (torch.cat([t.codes[0] for t in tensors]) if name == "w8a8" else op.weight().clone()).t()
    sums = integer_product(tokens.codes, codes, torch.empty(20, sum(SIZES), dtype=torch.int32))
    assert torch.equal(sums.double(), faked)
    assert torch.equal(op.apply(tokens), faked.float() * tokens.scale * scale)


@each_dtype
@each_name
def test_zeros(name: str, dtype: torch.dtype) -> None:
    weight = weights(16, K, dtype)
    weight[3] = 0
    op, _ = made(name, [weight])
    for tokens in (1, 20):
        x = inputs(tokens, K, dtype)
        x[0] = 0
        y = run(op, x)
        assert not y[0].any() and not y[:, 3].any() and y.isfinite().all()


@each_dtype
@each_name
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(name: str, dtype: torch.dtype, bad: float) -> None:
    op, tensors = made(name, parts(dtype))
    for tokens in (3, 20):
        x = inputs(tokens, K, dtype)
        good = torch.ones(tokens, dtype=torch.bool)
        good[1] = False
        x[1, 5] = bad
        y = run(op, x)
        # a weight of 0 times infinity is NaN, others infinite; nothing finite comes of it
        assert not y[1].isfinite().any()
        check(name, x[good], y[good], tensors)


@each_dtype
@each_name
def test_weights_that_are_no_numbers_show(name: str, dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf")):
        weight = weights(16, K, dtype)
        weight[3, 7] = bad
        op, _ = made(name, [weight])
        for tokens in (1, 20):
            y = run(op, inputs(tokens, K, dtype))
            assert not y[:, 3].isfinite().any()
            assert y[:, [i for i in range(16) if i != 3]].isfinite().all()


@each_name
def test_operations_do_not_disturb_each_other(name: str) -> None:
    """They share memory, but neither results nor prepared inputs lie in it."""
    impl = quantizer(name).load()
    made = []
    for n, k in ((24, 64), (8, 128), (24, 64)):
        s = site(n, k)
        made.append(
            impl.linear([s], [impl.pack(s, weights(n, k, torch.bfloat16, n + k), None, None)], [None], "cpu")
        )
    xs = [inputs(70, k, torch.bfloat16, seed) for seed, k in enumerate((64, 128, 64))]
    expected = [run(op, x).clone() for op, x in zip(made, xs, strict=True)]
    prepared = [op.prepare(x) for op, x in zip(made, xs, strict=True)]
    results = [op.apply(p) for op, p in reversed(list(zip(made, prepared, strict=True)))][::-1]
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


@each_name
def test_memory_does_not_grow_with_layers(name: str) -> None:
    impl = quantizer(name).load()

    def add_layer() -> int:
        s = site(24, 64)
        op = impl.linear([s], [impl.pack(s, weights(24, 64, torch.bfloat16), None, None)], [None], "cpu")
        run(op, inputs(70, 64, torch.bfloat16))
        return sum(block.nbytes for block in impl._scratch._blocks.values())

    assert len({add_layer() for _ in range(4)}) == 1


@each_name
def test_float_inputs_with_strides(name: str) -> None:
    op, tensors = made(name, parts(torch.bfloat16))
    wide = inputs(6, 2 * K, torch.bfloat16)
    check(name, wide[:, :K], run(op, wide[:, :K]), tensors)
    check(name, wide[::2, K:], run(op, wide[::2, K:]), tensors)


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_float16_does_not_overflow(name: str) -> None:
    """Unscaled sums would leave its range; the result does not."""
    weight = weights(8, K, torch.float16).abs() * 0.01
    op, _ = made(name, [weight])
    for tokens in (1, 40):
        y = run(op, torch.full((tokens, K), 2000.0, dtype=torch.float16))
        assert y.isfinite().all()

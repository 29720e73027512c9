"""The halves without torch: which layers, which format, what it costs, what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.quant.worlds import NAMES, SMOLLM2, model, quantizer, site, weights

from servelab.core.errors import ConfigError
from servelab.core.families.quant import ScaleLevel, WeightFormat
from servelab.core.registry import Registry
from servelab.core.sites import linear_sites
from servelab.plugins.quant import QUANTIZERS

GROUPED = ("w4a16", "w4a8")
BF16 = model(torch.bfloat16)


def test_they_import_without_torch(repository: Path) -> None:
    blocked = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub")
    code = (
        f"import sys; sys.path.insert(0, {str(repository / 'src')!r})\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import importlib\n"
        f"for name in {NAMES!r}: importlib.import_module('servelab.plugins.quant.' + name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_they_declare() -> None:
    assert tuple(spec.name for spec in QUANTIZERS) == NAMES
    registry = Registry.load()
    for spec in QUANTIZERS:
        assert registry.unavailable(spec) is None and spec.runs == ("torch", "sim")
        assert spec.requires == {"executor.quant"} and not spec.imports
        eight = "quant.activations" in spec.provides
        assert "quant.weights" in spec.provides and eight == spec.name.endswith("a8")
        assert quantizer(spec.name).caps.batch_invariant == eight  # sums of integers have no order


def test_formats() -> None:
    per_row = (ScaleLevel(group=None, bits=32),)
    assert quantizer("w8a16").format(site(8, 64), BF16) == WeightFormat(kind="int", bits=8, scales=per_row)
    assert quantizer("w8a8").format(site(8, 64), BF16) == WeightFormat(
        kind="int", bits=8, scales=per_row, act_bits=8
    )
    for dtype, bits in ((torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 32), (torch.float64, 32)):
        zero = ScaleLevel(group=64, bits=bits, zero_bits=8, zero="int")
        w4a16 = quantizer("w4a16", dtype, group_size=64)
        assert w4a16.format(site(8, 64), model(dtype)) == WeightFormat(kind="int", bits=4, scales=(zero,))
        w4a16 = quantizer("w4a16", dtype, group_size=64, symmetric=True)
        plain = (ScaleLevel(group=64, bits=bits),)
        assert w4a16.format(site(8, 64), model(dtype)) == WeightFormat(kind="int", bits=4, scales=plain)
        levels = ScaleLevel(group=None, bits=bits), ScaleLevel(group=64, bits=8, zero_bits=8, zero="int")
        assert quantizer("w4a8", dtype).format(site(8, 64), model(dtype)) == WeightFormat(
            kind="int", bits=4, scales=levels, act_bits=8
        )
    shown = [str(quantizer(name).format(site(8, 576), BF16)) for name in NAMES]
    assert shown == ["w8a16", "w4a16 g64", "w8a8", "w4a8 g64"]


@pytest.mark.parametrize("name", GROUPED)
def test_the_first_group_that_divides_is_taken(name: str) -> None:
    def group(k: int, **settings: Any) -> int | None:
        format = quantizer(name, **settings).format(site(8, k), BF16)
        return format.scales[-1].group  # type: ignore[no-any-return]

    assert [group(k) for k in (576, 1536, 4096, 96)] == [64, 128, 128, 32]
    assert group(4096, group_size=[32, 128]) == 32
    assert group(576, group_size=64) == 64 and group(100, group_size=[128, 50]) == 50


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(
    ("k", "sizes", "listed", "do"),
    [
        (100, None, "[128,64,32]", "quant.group_size=[128,64,32,4]; or "),
        (576, 128, "[128]", "quant.group_size=[128,64]; or "),
        (576, [128], "[128]", "quant.group_size=[128,64]; or "),
        (33, None, "[128,64,32]", "leave such layers as they are: quant.skip=[down]"),
    ],
)
def test_groups_that_do_not_divide(name: str, k: int, sizes: Any, listed: str, do: str) -> None:
    settings = {} if sizes is None else {"group_size": sizes}
    with pytest.raises(ConfigError) as error:
        quantizer(name, **settings).format(site(8, k, name="mlp.down_proj", role="down"), BF16)
    assert error.value.what == "no group size divides the inputs of mlp.down_proj"
    assert error.value.where == f"quant {name!r}, linear mlp.down_proj (down)"
    assert f"k={k} " in error.value.why and listed in error.value.why
    assert do in error.value.do
    if "; or " in do:  # what it advises works
        advised = [int(size) for size in do.partition("[")[2].partition("]")[0].split(",")]
        assert quantizer(name, group_size=advised).format(site(8, k), BF16)


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 33}, {"group_size": 0}, {"group_size": -32}, {"group_size": []},
        {"group_size": [64, 31]}, {"group_size": "x"}, {"skip": ["nobody"]}, {"group": 64},
        {"head": "perhaps"},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    for name in GROUPED:
        with pytest.raises(ValidationError):
            quantizer(name, **wrong)
    for name in ("w8a16", "w8a8"):
        with pytest.raises(ValidationError):
            quantizer(name, **wrong)


@pytest.mark.parametrize("name", NAMES)
def test_head_and_skipped_roles_stay_as_they_are(name: str) -> None:
    def left(**settings: Any) -> set[str]:
        made = quantizer(name, **settings)
        return {s.role for s in linear_sites(BF16) if made.format(s, BF16) is None}

    assert left() == {"head"} and left(head=True) == set()
    assert left(skip=["down", "o"]) == {"head", "down", "o"}
    experts = replace(BF16, experts=2, experts_per_token=1)
    made = quantizer(name)
    assert all(made.format(s, experts) for s in linear_sites(experts) if s.role != "head")


def test_refuses_all_but_its_own_formats() -> None:
    for name in NAMES:
        made = quantizer(name)
        for dtype in (torch.bfloat16, torch.float32):
            for s in linear_sites(SMOLLM2):
                if own := quantizer(name, dtype).format(s, model(dtype)):
                    assert made.refuses(own, s.n, s.k, None) is None
        own = made.format(site(8, 64), BF16)
        others = [quantizer(other).format(site(8, 64), BF16) for other in NAMES if other != name]
        others += [
            replace(own, kind="float"), replace(own, slices=(own.bits / 2, own.bits / 2)),
            replace(own, bits=3), replace(own, act_bits=6), replace(own, act_per="tensor"),
            replace(own, act_static=True), replace(own, scales=()),
            replace(own, scales=(*own.scales, ScaleLevel(group=32))),
        ]  # fmt: skip
        for other in others:
            assert f"quant {name!r} runs {own}" in made.refuses(other, 8, 64, None), other
    for name in GROUPED:
        own = quantizer(name).format(site(8, 64), BF16)
        assert quantizer(name).refuses(own, 8, 96, None) == "96 inputs are no multiple of a group of 64"
    for symmetric in (False, True):
        own = quantizer("w4a16", symmetric=symmetric).format(site(8, 64), BF16)
        assert quantizer("w4a16", symmetric=not symmetric).refuses(own, 8, 64, None) is None


# ----------------------------------------------------------------------- costs


def test_cost_by_hand() -> None:
    """A linear of 8 outputs and 64 inputs, 3 tokens, bfloat16."""
    s = site(8, 64)
    output = 3 * 8 * 2
    dense, codes8, codes4 = 8 * 64 * 2, 8 * 64, 8 * 64 // 2
    read, quantized = 3 * 64 * 2, 3 * (64 + 4)
    activations8 = read + 2 * quantized + output
    expected = {
        "w8a16": (codes8 + 8 * 4 + read + output, 16, 1),
        "w4a16": (codes4 + 8 * (2 + 1) + read + output, 16, 1),
        "w8a8": (codes8 + 8 * 4 + activations8, 8, 2),
        "w4a8": (codes4 + 8 * 2 + 8 * (1 + 1) + activations8, 8, 2),
    }
    for name, (nbytes, math_bits, launches) in expected.items():
        cost = quantizer(name).cost(s, 3, BF16, None)
        assert (cost.device_bytes, cost.math_bits, cost.launches) == (nbytes, math_bits, launches), name
        assert cost.flops == 2 * 3 * 8 * 64 and cost.host_bytes == cost.net_bytes == 0
        left = quantizer(name, skip=["q"]).cost(s, 3, BF16, None)
        assert (left.device_bytes, left.math_bits, left.launches) == (dense + read + output, 16, 1)
    wide = quantizer("w8a16", torch.float32).cost(s, 3, model(torch.float32), None)
    assert wide.math_bits == 32 and wide.device_bytes == codes8 + 32 + 2 * (read + output)


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_an_input_is_quantized_once_for_all_that_share_it(name: str) -> None:
    made, alone = quantizer(name), site(8, 64)
    shared = replace(alone, shares_input=("b", "c"))
    once = 3 * 64 * 2 + 3 * (64 + 4)
    saved = made.cost(alone, 3, BF16, None).device_bytes - made.cost(shared, 3, BF16, None).device_bytes
    assert 3 * saved == 2 * once


@settings(max_examples=40)
@given(tokens=st.lists(st.integers(0, 5000), min_size=2, max_size=6), share=st.booleans())
def test_cost_grows_with_tokens(tokens: list[int], share: bool) -> None:
    s = site(96, 128, shares_input=("other",) if share else ())
    for name in NAMES:
        costs = [quantizer(name).cost(s, n, BF16, None) for n in sorted(tokens)]
        for a, b in pairwise(costs):
            assert a.flops <= b.flops and a.device_bytes <= b.device_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_packed_tensors(name: str, dtype: torch.dtype) -> None:
    for symmetric in (False, True) if name == "w4a16" else (False,):
        settings = {"symmetric": True} if symmetric else {}
        made = quantizer(name, dtype, **settings)
        impl = made.load()
        for n, k in ((7, 64), (6, 128), (10, 576)):
            t = impl.pack(site(n, k), weights(n, k, dtype), None, None)
            stored = sum(tensor.nbytes for tensor in (*t.codes, *t.scales, *t.zeros))
            assert t.format == made.format(site(n, k), model(dtype)) and t.shape == (n, k)
            assert (
                stored == t.format.nbytes(n, k) == made.cost(site(n, k), 0, model(dtype), None).device_bytes
            )
            assert all(tensor.is_contiguous() for tensor in (*t.codes, *t.scales, *t.zeros))

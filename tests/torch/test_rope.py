"""Rotary embeddings: the frequencies transformers computes, and what a rotation is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from servelab.plugins.executors.checkpoint.rope import rope
from servelab.plugins.executors.torch.rope import TYPES, RotaryEmbedding, frequencies

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default-500k": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-2.5": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 1024},
    "llama3.1": {
        "rope_type": "llama3",
        **LLAMA3,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama3.2": {
        "rope_type": "llama3",
        **LLAMA3,
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": YARN,
    "yarn-of-the-ratio": {**YARN, "factor": None},
    "yarn-theta": {**YARN, "rope_theta": 1e6},
    "yarn-shorter": {**YARN, "factor": 0.5},
    "yarn-attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn-mscale": {**YARN, "mscale": 0.8},
    "yarn-mscales": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.7},
    "yarn-attention_factor-mscales": {**YARN, "attention_factor": 0.9, "mscale": 0.8, "mscale_all_dim": 1.7},
    "yarn-whole": {**YARN, "truncate": False},
    "yarn-truncated": {**YARN, "truncate": True},
    "yarn-betas": {**YARN, "beta_fast": 20.0, "beta_slow": 0.5},
    "yarn-betas-whole": {**YARN, "beta_fast": 64, "beta_slow": 2, "truncate": False},
    "yarn-no-ramp": {**YARN, "beta_fast": 5.0, "beta_slow": 5.0, "truncate": False},
    "yarn-trained-short": {**YARN, "original_max_position_embeddings": 32},
}


def reference(parameters: dict[str, Any], head_dim: int) -> tuple[dict[str, Any], Any]:
    """config.json of a Llama model with these, and transformers' embedding (``ROPE_INIT_FUNCTIONS``)."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 10000.0, **parameters},
    )
    written = config.to_dict()
    return written, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    config, theirs = reference(CASES[name], head_dim)
    ours, our_scale = frequencies(rope(config, "config.json"), head_dim)
    assert ours.dtype == torch.float64 and ours.shape == (head_dim // 2,)
    assert our_scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=1e-6, atol=0)


def test_every_type_is_compared() -> None:
    assert {case["rope_type"] for case in CASES.values()} == set(TYPES)


def embedding(name: str, dtype: torch.dtype, head_dim: int = 16) -> RotaryEmbedding:
    config, _ = reference(CASES[name], head_dim)
    return RotaryEmbedding(rope(config, "config.json"), head_dim, dtype)


@pytest.mark.parametrize("name", CASES)
def test_a_float64_rotation_is_a_product_of_complex_numbers(name: str) -> None:
    rotary = embedding(name, torch.float64)
    x = torch.randn(5, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 1, 77, 4095, 2])
    got = rotary.turn(x, rotary.angles(at))
    phase = torch.polar(torch.tensor(rotary.scale, dtype=torch.float64), at[:, None] * rotary.frequencies)
    expected = torch.complex(*x.split(8, -1)) * phase[:, None]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-12)
    # norms, pair by pair, change by the scale only
    pairs = torch.complex(*got.split(8, -1)).abs() / torch.complex(*x.split(8, -1)).abs()
    torch.testing.assert_close(pairs, torch.full_like(pairs, rotary.scale), rtol=1e-12, atol=0)


@settings(max_examples=50)
@given(
    name=st.sampled_from(sorted(CASES)),
    a=st.integers(0, 2000),
    b=st.integers(0, 2000),
    shift=st.integers(0, 2000),
)
def test_products_depend_on_distances(name: str, a: int, b: int, shift: int) -> None:
    rotary = embedding(name, torch.float64)
    q, k = torch.randn(2, 1, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(a))

    def product(i: int, j: int) -> Tensor:
        turned = [rotary.turn(x, rotary.angles(torch.tensor([p]))) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(product(a, b), product(a + shift, b + shift), rtol=0, atol=1e-10)
    if a != b:  # and on their sign
        assert not torch.allclose(product(a, b), product(b, a), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn"])
def test_turning_is_that_of_transformers(name: str, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, theirs = reference(CASES[name], 16)
    x = torch.randn(300, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = theirs(x, torch.arange(300)[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    rotary = embedding(name, dtype)
    rotary.frequencies = theirs.inv_freq.double()
    got = rotary.turn(x, rotary.angles(torch.arange(300)))
    assert got.dtype == dtype and got.data_ptr() != x.data_ptr()
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_position_zero_turns_nothing() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rotary, x = embedding("default", dtype), torch.arange(4 * 2 * 16).view(4, 2, 16).to(dtype)
        assert torch.equal(rotary.turn(x, rotary.angles(torch.zeros(4, dtype=torch.int64))), x)


def test_angles_of_far_positions_are_computed_in_float32() -> None:
    """In bfloat16 itself 4001 and 4003 would be one position."""
    rotary, exact = embedding("default", torch.bfloat16), embedding("default", torch.float64)
    at = torch.tensor([4001, 4003, 131071])
    for ours, theirs in zip(rotary.angles(at), exact.angles(at), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-2)

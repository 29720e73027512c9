"""Quantized linears in the decoder: which, how they are joined, what they hold, and who may run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.torch.models import attention, decoder, facts, layout, llama, rows
from tests.torch.quantizers import Plain
from torch import Tensor

from servelab.core.errors import PluginError
from servelab.core.families.quant import QTensor
from servelab.core.sites import linear_bytes, linear_sites
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.quantize import SideBySide, quantize

IDS = torch.tensor([5, 17, 3, 60, 2, 9, 33])
BIASED = {"attention_bias": True, "mlp_bias": True}


def logits(d: Decoder) -> Tensor:
    model = facts(d)
    kv = layout(model, 16)
    attend, _ = attention(d, model, kv, 1)
    with torch.inference_mode():
        return d.head(d.run(d.embed(IDS), attend, attend.plan(rows((0, len(IDS), [0])), ())))


def quantized(plain: Plain, **changes: Any) -> tuple[Decoder, dict[str, Any]]:
    d = decoder(llama(4, **changes), torch.float64)
    with torch.inference_mode():
        return d, quantize(d, plain, facts(d))


@pytest.mark.parametrize("changes", [{}, BIASED, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("left_out", [(), ("k",), ("q", "v"), ("down", "up"), ("gate",)])
def test_weights_kept_as_they_are_change_nothing(changes: dict[str, Any], left_out: tuple[str, ...]) -> None:
    plain = decoder(llama(4, **changes), torch.float64)
    other, _ = quantized(Plain(left_out=left_out), **changes)
    assert torch.allclose(logits(other), logits(plain), rtol=0, atol=1e-12)


def test_each_linear_gets_its_own_weight_in_its_place() -> None:
    """Halved weights of one role in the packed model and in the checkpoint's are the same model."""
    for role, name in {
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "up": "up_proj",
        "down": "down_proj",
    }.items():
        source = llama(4, **BIASED)
        with torch.no_grad():
            for key, parameter in source.named_parameters():
                if key.endswith(f"{name}.weight"):
                    parameter /= 2
        everything = {site.role for site in linear_sites(facts(decoder(source, torch.float64)))}
        halves = Plain(lambda w: w / 2, left_out=tuple(everything - {role}))
        other, _ = quantized(halves, **BIASED)
        assert torch.allclose(logits(other), logits(decoder(source, torch.float64)), rtol=0, atol=1e-12), role


def test_an_input_is_prepared_once_for_all_that_read_it() -> None:
    plain = Plain()
    d, _ = quantized(plain)
    logits(d)
    layers = d.config.layers
    assert plain.calls == {"prepare": 4 * layers, "apply": 4 * layers}
    name = "model.layers.0.self_attn"
    assert plain.fused[:2] == [(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"), (f"{name}.o_proj",)]


def test_mixed_formats_stand_side_by_side() -> None:
    d, memory = quantized(Plain(left_out=("k",)))
    assert isinstance(d.layers[0].qkv, SideBySide)
    assert memory["formats"] == {"w64a16": 6 * d.config.layers, "unquantized": d.config.layers + 1}


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_counted(tied: bool) -> None:
    d, memory = quantized(Plain(left_out=("o",)), tie_word_embeddings=tied)
    head = 0 if tied else d.embedding.nbytes
    assert memory["dense_bytes"] == linear_bytes(facts(d), None) + head
    assert (memory["packed_bytes"], memory["tied_head_bytes"]) == (memory["dense_bytes"], 0)
    assert d.nbytes == sum(t.nbytes for t in llama(4, tie_word_embeddings=tied).double().parameters())


def test_a_weight_that_takes_more_than_its_format_says_is_refused() -> None:
    class Larger(Plain):
        def pack(self, site: Any, weight: Tensor, bias: Any, state: Any) -> QTensor:
            packed = super().pack(site, weight, bias, state)
            return QTensor(format=packed.format, shape=packed.shape, codes=(torch.cat([weight, weight]),))

    with pytest.raises(
        PluginError, match=r"packed weight of model\.layers\.0\.self_attn\.q_proj takes"
    ) as error:
        quantized(Larger())
    assert "w64a16" in str(error.value)

"""FLOPs and weights of the roofline against what torch counts in transformers' own models.

Small shapes of the same architectures, in which no two widths are equal: a width taken for another changes
the count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tests.costmodels.rooflines import device, ideal

from servelab.core.facts import ModelFacts
from servelab.core.sites import parameters
from servelab.core.testing.cost import batch_of

torch = pytest.importorskip("torch", reason="FLOPs are counted by torch")
transformers = pytest.importorskip("transformers", reason="in transformers' models")

ATTENTION = ("attention_chunk", "attention_decode")
OUTSIDE = ("elementwise", "kv_write", "embedding")
"""What torch's counter leaves out, besides attention, which it counts without the causal mask."""

GROUPED = ModelFacts(
    name="small",
    layers=3,
    hidden=48,
    heads=6,
    kv_heads=2,
    head_dim=10,
    ffn=70,
    vocab=131,
    max_position=256,
    dtype="float32",
    dtype_bytes=4.0,
)
PLAIN = replace(GROUPED, kv_heads=6, head_dim=8, gated=False)
ROUTED = replace(GROUPED, ffn=22, experts=8, experts_per_token=3)
LATENT = replace(
    ROUTED,
    kv_heads=6,
    head_dim=20,
    shared_experts=2,
    dense_layers=(0,),
    dense_ffn=70,
    kv_latent=26,
    q_latent=34,
    rope_dim=6,
    v_dim=12,
)


def shared(of: ModelFacts) -> dict[str, Any]:
    return {
        "vocab_size": of.vocab,
        "hidden_size": of.hidden,
        "num_hidden_layers": of.layers,
        "num_attention_heads": of.heads,
        "num_key_value_heads": of.kv_heads,
        "max_position_embeddings": of.max_position,
    }


def llama(of: ModelFacts) -> Any:
    return transformers.LlamaConfig(**shared(of), head_dim=of.head_dim, intermediate_size=of.ffn)


def opt(of: ModelFacts) -> Any:
    own = {"ffn_dim": of.ffn, "word_embed_proj_dim": of.hidden, "tie_word_embeddings": False}
    return transformers.OPTConfig(**shared(of), **own)


def mixtral(of: ModelFacts) -> Any:
    return transformers.MixtralConfig(
        **shared(of),
        head_dim=of.head_dim,
        intermediate_size=of.ffn,
        num_local_experts=of.experts,
        num_experts_per_tok=of.experts_per_token,
    )


def deepseek(of: ModelFacts) -> Any:
    return transformers.DeepseekV3Config(
        **shared(of),
        intermediate_size=of.dense_ffn,
        moe_intermediate_size=of.ffn,
        n_routed_experts=of.experts,
        num_experts_per_tok=of.experts_per_token,
        n_shared_experts=of.shared_experts,
        first_k_dense_replace=len(of.dense_layers),
        n_group=1,
        topk_group=1,
        kv_lora_rank=of.kv_latent,
        q_lora_rank=of.q_latent,
        qk_rope_head_dim=of.rope_dim,
        qk_nope_head_dim=of.head_dim - of.rope_dim,
        v_head_dim=of.v_dim,
    )


KINDS: dict[str, tuple[ModelFacts, Callable[[ModelFacts], Any]]] = {
    "grouped queries": (GROUPED, llama),
    "no gate": (PLAIN, opt),
    "experts": (ROUTED, mixtral),
    "latent attention, shared experts": (LATENT, deepseek),
}


@cache
def built(kind: str) -> Any:
    of, config = KINDS[kind]
    torch.manual_seed(0)
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config(of), **ways).eval()


def counted(kind: str, tokens: int, rows: int = 1) -> dict[str, float]:
    """FLOPs of prompts with logits of their last token: products of activations, and all others."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        built(kind)(torch.arange(tokens).repeat(rows, 1), use_cache=False, logits_to_keep=1)
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm", 0)
    return {"attention": attention, "linears": sum(found.values())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rows"), [(23, 1), (7, 3)])
def test_flops_are_those_that_torch_counts(kind: str, tokens: int, rows: int) -> None:
    step = ideal(KINDS[kind][0], device("a100_80g")).breakdown(batch_of([(tokens, 0)] * rows))
    flops = {one.name: 0.0 for one in step.operations}
    for one in step.operations:
        flops[one.name] += one.count * one.work.flops
    theirs = counted(kind, tokens, rows)
    assert sum(n for name, n in flops.items() if name not in ATTENTION + OUTSIDE) == theirs["linears"]
    causal = (tokens + 1) / 2 / tokens  # of all pairs of a query and a key
    assert sum(flops.get(name, 0) for name in ATTENTION) == pytest.approx(theirs["attention"] * causal)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_read_by_a_prompt_are_all_matrices(kind: str) -> None:
    """With so many tokens every expert is chosen; embeddings, norms and biases apart."""
    of, matrices = KINDS[kind][0], 0
    for name, weight in built(kind).named_parameters():
        matrices += 0 if weight.dim() == 1 or "embed_" in name else weight.numel()
    step = ideal(of, device("a100_80g")).breakdown(batch_of([(200, 0)]))
    read = sum(one.count * one.work.weight_bytes for one in step.operations if one.name != "embedding")
    assert read == pytest.approx(matrices * of.dtype_bytes, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model_without_biases_and_positions(kind: str) -> None:
    named = built(kind).named_parameters()
    theirs = sum(w.numel() for name, w in named if not name.endswith("bias") and "positions" not in name)
    assert parameters(KINDS[kind][0]) == theirs

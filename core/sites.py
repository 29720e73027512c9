"""The linear layers of a decoder, from its shape alone: what a quantizer is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from servelab.core.facts import ModelFacts
from servelab.core.families.quant import LinearSite, Quantizer, Role


def linear_sites(model: ModelFacts) -> Iterator[LinearSite]:
    """Every linear of a decoder under its Hugging Face name, layer by layer, the head last.

    Linears that share their input follow one another: q, k, v; gate, up. Experts are named one by one, as in
    Qwen3-MoE. Routers of experts are no sites.
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        attention, norm = f"{name}.self_attn", f"{name}.input_layernorm"
        parts: dict[Role, int] = {"q": q, "k": kv, "v": kv}
        yield from _sharing(parts, attention, layer, model.hidden, norm)
        yield from _sharing({"o": model.hidden}, attention, layer, q, f"{attention}.v_proj")
        norm = f"{name}.post_attention_layernorm"
        mlp, dense = f"{name}.mlp", not model.experts or layer in model.dense_layers
        if dense:
            ffn = model.dense_ffn if model.experts else model.ffn
            yield from _sharing({"gate": ffn, "up": ffn}, mlp, layer, model.hidden, norm)
            yield from _sharing({"down": model.hidden}, mlp, layer, ffn, f"{mlp}.up_proj")
        for expert in range(0 if dense else model.experts):
            one = f"{mlp}.experts.{expert}"
            parts = {"expert_gate": model.ffn, "expert_up": model.ffn}
            yield from _sharing(parts, one, layer, model.hidden, norm)
            yield from _sharing({"expert_down": model.hidden}, one, layer, model.ffn, f"{one}.up_proj")
    yield LinearSite(
        name="lm_head", layer=-1, role="head", n=model.vocab, k=model.hidden, producer="model.norm"
    )


def linear_bytes(model: ModelFacts, quantizer: Quantizer | None) -> int:
    """Bytes of the linears of all layers as a quantizer stores them, with the head where it quantizes that
    (else it may be the embedding, and take no bytes of its own); None: unquantized.
    """
    total = 0
    for site in linear_sites(model):
        format = quantizer.format(site, model) if quantizer else None
        if site.role == "head" and format is None:
            continue
        total += format.nbytes(site.n, site.k) if format else int(site.n * site.k * model.dtype_bytes)
    return total


def weight_bytes(model: ModelFacts, quantizer: Quantizer | None) -> int:
    """Bytes of the whole model: linears as ``linear_bytes``, embedding, unquantized head, norms, routers."""
    width = model.dtype_bytes
    head = next(site for site in linear_sites(replace(model, layers=0)) if site.role == "head")
    table = model.vocab * model.hidden * width
    own_head = not model.tied_embeddings and (quantizer is None or quantizer.format(head, model) is None)
    routers = (model.layers - len(model.dense_layers)) * model.experts * model.hidden * width
    norms = (2 * model.layers + 1) * model.hidden * width
    return linear_bytes(model, quantizer) + int(table * (2 if own_head else 1) + routers + norms)


def _sharing(
    outputs: dict[Role, int], module: str, layer: int, k: int, producer: str
) -> Iterator[LinearSite]:
    """Linears of one module that read one input; several are judged by the module's output."""
    names = {role: f"{module}.{role.removeprefix('expert_')}_proj" for role in outputs}
    for role, n in outputs.items():
        yield LinearSite(
            name=names[role],
            layer=layer,
            role=role,
            n=n,
            k=k,
            producer=producer,
            shares_input=tuple(name for other, name in names.items() if other != role),
            inspected=module if len(names) > 1 else names[role],
        )

"""A decoder from its shape alone: its linear layers, which quantizers are asked about, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from servelab.core.facts import ModelFacts
from servelab.core.families.quant import LinearSite, Quantizer, Role


def linear_sites(model: ModelFacts) -> Iterator[LinearSite]:
    """Every linear of a decoder under its Hugging Face name, layer by layer, the head last.

    Linears that share their input follow one another: q, k, v; gate, up. Experts are named one by one, as in
    Qwen3-MoE; latent attention and shared experts as in DeepSeek-V3. Routers of experts are no sites.
    """
    value = model.v_dim or model.head_dim
    q, k, v = model.heads * model.head_dim, model.kv_heads * model.head_dim, model.kv_heads * value
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        attention, norm = f"{name}.self_attn", f"{name}.input_layernorm"
        if model.kv_latent:
            yield from _latent(model, attention, layer, norm)
        else:
            yield from _sharing({"q": q, "k": k, "v": v}, attention, layer, model.hidden, norm)
        last = "kv_b_proj" if model.kv_latent else "v_proj"
        yield from _sharing({"o": model.hidden}, attention, layer, model.heads * value, f"{attention}.{last}")
        norm, mlp = f"{name}.post_attention_layernorm", f"{name}.mlp"
        if not model.experts or layer in model.dense_layers:
            ffn = model.dense_ffn if model.experts else model.ffn
            yield from _feed_forward(model, mlp, layer, ffn, norm)
            continue
        for expert in range(model.experts):
            yield from _feed_forward(model, f"{mlp}.experts.{expert}", layer, model.ffn, norm, expert=True)
        if model.shared_experts:
            shared = model.shared_experts * model.ffn
            yield from _feed_forward(model, f"{mlp}.shared_experts", layer, shared, norm)
    yield LinearSite(
        name="lm_head", layer=-1, role="head", n=model.vocab, k=model.hidden, producer="model.norm"
    )


def parameters(model: ModelFacts, *, active: bool = False) -> int:
    """Weights of the whole model, without biases: linears, embedding, head, norms, routers.

    Args:
        model: the shape.
        active: count only what one token runs through, as published figures do: of the experts those it is
            sent to; the embedding with them.
    """
    idle = model.experts - model.experts_per_token if active and model.experts else 0
    unused = (model.layers - len(model.dense_layers)) * idle * (3 if model.gated else 2)
    plain = replace(model, dtype_bytes=1)
    return weight_bytes(plain, None) - unused * model.ffn * model.hidden


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
    latents = model.layers * (model.q_latent + model.kv_latent) if model.kv_latent else 0
    norms = ((2 * model.layers + 1) * model.hidden + latents) * width
    return linear_bytes(model, quantizer) + int(table * (2 if own_head else 1) + routers + norms)


def kv_share(model: ModelFacts, tp: int) -> float:
    """Of a token's KV, what each of ``tp`` devices keeps: whole heads, copied where devices are more; a
    latent, which all heads read, is on every device.
    """
    return 1.0 if model.kv_latent else ceil(model.kv_heads / tp) / model.kv_heads


def _latent(model: ModelFacts, attention: str, layer: int, norm: str) -> Iterator[LinearSite]:
    """Queries through their latent, if they have one; keys and values from the latent that is kept."""
    down: dict[str, tuple[Role, int]] = {"kv_a_proj_with_mqa": ("k", model.kv_latent + model.rope_dim)}
    q = model.heads * model.head_dim
    down |= {"q_a_proj": ("q", model.q_latent)} if model.q_latent else {"q_proj": ("q", q)}
    names = tuple(f"{attention}.{one}" for one in down)
    for name, (role, n) in zip(names, down.values(), strict=True):
        yield LinearSite(
            name=name,
            layer=layer,
            role=role,
            n=n,
            k=model.hidden,
            producer=norm,
            shares_input=tuple(other for other in names if other != name),
            inspected=attention,
        )
    value = model.v_dim or model.head_dim
    up: list[tuple[str, Role, int, int, str]] = [
        ("kv_b_proj", "v", model.heads * (model.head_dim - model.rope_dim + value), model.kv_latent, "kv_a"),
    ]
    if model.q_latent:
        up.append(("q_b_proj", "q", q, model.q_latent, "q_a"))
    for part, role, n, k, latent in up:
        name = f"{attention}.{part}"
        yield LinearSite(
            name=name,
            layer=layer,
            role=role,
            n=n,
            k=k,
            producer=f"{attention}.{latent}_layernorm",
            inspected=name,
        )


def _feed_forward(
    model: ModelFacts, module: str, layer: int, ffn: int, norm: str, expert: bool = False
) -> Iterator[LinearSite]:
    """Gate and up of one input, then down; without a gate, up and down."""
    gate: Role = "expert_gate" if expert else "gate"
    up: Role = "expert_up" if expert else "up"
    down: Role = "expert_down" if expert else "down"
    inner = {gate: ffn, up: ffn} if model.gated else {up: ffn}
    yield from _sharing(inner, module, layer, model.hidden, norm)
    yield from _sharing({down: model.hidden}, module, layer, ffn, f"{module}.up_proj")


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

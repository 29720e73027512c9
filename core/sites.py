"""The linear layers of a decoder, from its shape alone: what a quantizer is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from servelab.core.facts import ModelFacts
from servelab.core.families.quant import LinearSite, Quantizer, Role


def linear_sites(model: ModelFacts) -> Iterator[LinearSite]:
    """Every linear of a decoder under its Hugging Face name, layer by layer, the head last.

    Linears that share their input follow one another: q, k, v; gate, up. Experts are named one by one, as in
    Qwen3-MoE, shared ones as one network, as in DeepSeek. Routers of experts are no sites.
    """
    for layer in range(model.layers):
        name = f"model.layers.{layer}"
        if model.kv_latent:
            yield from _latent_attention(model, f"{name}.self_attn", layer, f"{name}.input_layernorm")
        else:
            yield from _attention(model, f"{name}.self_attn", layer, f"{name}.input_layernorm")
        norm, mlp = f"{name}.post_attention_layernorm", f"{name}.mlp"
        if not model.experts or layer in model.dense_layers:
            ffn = model.dense_ffn if model.experts else model.ffn
            yield from _mlp(model, mlp, layer, ffn, norm)
            continue
        for expert in range(model.experts):
            yield from _mlp(model, f"{mlp}.experts.{expert}", layer, model.ffn, norm, expert=True)
        if shared := model.shared_experts:
            yield from _mlp(model, f"{mlp}.shared_experts", layer, shared * model.ffn, norm)
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


def _attention(model: ModelFacts, module: str, layer: int, norm: str) -> Iterator[LinearSite]:
    value = model.v_dim or model.head_dim
    parts: dict[Role, int] = {
        "q": model.heads * model.head_dim,
        "k": model.kv_heads * model.head_dim,
        "v": model.kv_heads * value,
    }
    yield from _sharing(parts, module, layer, model.hidden, norm)
    yield from _sharing({"o": model.hidden}, module, layer, model.heads * value, f"{module}.v_proj")


def _latent_attention(model: ModelFacts, module: str, layer: int, norm: str) -> Iterator[LinearSite]:
    """As in DeepSeek-V2 and V3: what makes latents has the role ``other``, what expands them ``q`` and ``v``
    (keys and values together).
    """
    latent, value = model.kv_latent, model.v_dim or model.head_dim
    kv_a, q_a, q = f"{module}.kv_a_proj_with_mqa", f"{module}.q_a_proj", model.heads * model.head_dim
    first = {q_a: model.q_latent, kv_a: latent + model.rope_dim}
    if not model.q_latent:
        first = {f"{module}.q_proj": q, kv_a: latent + model.rope_dim}
    for name, n in first.items():
        yield LinearSite(
            name=name,
            layer=layer,
            role="q" if name.endswith(".q_proj") else "other",
            n=n,
            k=model.hidden,
            producer=norm,
            shares_input=tuple(other for other in first if other != name),
            inspected=module,
        )
    expand: list[tuple[str, Role, int, int]] = [
        ("kv_b_proj", "v", model.heads * (model.head_dim - model.rope_dim + value), latent),
        ("o_proj", "o", model.hidden, model.heads * value),
    ]
    if model.q_latent:
        expand.insert(0, ("q_b_proj", "q", q, model.q_latent))
    producers = {"kv_b_proj": "kv_a_layernorm", "q_b_proj": "q_a_layernorm", "o_proj": "kv_b_proj"}
    for part, role, n, k in expand:
        name = f"{module}.{part}"
        before = f"{module}.{producers[part]}"
        yield LinearSite(name=name, layer=layer, role=role, n=n, k=k, producer=before, inspected=name)


def _mlp(
    model: ModelFacts, module: str, layer: int, ffn: int, norm: str, *, expert: bool = False
) -> Iterator[LinearSite]:
    """One feed-forward network; without a gate, ``up`` and ``down``."""
    up: dict[Role, int] = {"expert_gate": ffn, "expert_up": ffn} if expert else {"gate": ffn, "up": ffn}
    if not model.gated:
        del up["expert_gate" if expert else "gate"]
    down: dict[Role, int] = {"expert_down" if expert else "down": model.hidden}
    yield from _sharing(up, module, layer, model.hidden, norm)
    yield from _sharing(down, module, layer, ffn, f"{module}.up_proj")


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

"""The operations of a decoder on one device: what each does for so many tokens, rows or contexts.

Symbols as on the page: T tokens of the step, R rows of logits, d hidden, H query heads, K KV heads, h width
of a head, f inner width, V vocabulary, E experts of which k per token, t devices; w, a, c bytes per element
of weights, activations, KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil

from servelab.core.api import ConfigError, HardwareFacts, KVLayout, ModelFacts
from servelab.core.families.quant import LinearSite, Quantizer
from servelab.core.sites import kv_share, linear_sites
from servelab.plugins.costmodels.roofline.device import Unit, Work

LOGIT_BYTES = 4
"""Logits are float32, as samplers read them."""
FUSED_PASSES = 4
"""Times the residual stream moves per layer in norms, rotation and activation, fused as engines do."""
FLOPS_PER_ELEMENT = 10
"""Of the same, per element of the residual stream."""
ELEMENTWISE_LAUNCHES = 1
"""They are one operation here, as a compiler fuses them; rotation goes with the KV write."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of operation, of which a step runs ``count``."""

    name: str
    count: int
    work: Callable[[int], Work]
    """For so many tokens of the step (rows of logits for the head)."""


def token_operations(
    model: ModelFacts, hardware: HardwareFacts, quant: Quantizer | None, layers: range
) -> list[Operation]:
    """What these layers do for their tokens, attention apart. Layers alike are counted, not repeated."""
    counts: dict[bool, int] = {}
    for layer in layers:
        dense = not model.experts or layer in model.dense_layers
        counts[dense] = counts.get(dense, 0) + 1
    found = [*_linears(model, hardware, quant, layers)]
    for dense, count in counts.items():
        found.append(Operation("elementwise", count, _elementwise(model)))
        if not dense:
            found.append(Operation("router", count, _plain(model.experts, model.hidden, model)))
        if hardware.tp > 1:
            found.append(Operation("all_reduce", 2 * count, _message(model)))
    return found


def embedding(model: ModelFacts) -> Operation:
    """Rows of the table, read and written."""
    row = model.hidden * model.dtype_bytes

    def work(tokens: int) -> Work:
        return Work(weight_bytes=tokens * row, activation_bytes=tokens * row)

    return Operation("embedding", 1, work)


def head(model: ModelFacts, hardware: HardwareFacts, quant: Quantizer | None) -> Operation:
    """Logits of the rows that sample, and only of these."""
    n = ceil(model.vocab / hardware.tp)
    site = LinearSite(name="lm_head", layer=-1, role="head", n=n, k=model.hidden)
    linear = _linear([site], model, hardware, quant)
    wider = n * (LOGIT_BYTES - model.dtype_bytes)

    def work(rows: int) -> Work:
        one = linear(rows)
        return replace(one, activation_bytes=one.activation_bytes + rows * wider)

    return Operation("head", 1, work)


def gather(model: ModelFacts) -> Operation:
    """Logits of the rows that sample, from all devices."""
    row = model.vocab * LOGIT_BYTES
    return Operation("gather", 1, lambda rows: Work(network_bytes=rows * row, ring_passes=1))


# --------------------------------------------------------------------- linears


def _linears(
    model: ModelFacts, hardware: HardwareFacts, quant: Quantizer | None, layers: range
) -> Iterator[Operation]:
    """Linears of one input and one format as one product, as engines fuse them; counted over layers."""
    counts: dict[object, int] = {}
    made: dict[object, Operation] = {}
    for sites in _groups(model, layers):
        formats = [quant.format(site, model) if quant else None for site in sites]
        fused = [list(part) for _, part in groupby(range(len(sites)), key=lambda i: formats[i])]
        for part in fused:
            group = [shard(sites[i], model, hardware) for i in part]
            key = (formats[part[0]], tuple((site.role, site.n, site.k) for site in group))
            counts[key] = counts.get(key, 0) + 1
            if key not in made:
                work = _linear(group, model, hardware, quant)
                if group[0].role.startswith("expert_"):
                    work = _routed(work, model)
                made[key] = Operation("+".join(site.role for site in group), 1, work)
    return (replace(one, count=counts[key]) for key, one in made.items())


def _groups(model: ModelFacts, layers: range) -> Iterator[list[LinearSite]]:
    """Linears that read one input; of a layer's experts the first stands for all."""
    sites = (
        site
        for site in linear_sites(model)
        if site.layer in layers and (not site.role.startswith("expert_") or ".experts.0." in site.name)
    )
    for _, group in groupby(sites, key=lambda site: frozenset((site.name, *site.shares_input))):
        yield list(group)


def shard(site: LinearSite, model: ModelFacts, hardware: HardwareFacts) -> LinearSite:
    """One device's part. Outputs are divided, of ``o`` and ``down`` inputs; KV heads are copied where they
    are fewer than devices, and what makes latents is on every device.
    """
    t = hardware.tp
    if t == 1 or site.name.endswith(("q_a_proj", "kv_a_proj_with_mqa")):
        return site
    if site.role in ("o", "down", "expert_down"):
        return replace(site, k=ceil(site.k / t))
    if site.role in ("k", "v") and not model.kv_latent:
        return replace(site, n=ceil(model.kv_heads / t) * (site.n // model.kv_heads))
    return replace(site, n=ceil(site.n / t))


def _linear(
    sites: list[LinearSite], model: ModelFacts, hardware: HardwareFacts, quant: Quantizer | None
) -> Callable[[int], Work]:
    """One product with the weights of these linears side by side, as its format's own cost says."""
    merged = replace(sites[0], n=sum(site.n for site in sites), shares_input=())
    if quant is None or (format := quant.format(merged, model)) is None:
        return _plain(merged.n, merged.k, model)
    weights = format.nbytes(merged.n, merged.k)
    floats = format.kind == "float"

    def work(tokens: int) -> Work:
        cost = quant.cost(merged, tokens, model, hardware)
        return Work(
            flops=cost.flops,
            unit=_unit(cost.math_bits, floats, merged.name),
            weight_bytes=weights,
            activation_bytes=max(0, cost.device_bytes - weights),
            launches=cost.launches,
        )

    return work


def _plain(n: int, k: int, model: ModelFacts) -> Callable[[int], Work]:
    """``[T, k] -> [T, n]`` with unquantized weights."""
    weights, row = n * k * model.dtype_bytes, (n + k) * model.dtype_bytes
    flops = 2 * n * k

    def work(tokens: int) -> Work:
        return Work(flops=tokens * flops, weight_bytes=weights, activation_bytes=tokens * row)

    return work


def _routed(linear: Callable[[int], Work], model: ModelFacts) -> Callable[[int], Work]:
    """The experts of a layer: each token runs through k of them, weights are read of those that any token
    chose.
    """

    def work(tokens: int) -> Work:
        one = linear(tokens * model.experts_per_token)
        return replace(one, weight_bytes=one.weight_bytes * distinct_experts(model, tokens))

    return work


def distinct_experts(model: ModelFacts, tokens: int) -> float:
    """Experts that at least one of so many tokens chose, expected under uniform independent choice:
    ``E (1 - (1 - k / E) ** T)``.
    """
    missed = 1.0 - model.experts_per_token / model.experts
    return float(model.experts * (1.0 - missed**tokens))


def _unit(math_bits: int, floats: bool, name: str) -> Unit:
    if math_bits >= 16:
        return "16bit"
    if math_bits == 8:
        return "fp8" if floats else "int8"
    raise ConfigError(
        f"{name} multiplies at {math_bits} bits",
        where="cost 'roofline'",
        why="device profiles state peaks at 16 and 8 bits only",
        do="choose a quantizer that multiplies at 8 or 16 bits, or another cost model",
    )


# ----------------------------------------------------------------- elementwise


def _elementwise(model: ModelFacts) -> Callable[[int], Work]:
    flops, row = FLOPS_PER_ELEMENT * model.hidden, FUSED_PASSES * model.hidden * model.dtype_bytes

    def work(tokens: int) -> Work:
        return Work(flops=tokens * flops, activation_bytes=tokens * row, launches=ELEMENTWISE_LAUNCHES)

    return work


def _message(model: ModelFacts) -> Callable[[int], Work]:
    row = model.hidden * model.dtype_bytes
    return lambda tokens: Work(network_bytes=tokens * row)


# ------------------------------------------------------------------- attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention of layers alike: the same window and the same bytes of KV per token.

    Keys and values are read once per row and step, whatever the number of its queries. Rows of one query take
    the time of their sum; each row of several takes its own on top, for the ones multiply while the others
    read. So a row that runs one token more never costs less.
    """

    count: int
    """Layers."""
    window: int | None
    """Tokens a token sees, itself included; None: all."""
    kv_bytes: float
    """That one token keeps on one device in one of these layers."""
    query_bytes: float
    """Of one query and its output."""
    pair_flops: float
    """Per query and key, decode."""
    chunk_pair_flops: float
    """Per query and key, where a row has several queries; less with latents, whose keys are then expanded."""
    expand_flops: float = 0.0
    """Per token of context, to expand its latent."""

    def seen(self, context: int) -> int:
        """Keys that the last of so many tokens sees."""
        return context if self.window is None else min(context, self.window)

    def decode(self, rows: int, context: int) -> Work:
        """Rows of one query each that see so many keys in all, themselves included."""
        return Work(
            flops=self.pair_flops * context,
            kv_bytes=self.kv_bytes * context,
            activation_bytes=self.query_bytes * rows,
            launches=0,
        )

    def chunk(self, n: int, before: int) -> Work:
        """A row of several queries after a context; causal."""
        if (window := self.window) is None:
            pairs = n * before + n * (n + 1) // 2
            keys = before + n
        else:
            whole = max(0, min(n, window - before))  # queries that see all before them
            pairs = whole * before + whole * (whole + 1) // 2 + (n - whole) * window
            keys = min(before + n, window + n - 1)
        expanded = self.chunk_pair_flops * pairs + self.expand_flops * (keys - n)
        return Work(
            flops=min(self.pair_flops * pairs, expanded),
            kv_bytes=self.kv_bytes * keys,
            activation_bytes=self.query_bytes * n,
            launches=0,
        )

    def write(self, tokens: int) -> Work:
        """New keys and values, rotated and stored; launched beside attention, one for all rows."""
        return Work(kv_bytes=self.kv_bytes * tokens, launches=2)


def attentions(
    model: ModelFacts, hardware: HardwareFacts, layout: KVLayout | None, layers: range
) -> list[Attention]:
    """One entry per kind of layer."""
    counts: dict[tuple[int | None, float], int] = {}
    for layer in layers:
        kind = (model.windows[layer] if model.windows else None, _kv_bytes(model, layout, layer))
        counts[kind] = counts.get(kind, 0) + 1
    return [
        _attention(model, hardware, count, window, kv_bytes) for (window, kv_bytes), count in counts.items()
    ]


def _attention(
    model: ModelFacts, hardware: HardwareFacts, count: int, window: int | None, kv_bytes: float
) -> Attention:
    heads, width = model.heads / hardware.tp, model.dtype_bytes
    value = model.v_dim or model.head_dim
    if latent := model.kv_latent:  # decode in the latent's space (absorbed), chunks with keys expanded
        return Attention(
            count=count,
            window=window,
            kv_bytes=kv_bytes * kv_share(model, hardware.tp),
            query_bytes=heads * (2 * latent + model.rope_dim) * width,
            pair_flops=2 * heads * (2 * latent + model.rope_dim),
            chunk_pair_flops=2 * heads * (model.head_dim + value),
            expand_flops=2 * latent * heads * (model.head_dim - model.rope_dim + value),
        )
    flops = 2 * heads * (model.head_dim + value)
    return Attention(
        count=count,
        window=window,
        kv_bytes=kv_bytes * kv_share(model, hardware.tp),
        query_bytes=heads * (model.head_dim + value) * width,
        pair_flops=flops,
        chunk_pair_flops=flops,
    )


def _kv_bytes(model: ModelFacts, layout: KVLayout | None, layer: int) -> float:
    """Stored bytes of one token in one layer, over all heads: as the KV layout has it."""
    if layout is None:
        return model.kv_bytes_per_token_layer
    return sum(
        pool.bytes_per_page / pool.page_tokens / len(pool.layers)
        for pool in layout.pools
        if layer in pool.layers
    )

"""Scaled-dot-product attention over stored KV: what it reads and what it costs. A baseline, free of torch.

Mechanism: new keys are rotated and stored; each row then attends to all it sees with an explicit mask by
position, causal and aligned to the end (bottom right), so that a chunk of a prompt sees the chunks before
it. Rows of one query are batched: their pages are gathered, one layer at a time, into a scratch buffer
that is used again by the next layer; a row that is alone and whose pages are consecutive is read in place.

Deviations: none (the textbook formula). Faithful when: (1) float32 within 1e-5 and float64 within 1e-12 of
the formula, bfloat16 within 2e-2; (2) rows that see nothing give ``(0, -inf)``; (3) chunked prefill in any
split equals one shot; (4) partial states merge to the whole; (5) windows equal the masked formula.
Tier: stable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servelab.core.api import Context, HardwareFacts, KVLayout, ModelFacts
from servelab.core.families.kernel import AttentionCaps, AttentionImpl, OpCost, Rotary


class Sdpa:
    """Takes no settings."""

    caps = AttentionCaps(
        addressings=frozenset({"block_table", "contiguous_slot"}),
        key_spaces=frozenset({"post_rope", "pre_rope"}),
        masks=frozenset({"causal", "window"}),
    )

    def __init__(self, config: None, context: Context) -> None:
        self._model = context.model

    def adapt(self, layout: KVLayout, model: ModelFacts) -> KVLayout:
        """Any page size will do."""
        return layout

    def refuses(self, layout: KVLayout, model: ModelFacts, hardware: HardwareFacts | None) -> Sequence[str]:
        caps, reasons = self.caps, []
        if layout.addressing not in caps.addressings:
            reasons.append(f"it does not read {layout.addressing} addressing")
        for pool in layout.pools:
            if pool.key_space not in caps.key_spaces:
                reasons.append(f"pool {pool.id!r} stores keys as {pool.key_space}")
            if pool.codec not in caps.codecs:
                reasons.append(f"pool {pool.id!r} is encoded as {pool.codec!r}, which it cannot decode")
            if pool.captures != ("k", "v"):
                reasons.append(f"pool {pool.id!r} stores {', '.join(pool.captures)} instead of k and v")
            if pool.retention == "repack":
                reasons.append(f"pool {pool.id!r} lets tokens go (retention {pool.retention!r})")
            if pool.head_group is not None:
                reasons.append(f"pool {pool.id!r} holds some of the heads only")
        for layer in range(model.layers):
            if (pools := sum(layer in pool.layers for pool in layout.pools)) != 1:
                reasons.append(f"layer {layer} is in {pools} pools instead of one")
        return reasons

    def cost(self, layer: int, q_tokens: Sequence[int], contexts: Sequence[int], layout: KVLayout) -> OpCost:
        """Products of the pairs that a causal mask and the layer's window leave; KV read once per row.

        Queries and outputs are not counted: they are small beside the projections that make them.
        """
        model = self._model
        limit = model.windows[layer] if model.windows else None
        pairs = seen = 0
        for n, context in zip(q_tokens, contexts, strict=True):
            window = limit or context + n
            full = max(0, min(n, window - context))  # queries that see all before them
            pairs += full * context + full * (full + 1) // 2 + (n - full) * window
            seen += min(context + n, window + n - 1) if n else 0
        return OpCost(
            flops=4 * model.heads * model.head_dim * pairs,
            math_bits=int(8 * model.dtype_bytes),
            device_bytes=seen * model.kv_bytes_per_token_layer,
        )

    def load(
        self,
        layout: KVLayout,
        model: ModelFacts,
        device: str,
        buffers: Mapping[int, Mapping[str, Any]],
        rotary: Rotary,
    ) -> AttentionImpl:
        from servelab.plugins.kernels.sdpa.impl import SdpaImpl

        return SdpaImpl(layout, model, buffers, rotary)

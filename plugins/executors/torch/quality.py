"""Several models' opinions of the same text, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import AttentionImpl, BatchLayout
from servelab.core.layout import KVLayout
from servelab.core.quality import Comparison
from servelab.plugins.executors.torch.attention import Kernel
from servelab.plugins.executors.torch.decoder import Decoder

ROWS = 128
"""Tokens whose distributions are compared at a time; bounds memory to a few times this many of the
vocabulary's size."""


class Reader:
    """Runs text through decoders of one shape, with KV pages of its own.

    Args:
        kernel: the run's attention backend.
        layout: the run's KV layout.
        buffers: ``layer -> capture -> [pages, ...]`` for the longest window.
    """

    def __init__(
        self,
        kernel: Kernel,
        layout: KVLayout,
        model: ModelFacts,
        buffers: Mapping[int, Mapping[str, Tensor]],
        rotary: Any,
    ) -> None:
        self._attention: AttentionImpl = kernel.load(layout, model, "cpu", buffers, rotary)
        self._pools = layout.pools

    @torch.inference_mode()
    def compare(
        self, ids: Sequence[int], reference: Decoder, others: Mapping[str, Decoder]
    ) -> dict[str, Comparison]:
        """One window through every model; distributions are compared in float32, or float64 if models are."""
        text = torch.tensor(ids)
        truth, states = self._states(text, reference), {k: self._states(text, d) for k, d in others.items()}
        rows = {label: list[tuple[Tensor, Tensor, Tensor]]() for label in others}
        said = list[Tensor]()
        for start in range(0, len(ids) - 1, ROWS):
            end = min(start + ROWS, len(ids) - 1)
            following = text[start + 1 : end + 1, None]
            expected = _log_probabilities(reference, truth[start:end])
            weight, best = expected.exp(), expected.argmax(-1)
            said.append(expected.gather(-1, following))
            for label, decoder in others.items():
                found = _log_probabilities(decoder, states[label][start:end])
                kl = (weight * (expected - found)).sum(-1).clamp_(min=0)  # below 0 by rounding only
                rows[label].append((kl, found.argmax(-1) == best, found.gather(-1, following)))
        reference_nll = -float(torch.cat(said).double().sum())
        return {label: _summed(parts, reference_nll) for label, parts in rows.items()}

    def _states(self, ids: Tensor, decoder: Decoder) -> Tensor:
        """``[tokens, hidden]`` after the last layer, of one row from position 0."""
        n = len(ids)
        layout = BatchLayout(
            q_indptr=(0, n),
            q_positions=range(n),
            seg_indptr=(0, 1),
            seg_tokens=(n,),
            seg_offset=(0,),
            seg_pages=[[range(-(-n // pool.page_tokens))] for pool in self._pools],
        )
        return decoder.run(decoder.embed(ids), self._attention, self._attention.plan(layout, ()))


def _log_probabilities(decoder: Decoder, states: Tensor) -> Tensor:
    logits = decoder.head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _summed(parts: Sequence[tuple[Tensor, Tensor, Tensor]], reference_nll: float) -> Comparison:
    kl, agreed, said = (torch.cat(part) for part in zip(*parts, strict=True))
    return Comparison(
        kl=kl.tolist(),
        agreements=int(agreed.sum()),
        nll=-float(said.double().sum()),
        reference_nll=reference_nll,
    )

"""Attention where layers turn by different angles (Gemma 3): one backend for each, over the same pages.

A backend knows one rotary embedding and turns what it is handed. With several, a launch is planned once for
each of them, and a layer is answered by the backend that turns as it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import AttentionBackend, AttentionImpl, BatchLayout, State
from servelab.core.layout import KVLayout
from servelab.plugins.executors.torch.rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class RotaryByLayer:
    """Several rotary embeddings, and which of them each layer takes."""

    kinds: Sequence[RotaryEmbedding]
    of_layer: Sequence[int]


class Kernel:
    """An attention backend for any decoder's rotary embedding, or embeddings."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def load(
        self,
        layout: KVLayout,
        model: ModelFacts,
        device: str,
        buffers: Mapping[int, Mapping[str, Tensor]],
        rotary: RotaryEmbedding | RotaryByLayer,
    ) -> AttentionImpl:
        """As ``AttentionBackend.load``."""
        if not isinstance(rotary, RotaryByLayer):
            return self._backend.load(layout, model, device, buffers, rotary)
        loaded = [self._backend.load(layout, model, device, buffers, kind) for kind in rotary.kinds]
        return AttentionByLayer(loaded, rotary.of_layer)


class AttentionByLayer:
    """Each layer answered by its own of several backends; a plan is one of each."""

    def __init__(self, parts: Sequence[AttentionImpl], of_layer: Sequence[int]) -> None:
        self._parts, self._of_layer = parts, of_layer

    def plan(self, batch: BatchLayout, layer_groups: Sequence[tuple[int, int]]) -> list[Any]:
        return [part.plan(batch, layer_groups) for part in self._parts]

    def append(self, layer: int, captures: Mapping[str, Any], plan: Sequence[Any]) -> None:
        kind = self._of_layer[layer]
        self._parts[kind].append(layer, captures, plan[kind])

    def run(self, layer: int, q_pre: Any, plan: Sequence[Any]) -> State:
        kind = self._of_layer[layer]
        return self._parts[kind].run(layer, q_pre, plan[kind])

    def partial(self, layer: int, q_pre: Any, plan: Sequence[Any], segments: Sequence[int]) -> State:
        kind = self._of_layer[layer]
        return self._parts[kind].partial(layer, q_pre, plan[kind], segments)

    def merge(self, states: Sequence[State]) -> State:
        return self._parts[0].merge(states)

"""Requests with pages of their own, run through a decoder in any chunks and company."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tests.torch.models import attention, facts, layout, rows
from torch import Tensor

from servelab.plugins.executors.torch.decoder import Decoder, Watch

LENGTH = 150
"""Tokens of the long prompt: past what the stretched types were trained on."""


def ids_of(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


class Recorded:
    """An attention backend, and what the decoder handed to it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.captures: list[tuple[int, dict[str, Tensor]]] = []
        self.queries: list[tuple[int, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def append(self, layer: int, captures: Mapping[str, Tensor], plan: Any) -> None:
        self.captures.append((layer, {name: t.clone() for name, t in captures.items()}))
        self._backend.append(layer, captures, plan)

    def run(self, layer: int, q: Tensor, plan: Any) -> Any:
        self.queries.append((layer, q.clone()))
        return self._backend.run(layer, q, plan)


class Session:
    """A decoder with KV pages for requests, each with a fixed table of scattered ones."""

    def __init__(self, d: Decoder, page: int = 4, requests: int = 3) -> None:
        self.d, per = d, -(-LENGTH // page)
        model = facts(d)
        backend, _ = attention(d, model, layout(model, page), per * requests)
        self.attention = Recorded(backend)
        order = torch.randperm(per * requests, generator=torch.Generator().manual_seed(1)).tolist()
        self.pages = [order[i * per : (i + 1) * per] for i in range(requests)]
        self.held = [0] * requests

    def embed(self, *chunks: tuple[int, Tensor]) -> tuple[Tensor, Any]:
        """Rows ``(request, ids)``, each after what the request holds: activations and the launch's plan."""
        plan = self.attention.plan(rows(*((self.held[r], len(ids), self.pages[r]) for r, ids in chunks)), ())
        for r, ids in chunks:
            self.held[r] += len(ids)
        return self.d.embed(torch.cat([ids for _, ids in chunks])), plan

    def logits(self, *chunks: tuple[int, Tensor], watch: Watch | None = None) -> list[Tensor]:
        x, plan = self.embed(*chunks)
        out = self.d.head(self.d.run(x, self.attention, plan, watch=watch))
        return list(out.split([len(ids) for _, ids in chunks]))


@torch.no_grad()
def answer(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())

"""Shortest job first, over any scheduler, with output lengths predicted from the past.

Source: the rule is classic (Smith, Naval Research Logistics Quarterly 3, 1956: least mean waiting time on one
machine); for language models with predicted lengths see Fu et al., NeurIPS 2024, arXiv 2408.15792.

Mechanism: waiting requests stand in order of ``key = w * P + max(O - g, 1)``: what is left to run. O is the
predicted output length: the mean of the last ``window`` completed outputs whose prompt was of like length
(the same power of two) and class; until one is there, the request's cap. Equal jobs are served in order of
arrival.

Symbols: P tokens still to compute, g output tokens so far, O predicted output tokens, w = ``prompt_weight``.

Deviations:
1. The predictor is a running mean by class and prompt length, not a learned ranking: it sees no text.
2. Not preemptive.
3. Long jobs can wait for as long as shorter ones keep coming.

Faithful when: among waiting requests none overtakes one with a smaller key; predictions are the mean of what
has completed, by hand; on one server the mean wait is at most that of first come, first served.

Tier: prototype.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from pydantic import Field

from servelab.core.api import Context, Record, RequestArrived, RequestFinished, RequestView
from servelab.plugins.schedulers._ordered import Ordered, OrderedConfig


class SJFConfig(OrderedConfig):
    """Settings of ``+scheduler=sjf``."""

    prompt_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="w, what a prompt token weighs beside an output token; 0: output length only, as in the "
        "paper on learned ranking",
    )
    window: int = Field(
        200,
        ge=1,
        description="completed outputs that a prediction averages (ours; LightLLM's branch keeps 200)",
    )


class SJF(Ordered):
    """Keeps the last outputs of each group, and the group of each live request. O(1) per record."""

    config: SJFConfig

    def __init__(self, config: SJFConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self._learn = getattr(self._inner, "on_event", None)
        self._live: dict[str, _Past] = {}
        self._past: dict[tuple[str, int], _Past] = {}

    def on_event(self, record: Record) -> None:
        if isinstance(record, RequestArrived):
            group = record.request_class, record.prompt_tokens.bit_length()
            if group not in self._past:
                self._past[group] = _Past(self.config.window)
            self._live[record.request] = self._past[group]
        elif isinstance(record, RequestFinished):
            past = self._live.pop(record.request, None)
            if past is not None and record.outcome == "completed":
                past.add(record.output_tokens)
        if self._learn is not None:
            self._learn(record)

    def key(self, request: RequestView) -> Any:
        mean = self._live[request.id].mean
        output = request.max_new_tokens if mean is None else min(mean, request.max_new_tokens)
        return left(request, output, self.config.prompt_weight), request.arrival_ns


class _Past:
    """The last outputs of one group, and their mean."""

    __slots__ = ("_outputs", "_total")

    def __init__(self, window: int) -> None:
        self._outputs: deque[int] = deque(maxlen=window)
        self._total = 0

    def add(self, tokens: int) -> None:
        if len(self._outputs) == self._outputs.maxlen:
            self._total -= self._outputs[0]
        self._outputs.append(tokens)
        self._total += tokens

    @property
    def mean(self) -> float | None:
        return self._total / len(self._outputs) if self._outputs else None


def left(request: RequestView, output: float, prompt_weight: float) -> float:
    """Size of the job that is left, in output tokens."""
    return prompt_weight * request.pending_tokens + max(output - request.generated_tokens, 1)

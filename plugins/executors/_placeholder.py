"""Placeholder tokens until the workload's hidden lengths end: executors that run no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import compress

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, Oracle, Outcome, Phase, WorkloadError
from servelab.core.engine.state import Request
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch

_NOTHING = Outcome()


class PlaceholderConfig(BaseModel):
    """Settings of executors without a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    acceptance: float = Field(1.0, ge=0, le=1, description="share of each draft accepted, rounded down")
    placeholder: int = Field(0, ge=0, description="token id that stands for every output token")
    foresight: bool = Field(
        True,
        description="run held steps in one launch (true lengths are known); false: one by one, as if real",
    )


class PlaceholderExecutor:
    """Keeps no state per request: what comes out depends only on the batch and the truths."""

    simulated = True

    def __init__(self, config: PlaceholderConfig, ctx: Context) -> None:
        self._name = ctx.name
        if ctx.oracle is None:
            raise ConfigError(
                f"executor {self._name!r} was built without the workload's truths", do="use compose()"
            )
        self._settings = config
        self._truth: Oracle = ctx.oracle
        self._one = {
            False: Outcome((config.placeholder,)),
            True: Outcome((config.placeholder,), finish="stop"),
        }

    def _left(self, r: Request, generated: int) -> int:
        """Output tokens still to come after ``generated``."""
        try:
            return self._truth(r.id).output_tokens - generated
        except KeyError:
            if r.phase is Phase.FINISHED:
                return 1 << 62  # it ended while in flight; its outcome is dropped
            raise WorkloadError(
                f"the workload gave no true output length for request {r.id}",
                where=f"executor {self._name!r}",
                why="it has no model that could end the request",
                do="use a workload that provides workload.truth, or an executor that runs a model",
            ) from None

    def horizon(self, batch: Batch, max_steps: int) -> int:
        if not self._settings.foresight:
            return 1
        truth, rows = self._truth, list(compress(batch.requests, batch.samples))
        try:
            left = [truth(r.id).output_tokens - r.generated - r.expected for r in rows]
        except KeyError:
            left = [self._left(r, r.generated + r.expected) for r in rows]
        return max(1, min(max_steps, min(left, default=max_steps) + 1))

    def _first(self, r: Request) -> Outcome:
        """The first token of a further sample."""
        return self._one[self._left(r, 0) <= 1]

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        token = self._settings.placeholder
        plain = self._one if steps == 1 else {end: _outcome(token, steps, end) for end in (False, True)}
        on, over, truth = plain[False], plain[True], self._truth
        rows = zip(batch.requests, batch.samples, strict=True)
        try:
            out = [
                (over if truth(r.id).output_tokens - r.generated <= steps else on) if sampled else _NOTHING
                for r, sampled in rows
            ]
        except KeyError:  # somebody has ended while in flight
            rows = zip(batch.requests, batch.samples, strict=True)
            out = [
                (over if self._left(r, r.generated) <= steps else on) if sampled else _NOTHING
                for r, sampled in rows
            ]
        for i, item in batch.extras.items():
            if item.draft and batch.samples[i]:
                left = self._left(batch.requests[i], batch.requests[i].generated)
                accepted = min(int(self._settings.acceptance * item.draft), left - 1)
                out[i] = _outcome(token, 1 + accepted, left <= 1 + accepted, accepted)
        for i, others in batch.forks.items():
            out[i] = replace(out[i], forks=tuple(map(self._first, others)))
        return out

    def transfer(self, transfer: Transfer) -> None:
        return None

    def close(self) -> None:
        return None


@lru_cache(maxsize=1024)
def _outcome(token: int, count: int, end: bool, accepted: int = 0) -> Outcome:
    return Outcome((token,) * count, accepted=accepted, finish="stop" if end else None)

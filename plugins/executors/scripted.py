"""Scripted executor: placeholder tokens, hidden lengths from the workload, no model. A baseline.

Mechanism: every sampled token is ``placeholder``; a request ends with ``stop`` when its true output length is
reached. Nothing is timed here: the cost model prices launches on either clock. For tests, examples and
repeatable runs.

Deviations: none. Faithful when: output lengths equal the workload's truths unless the cap is lower.
Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Capacity, ConfigError, Context, KVLayout, Oracle, Outcome, Phase, WorkloadError
from servelab.core.engine.ledger import Transfer
from servelab.core.engine.state import Request
from servelab.core.events import Batch
from servelab.plugins.executors._pages import BoundedPages, HostPages, stated_pages

_NOTHING = Outcome()


class ScriptedExecutorConfig(BaseModel):
    """Settings of ``executor=scripted``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_kv_pages: BoundedPages = Field(
        512,
        description="device pages of every KV pool, or of each by its id; from 1 to 50 million, because the "
        "engine keeps a few bytes for each",
    )
    num_host_pages: HostPages = Field(0, description="host pages, likewise; 0: no swapping")
    acceptance: float = Field(1.0, ge=0, le=1, description="share of each draft accepted, rounded down")
    placeholder: int = Field(0, ge=0, description="token id that stands for every output token")
    foresight: bool = Field(
        True,
        description="run held steps in one launch (true lengths are known); false: one by one, as if real",
    )


class ScriptedExecutor:
    """Keeps no state per request: what comes out depends only on the batch and the truths."""

    simulated = True

    def __init__(self, config: ScriptedExecutorConfig, ctx: Context) -> None:
        if ctx.oracle is None:
            raise ConfigError(
                "executor 'scripted' was built without the workload's truths", do="use compose()"
            )
        self.config = config
        self._truth: Oracle = ctx.oracle
        self._one = {
            False: Outcome((config.placeholder,)),
            True: Outcome((config.placeholder,), finish="stop"),
        }

    def capacity(self, layout: KVLayout) -> Capacity:
        c = self.config
        host = stated_pages(c.num_host_pages, layout, "executor.num_host_pages") if c.num_host_pages else ()
        return Capacity(
            device_pages=stated_pages(c.num_kv_pages, layout, "executor.num_kv_pages"), host_pages=host
        )

    def _left(self, r: Request, generated: int) -> int:
        """Output tokens still to come after ``generated``."""
        try:
            return self._truth(r.id).output_tokens - generated
        except KeyError:
            if r.phase is Phase.FINISHED:
                return 1 << 62  # it ended while in flight; its outcome is dropped
            raise WorkloadError(
                f"the workload gave no true output length for request {r.id}",
                where="executor 'scripted'",
                why="it has no model that could end the request",
                do="use a workload that provides workload.truth, or an executor that runs a model",
            ) from None

    def horizon(self, batch: Batch, max_steps: int) -> int:
        if not self.config.foresight:
            return 1
        steps = max_steps
        for r, sampled in zip(batch.requests, batch.samples, strict=True):
            if sampled:
                left = self._left(r, r.generated + r.expected - 1)
                if left < steps:
                    steps = left
        return max(steps, 1)

    def _first(self, r: Request) -> Outcome:
        """The first token of a further sample."""
        return self._one[self._left(r, 0) <= 1]

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        token = self.config.placeholder
        plain = self._one if steps == 1 else {end: _outcome(token, steps, end) for end in (False, True)}
        out: list[Outcome] = []
        extras = batch.extras
        for i, (r, sampled) in enumerate(zip(batch.requests, batch.samples, strict=True)):
            if not sampled:
                out.append(_NOTHING)
                continue
            left = self._left(r, r.generated)
            if i in extras and extras[i].draft:
                accepted = min(int(self.config.acceptance * extras[i].draft), left - 1)
                out.append(_outcome(token, 1 + accepted, left <= 1 + accepted, accepted))
            else:
                out.append(plain[left <= steps])
        for i, others in batch.forks.items():
            out[i] = replace(out[i], forks=tuple(map(self._first, others)))
        return out

    def transfer(self, transfer: Transfer) -> None:
        return None

    def close(self) -> None:
        return None


def _outcome(token: int, count: int, end: bool, accepted: int = 0) -> Outcome:
    return Outcome((token,) * count, accepted=accepted, finish="stop" if end else None)

"""Shortest job first by true output lengths: what a perfect predictor would do.

Source: as ``sjf``. Every report of such a run is stamped, for no real policy knows these lengths.

Mechanism: as ``sjf``, with O the true output length, at most the request's cap.

Symbols: as ``sjf``.

Deviations:
1. Not preemptive.
2. Long jobs can wait for as long as shorter ones keep coming.

Faithful when: among waiting requests none overtakes one with less left to run; on one server the mean wait is
the least that any order gives to the same queue.

Tier: stable.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from servelab.core.api import ConfigError, Context, RequestView, WorkloadError
from servelab.plugins.schedulers._ordered import Ordered, OrderedConfig
from servelab.plugins.schedulers.sjf import left


class SJFOracleConfig(OrderedConfig):
    """Settings of ``+scheduler=sjf_oracle``."""

    prompt_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="w, what a prompt token weighs beside an output token; 0: output length only",
    )


class SJFOracle(Ordered):
    """Stateless; reads true lengths."""

    config: SJFOracleConfig

    def __init__(self, config: SJFOracleConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        if ctx.oracle is None:
            raise ConfigError(
                f"scheduler {ctx.name!r} was built without the workload's truths",
                why="it orders by true output lengths",
                do="use compose(), or declare oracle=True in its spec",
            )
        self._truth = ctx.oracle

    def key(self, request: RequestView) -> Any:
        try:
            truth = self._truth(request.id).output_tokens
        except KeyError:
            raise WorkloadError(
                f"request {request.id} has no true output length",
                where="scheduler 'sjf_oracle'",
                why="this scheduler orders by true lengths, and the workload states none",
                do="use a workload that enforces output lengths, or +scheduler=sjf",
            ) from None
        return left(
            request, min(truth, request.max_new_tokens), self.config.prompt_weight
        ), request.arrival_ns

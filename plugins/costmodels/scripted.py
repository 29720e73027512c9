"""Scripted cost model: prices from a list or from a straight line. A baseline, from no paper.

Mechanism: with ``script_ns``, step ``s`` of a run (the engine's own numbering) costs the ``s``-th entry, the
last repeating. Otherwise a step costs ``step_ns + token_ns * tokens + context_ns * context``, where tokens
counts all tokens run, drafts included, and context the KV tokens the step reads.

Deviations: none.
Faithful when: ``price(batch, k)`` equals ``k`` single calls; monotone in tokens and context.
Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch


class ScriptedCostConfig(BaseModel):
    """Settings of ``+cost=scripted``. The defaults are round figures of ours, of no particular device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    script_ns: tuple[int, ...] = Field((), description="price of each step in ns; empty: use the line")
    step_ns: int = Field(5_000_000, ge=1, description="fixed price of a step, ns")
    token_ns: int = Field(20_000, ge=0, description="price per token run, ns")
    context_ns: int = Field(10, ge=0, description="price per KV token read, ns")
    transfer_ns: int = Field(100_000, ge=1, description="fixed price of a transfer, ns")
    bytes_per_s: int = Field(25_000_000_000, ge=1, description="link bandwidth of transfers, bytes/s")


class ScriptedCost:
    """Stateless; O(requests) per call, O(1) per further step of the line."""

    def __init__(self, config: ScriptedCostConfig, ctx: Context) -> None:
        self.config = config

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        c = self.config
        if c.script_ns:
            last = len(c.script_ns) - 1
            return [c.script_ns[min(batch.first_step + k, last)] for k in range(steps)]
        drafts = sum(item.draft for item in batch.extras.values())
        tokens = sum(batch.tokens) + drafts
        context = sum(batch.starts) + tokens
        first = c.step_ns + c.token_ns * tokens + c.context_ns * context
        if steps == 1:
            return [first]
        rows = len(batch.tokens)
        second = c.step_ns + c.token_ns * rows + c.context_ns * (context + rows)
        slope = c.context_ns * rows
        return [first, *(second + slope * k for k in range(steps - 1))]

    def transfer_time(self, transfer: Transfer) -> int:
        c = self.config
        return c.transfer_ns + transfer.bytes * 1_000_000_000 // c.bytes_per_s

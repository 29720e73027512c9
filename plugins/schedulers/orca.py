"""Orca: the batch is formed anew in every iteration; KV memory is reserved for the worst case.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022.
No code was published; the rule is that of a port in microsoft/sarathi-serve at 13f16cf
(``sarathi/core/scheduler/orca_scheduler.py``, ``orca_block_space_manager.py``).

Mechanism: in every iteration each running request makes one token, and waiting requests are admitted first
come first served while a place is free and the most that each may ever need can be reserved. A prompt runs
whole, in one iteration together with the decodes (selective batching: linear operators see one list of
tokens, attention each request by itself, as the executors do with any batch). Because all memory is
reserved, nobody is ever preempted; because prompts are not cut, a long one delays every token of its
iteration.

Symbols: max_num_seqs as in the port; ``reserve`` chooses what is reserved.

Deviations:
1. Steady decoding is held (``StepPlan.hold``), also while the queue is blocked; the steps are equal.
2. An iteration has engine.max_batch_tokens tokens; the port has no limit. A prompt that is longer is
   rejected, one that does not fit beside the decodes waits.
3. The reservation is an account over the KV cache's pages. Each of several samples of one prompt reserves
   for itself, and all that one request asks for must fit the pool, else it is rejected.
4. The first of an empty batch is admitted as soon as its prompt fits. Only in pools that shrink during a
   run, or with reserve=kvcache over a cache that reserves nothing, may a decode find no page: the youngest
   is dropped then.
5. One batch is in flight; the paper's pipelines have one per stage.

Faithful when: any iteration with a place and a reservation free admits; a request runs its prompt whole,
once; nobody is preempted; greedy tokens equal those of runs one at a time; an iteration that admits takes
longer with the prompts it admits.

Tier: prototype: its published throughput is not reproduced yet.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, Hold, StepPlan, StepView
from servelab.plugins.schedulers._decode import decode
from servelab.plugins.schedulers._device import check_device
from servelab.plugins.schedulers._reserve import Door, Reserve


class OrcaConfig(BaseModel):
    """Settings of ``+scheduler=orca``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_seqs: int = Field(128, ge=1, description="running requests at most (port: 128)")
    reserve: Reserve = Field(
        "request_max",
        description="KV memory reserved for a request: its prompt and its cap (Orca's max_tokens), the "
        "longest request there may be (port), or what the kvcache takes by itself (for contiguous ones)",
    )
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


class Orca:
    """Stateless between steps. O(running) per step, and again in a step with somebody waiting."""

    def __init__(self, config: OrcaConfig, ctx: Context) -> None:
        check_device(ctx, tokens={}, requests={"max_num_seqs": config.max_num_seqs})
        self.config = config

    def plan(self, view: StepView) -> StepPlan:
        plan, pages = StepPlan(), view.kv.budget()
        running = list(view.running)
        short = decode(plan, running, pages, self.config.max_num_seqs)
        steady = not short and len(plan.work) == len(running) > 0
        if not short and len(view.waiting):
            door = Door(view, plan, running, pages, self.config.max_num_seqs, self.config.reserve)
            steady = not door.opens_to(view.waiting) and steady
        if steady and self.config.hold_steps > 1:
            # who waits keeps waiting: places and reservations only come back at an event
            plan.hold = Hold(self.config.hold_steps)
        return plan

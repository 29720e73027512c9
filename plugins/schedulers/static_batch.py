"""Static batching: a batch is one job. Nobody joins it; the next begins when its last member has finished.

Source: request-level batching of FasterTransformer and of servers before Orca (Yu et al., OSDI 2022, whose
baseline it is); the rule is that of a port in microsoft/sarathi-serve at 13f16cf
(``sarathi/core/scheduler/faster_transformer_scheduler.py``, ``orca_block_space_manager.py``). Padding is that
of NVIDIA/FasterTransformer (``decoder_masked_multihead_attention_template.hpp``).

Mechanism: while any member of the batch is unfinished, an iteration makes one token of each and admits
nobody. When none is left, waiting requests form the next batch, first come first served, while places are
free and a reservation of the longest request there may be fits; all their prompts run whole in the same
iteration. A batch therefore takes as many decode iterations as its longest member, and short ones wait for
it.

Symbols: max_num_seqs as in the port. ``keep_padding``: places of finished members stay in the batch until
it ends, as in the servers themselves; the port leaves them out of later iterations.

Deviations:
1. Steady decoding is held (``StepPlan.hold``), also while the queue is blocked; the steps are equal.
2. An iteration has engine.max_batch_tokens tokens, the port has no limit: a batch ends where its prompts
   fill one, and a prompt that is longer is rejected.
3. The reservation is an account over the KV cache's pages; each of several samples reserves for itself. The
   first of a batch is admitted as soon as its prompt fits. Only in pools that shrink during a run, or with
   reserve=kvcache over a cache that reserves nothing, may a decode find no page: the youngest is dropped
   then.
4. With keep_padding a finished place costs the linear layers of one token, as FasterTransformer, whose decode
   attention leaves finished sequences out; as background work, which cost models price by itself. It runs
   where nothing is timed for real: the torch executor refuses background work.
5. KV of finished members is free at once, also with keep_padding: nobody could be admitted to it before the
   batch ends.

Faithful when: nobody is admitted while a member is unfinished; all members of a batch start in one
iteration; reserved KV fits the pool and never grows; a batch takes max(L) decode iterations: with
max_num_seqs = 2, outputs of 2, 10, 2, 10 take 20, with Orca 14.

Tier: prototype: the gap to Orca is its closed form (``orca_static``), not yet the published one.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Background, Context, Hold, ModelFacts, StepPlan, StepView
from servelab.core.sites import parameters
from servelab.plugins.schedulers._decode import decode
from servelab.plugins.schedulers._device import check_device
from servelab.plugins.schedulers._reserve import Door, Reserve


class StaticBatchConfig(BaseModel):
    """Settings of ``+scheduler=static_batch``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_seqs: int = Field(128, ge=1, description="members of a batch at most (port: 128)")
    reserve: Reserve = Field(
        "model_max",
        description="KV memory reserved for a member: the longest request there may be (port), its prompt "
        "and its cap, or what the kvcache takes by itself (for contiguous ones)",
    )
    keep_padding: bool = Field(
        False,
        description="finished members keep their places until the batch ends, and are priced "
        "(FasterTransformer); false: later iterations leave them out (port)",
    )
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


class StaticBatch:
    """State: how many places the batch began with. O(running) per step."""

    def __init__(self, config: StaticBatchConfig, ctx: Context) -> None:
        check_device(ctx, tokens={}, requests={"max_num_seqs": config.max_num_seqs})
        self.config = config
        self._places = 0
        self._padding_flops = padding_flops(ctx.model)

    def plan(self, view: StepView) -> StepPlan:
        config, plan, pages = self.config, StepPlan(), view.kv.budget()
        running = list(view.running)
        if not running:
            door = Door(view, plan, running, pages, config.max_num_seqs, config.reserve)
            door.opens_to(view.waiting)
            self._places = door.seats
            return plan

        short = decode(plan, running, pages, config.max_num_seqs)
        steady = not short and len(plan.work) == len(running)
        finished = self._places - len(running) - view.forking
        if config.keep_padding and finished > 0 and plan.work:
            plan.work.append(Background("padding", finished * self._padding_flops))
        elif steady and config.hold_steps > 1:
            plan.hold = Hold(config.hold_steps)
        return plan


def padding_flops(model: ModelFacts) -> int:
    """FLOPs of one token of a place whose request has finished: all but attention to what it holds."""
    embedding = model.vocab * model.hidden  # looked up, not multiplied
    return 2 * (parameters(model, active=True) - (0 if model.tied_embeddings else embedding))

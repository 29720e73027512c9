"""One request at a time, in order of arrival: the simplest scheduler that is correct.

A request runs to its end before the next is admitted, so it never waits for KV pages: composition has checked
that the pool holds one request of the greatest length.
"""

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, StepPlan, StepView


class OneByOneConfig(BaseModel):
    """Settings of ``+scheduler=demo``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_tokens: int = Field(512, ge=1, description="prompt tokens per step at most")


class OneByOne:
    """Stateless. O(1) per step."""

    def __init__(self, config: OneByOneConfig, context: Context) -> None:
        self._chunk = min(config.chunk_tokens, context.limits.max_batch_tokens)

    def plan(self, view: StepView) -> StepPlan:
        plan = StepPlan()
        request = view.running.first() or view.waiting.first()
        if request is not None and request.pending_tokens:
            plan.run(request, min(request.pending_tokens, self._chunk))
        return plan

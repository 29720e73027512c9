"""Conservative admission: admit while every request could grow to its output cap.

Source: baseline of Gong et al., ASPLOS 2025, arXiv 2507.10150 (artifact WuSiYu/lightllm-ae at 0da617f,
``behavior-analysis/scheduler_conservative_dist1-3.py``).

Mechanism: admit iff the sum of ``prompt + cap`` over the batch and the candidate is at most
``overcommit * capacity``. The cap is the request's own ``max_new_tokens``, or ``assumed_output_tokens`` for
everyone, as in the artifact. At 1.0, with caps that nobody exceeds, nobody is ever evicted. Composer, victims
and order: ``_lightllm.py``.

Deviations:
1. The first of an empty batch is admitted as soon as its prompt fits.
2. Each request counts in whole pages. With pages of one token the rule is the artifact's.
3. A prompt longer than the token budget runs in chunks; LightLLM runs it whole.
4. By default the cap is each request's own; the artifact's server assumes 12000 tokens for everyone.

Faithful when: a candidate is admitted exactly if the inequality holds; nobody is evicted at 1.0 with the
requests' own caps; nobody overtakes the head; KV use is below ``pastfuture``'s.

Tier: prototype.
"""

from __future__ import annotations

from pydantic import Field

from servelab.core.api import Context, RequestView
from servelab.plugins.schedulers._lightllm import ComposerConfig, Judge, LightLLM, Room


class ConservativeConfig(ComposerConfig):
    """Settings of ``+scheduler=conservative``."""

    overcommit: float = Field(
        1.0,
        gt=0,
        le=100,
        description="worst cases promised, as a share of KV memory (paper: 1; relaxed variants: 1.25, 1.5)",
    )
    assumed_output_tokens: int | None = Field(
        None,
        ge=1,
        description="output length assumed for every request (artifact's server: 12000; its toy study of D2: "
        "4096, which outputs exceed); None: each request's cap",
    )


class Conservative(LightLLM):
    """O(running) per pass, O(1) per candidate."""

    def __init__(self, config: ConservativeConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config

    def admission(self, running: list[RequestView], room: Room) -> Judge:
        def worst(request: RequestView) -> int:
            output = self.config.assumed_output_tokens or request.max_new_tokens
            each = room.in_pages(request.prompt_tokens + output)
            return each * (1 + request.forks)

        promised = sum(map(worst, running))
        bound = self.config.overcommit * room.capacity - room.kept

        def judge(request: RequestView) -> str | None:
            nonlocal promised
            promised += worst(request)
            return None if promised <= bound else f"worst case {promised} of {bound:.1f} KV tokens"

        return judge

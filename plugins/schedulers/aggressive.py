"""Aggressive admission: admit while the prompt fits in the KV memory free now; output growth is ignored.

Source: baseline of Gong et al., ASPLOS 2025, arXiv 2507.10150 ("agg99"); artifact WuSiYu/lightllm-ae at
0da617f, ``behavior-analysis/scheduler_aggressive_dist1-3.py``. It stands for vLLM and for TGI with paged KV.

Mechanism: admit iff ``used + prompt + produced <= watermark * capacity``; produced is above 0 for an evicted
request only. Composer, victims and order: ``_lightllm.py``.

Deviations:
1. The first of an empty batch is admitted as soon as its prompt fits.
2. Used and wanted KV count in whole pages. With pages of one token the rule is the artifact's.
3. A prompt longer than the token budget runs in chunks; LightLLM runs it whole.
4. The rule is the toy study's; the artifact's server tests ``used < 0.95 * capacity`` and ``used + prompt <
   capacity``. The toy study leaves out what an evicted request has produced.

Faithful when: a candidate is admitted exactly if the inequality holds; nobody overtakes the head; KV use is
above the oracle's.

Tier: prototype.
"""

from __future__ import annotations

from pydantic import Field

from servelab.core.api import Context, RequestView
from servelab.plugins.schedulers._lightllm import ComposerConfig, Judge, LightLLM, Room


class AggressiveConfig(ComposerConfig):
    """Settings of ``+scheduler=aggressive``."""

    watermark: float = Field(
        0.99,
        gt=0,
        le=1,
        description="share of KV memory that admission may fill (paper and artifact toy study: 0.99; also "
        "compared: 0.95, 0.90)",
    )


class Aggressive(LightLLM):
    """O(1) per candidate."""

    def __init__(self, config: AggressiveConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config

    def admission(self, running: list[RequestView], room: Room) -> Judge:
        used, bound = room.used, self.config.watermark * room.capacity

        def judge(request: RequestView) -> str | None:
            nonlocal used
            used += room.in_pages(request.prompt_tokens + request.generated_tokens)
            return None if used <= bound else f"{used} KV tokens with its prompt, watermark {bound:.1f}"

        return judge

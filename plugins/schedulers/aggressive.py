"""Aggressive admission: admit while the prompt fits in the KV memory free now; output growth is ignored.

Source: baseline of Gong et al., ASPLOS 2025, arXiv 2507.10150 ("agg99"); artifact WuSiYu/lightllm-ae at
0da617f, ``behavior-analysis/scheduler_aggressive_dist1-3.py``. It stands for vLLM and for TGI with paged KV.

Mechanism: admit iff ``used + prompt + produced <= watermark * capacity``; produced is above 0 for an evicted
request only. Composer, victims and order: ``_lightllm.py``.

Deviations:
1. The first of an empty batch is admitted as soon as its prompt fits.
2. Used and wanted KV count in whole pages. With pages of one token the rule is the artifact's.
3. A prompt longer than the token budget runs in chunks; LightLLM runs it whole.
4. The rule is the toy study's, which leaves out what an evicted request has produced. That of the artifact's
   server, ``used < 0.95 * capacity`` and ``used + prompt < capacity``, is start_below=0.95 and watermark=1.

Faithful when: a candidate is admitted exactly if the inequality holds; nobody overtakes the head; KV use is
above the oracle's.

Tier: prototype.
"""

from __future__ import annotations

import math

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
        "compared: 0.95, 0.90; artifact server: 1)",
    )
    start_below: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of KV memory from which on nobody is admitted, however short the prompt (artifact "
        "server: 0.95; its toy study has no such bound)",
    )


class Aggressive(LightLLM):
    """O(1) per candidate."""

    def __init__(self, config: AggressiveConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config

    def admission(self, running: list[RequestView], room: Room) -> Judge:
        config = self.config
        used, bound = room.used, config.watermark * room.capacity
        full = config.start_below * room.capacity if config.start_below < 1 else math.inf

        def judge(request: RequestView) -> str | None:
            nonlocal used
            if used >= full:
                return f"{used} KV tokens in use, start_below {full:.1f}"
            used += room.in_pages(request.prompt_tokens + request.generated_tokens)
            return None if used <= bound else f"{used} KV tokens with its prompt, watermark {bound:.1f}"

        return judge

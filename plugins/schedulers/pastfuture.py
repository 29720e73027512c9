"""Past-Future: admit while the batch's predicted peak of KV demand fits, lengths drawn from the recent past.

Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025, arXiv
2507.10150; artifact WuSiYu/lightllm-ae at 0da617f (server ``router/req_queue.py``, toy study
``behavior-analysis/``).

Mechanism: the past is a sliding window H of finished output lengths. At an admission pass, S scenarios draw
an output length for every running request: one that has produced d tokens interpolates linearly between
neighbours of [d] + {h in H : h > d} + [max_new_tokens, if larger]. Each candidate is added to every scenario
with a uniform draw from H. It is admitted if the future peak M*, the maximum over scenarios, stays below the
capacity less the reserve. Composer, victims and order: ``_lightllm.py``.

Symbols:
    W       ``window``
    S       ``min(scenarios, scenario_budget // running + 1)``, 1 when nothing runs
    (a, b)  KV tokens held or needed after prefill (prompt and output so far), and remaining output tokens
    M*      max_i(sum_{j<=i} a_j + i * b_i), with b descending

Deviations:
1. When nothing runs, the head of the queue is admitted as soon as its prompt fits; the released code would
   wait for ever if its predicted peak is above the bound.
2. A page belongs to one request: ``page_tokens - 1`` is added to every a. With pages of one token M* is the
   paper's.
3. An evicted request is drawn on what it has produced; the artifact's server draws it afresh.
4. Every draw is cut at the request's max_new_tokens. H begins with the longest output the model allows (cut
   like any draw); LightLLM derives it from its own limits on totals and prompts.
5. Completed requests enter H, length-capped ones too: that is the KV they took. Cancelled and aborted ones
   do not: their lengths would be too short.
6. Any number of requests per pass (artifact's server: one; its toy study: no limit), and nobody is ended for
   the SLA, unless queue_limit_ms and gap_limit_ms say when; the latter then ends evicted requests as well.
7. A prompt longer than the token budget runs in chunks; LightLLM runs it whole.
8. Each of several samples of one prompt counts with the whole prompt, though they share its pages.

Faithful when: M*{(10, 5), (20, 2), (8, 3)} = 44, and M* equals brute force; with H = the true constant length
the plans are the oracle's; a cold start admits no more than conservative; KV use is conservative < pastfuture
<= oracle < aggressive; the conditional draw is never below d nor above max(H, max_new_tokens); nobody
overtakes the head.

Tier: prototype: its toy study is reproduced (``pastfuture_toy``), of its goodput the shape
(``pastfuture_goodput``).
"""

from __future__ import annotations

from operator import sub
from typing import Self

from pydantic import Field, model_validator

from servelab.core.api import Context, Record, RequestFinished, RequestView
from servelab.plugins.schedulers._future_peak import FuturePeak
from servelab.plugins.schedulers._lightllm import ComposerConfig, Judge, LightLLM, Room
from servelab.plugins.schedulers._past_lengths import PastLengths


class PastFutureConfig(ComposerConfig):
    """Settings of ``+scheduler=pastfuture``."""

    window: int = Field(
        1000,
        ge=1,
        le=1_000_000,
        description="output lengths remembered, W (paper, second-hand, and artifact toy study: 1000; "
        "artifact server: 40; LightLLM's branch: 200)",
    )
    reserve: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of KV memory kept free (artifact server: 0.05; its toy study: 0.03)",
    )
    scenarios: int = Field(5, ge=1, description="scenarios of one pass at most (artifact: 5)")
    scenario_budget: int = Field(
        200, ge=0, description="S = this // running requests + 1, at most scenarios (artifact: 200)"
    )
    initial_length: int | None = Field(
        None,
        ge=1,
        description="output tokens of each entry that the window begins with; None: the longest output the "
        "model allows, so that a cold start is conservative (artifact server: its longest output; toy study: "
        "512)",
    )
    initial_copies: int | None = Field(
        None,
        ge=1,
        description="how many entries the window begins with, at most W: admission stays conservative until "
        "about as many requests have finished; None: W/2 (artifact)",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.initial_copies is not None and self.initial_copies > self.window:
            raise ValueError(f"initial_copies={self.initial_copies} do not fit in window={self.window}")
        return self


class PastFuture(LightLLM):
    """State: the window. A pass costs O(S n) draws, and O(S n log n) per candidate, n requests running."""

    def __init__(self, config: PastFutureConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config
        longest = config.initial_length or ctx.limits.max_model_len - 1
        self.past = PastLengths(config.window, longest, ctx.rng, config.initial_copies)

    def on_event(self, record: Record) -> None:
        if isinstance(record, RequestFinished) and record.outcome == "completed":
            self.past.record(record.output_tokens)

    def admission(self, running: list[RequestView], room: Room) -> Judge:
        config, past, partial = self.config, self.past, room.page_tokens - 1
        n = min(config.scenarios, config.scenario_budget // len(running) + 1) if running else 1
        held: list[int] = []  # a, one per running request and sample of it to come; likewise d, and the cap
        produced: list[int] = []
        caps: list[int] = []
        for request in running:
            d = request.generated_tokens
            for _ in range(1 if d else 1 + request.forks):  # samples have begun when there is a token
                held.append(request.prompt_tokens + d + partial)
                produced.append(d)
                caps.append(request.max_new_tokens)
        lengths = past.draw_longer(zip(produced, caps, strict=True), n)
        scenarios = zip(*lengths, strict=True) if lengths else [()] * n
        futures = [FuturePeak(held, map(sub, drawn, produced)) for drawn in scenarios]
        bound = room.capacity * (1 - config.reserve) - room.kept

        def judge(request: RequestView) -> str | None:
            d, cap, peak = request.generated_tokens, request.max_new_tokens, 0
            a, samples = request.prompt_tokens + d + partial, 1 + request.forks
            for future in futures:
                for _ in range(samples):
                    length = past.draw_longer([(d, cap)], 1)[0][0] if d else past.draw(cap)
                    future.add(a, length - d)
                if future.most >= bound:  # else its peak is below the bound, too
                    peak = max(peak, future.peak())
            if peak < bound:
                return None
            return f"predicted peak {peak} of {bound:.1f} KV tokens, S={n}, {past.describe()}"

        return judge

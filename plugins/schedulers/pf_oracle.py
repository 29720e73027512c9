"""Theoretical optimum of Past-Future: admit while the batch's true peak of KV demand fits.

Source: Gong et al., ASPLOS 2025, arXiv 2507.10150 ("theoretical optimum"); artifact WuSiYu/lightllm-ae at
0da617f, ``behavior-analysis/scheduler_theoretical_optimum_dist1-3.py``.

Mechanism: as ``pastfuture``, with true output lengths in place of draws and no reserve. An upper bound for
length prediction: it reads what no real policy can know, and every report of such a run is stamped.

Symbols: (a, b) and M* as in ``pastfuture``.

Deviations:
1. The first of an empty batch is admitted as soon as its prompt fits.
2. A page belongs to one request: ``page_tokens - 1`` is added to every a. With pages of one token M* is the
   paper's.
3. Lengths are cut at max_new_tokens.
4. A prompt longer than the token budget runs in chunks; LightLLM runs it whole.
5. Each of several samples of one prompt counts with the whole prompt, though they share its pages.

Faithful when: nobody is ever evicted; M* as in ``pastfuture``; nobody overtakes the head.

Tier: prototype.
"""

from __future__ import annotations

from collections.abc import Iterator

from servelab.core.api import ConfigError, Context, RequestView, WorkloadError, sample_id
from servelab.plugins.schedulers._future_peak import FuturePeak
from servelab.plugins.schedulers._lightllm import ComposerConfig, Judge, LightLLM, Room


class PFOracleConfig(ComposerConfig):
    """Settings of ``+scheduler=pf_oracle``."""


class PFOracle(LightLLM):
    """A pass costs O(n), and O(n log n) per candidate, n requests running."""

    def __init__(self, config: PFOracleConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        if ctx.oracle is None:
            raise ConfigError(
                f"scheduler {ctx.name!r} was built without the workload's truths",
                why="it admits by true output lengths",
                do="use compose(), or declare oracle=True in its spec",
            )
        self._truth = ctx.oracle
        self._where = f"scheduler {ctx.name!r}"

    def admission(self, running: list[RequestView], room: Room) -> Judge:
        partial, bound = room.page_tokens - 1, room.capacity - room.kept

        def demands(request: RequestView) -> Iterator[tuple[int, int]]:
            produced = request.generated_tokens
            for k in range(1 + request.forks):
                yield request.prompt_tokens + produced + partial, self._length(request, k) - produced

        future = FuturePeak()
        for request in running:
            for demand in demands(request):
                future.add(*demand)

        def judge(request: RequestView) -> str | None:
            for demand in demands(request):
                future.add(*demand)
            peak = future.peak()
            return None if peak < bound else f"true peak {peak} of {bound} KV tokens"

        return judge

    def _length(self, request: RequestView, sample: int) -> int:
        try:
            truth = self._truth(sample_id(request.id, sample)).output_tokens
        except KeyError:
            raise WorkloadError(
                f"request {request.id} has no true output length",
                where=self._where,
                why="this scheduler admits by true lengths, and the workload states none",
                do="use a workload that enforces output lengths, or +scheduler=pastfuture",
            ) from None
        return min(truth, request.max_new_tokens)

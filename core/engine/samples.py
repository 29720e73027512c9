"""Several outputs of one prompt: the first request computes the prompt, the others fork from it.

Until then no policy sees the others. When the launch that ends the prompt has landed, each has its first
token (drawn in that launch, from the same logits) and runs on pages shared with the first, copied on write.
One that cannot share waits like a preempted request and computes the prompt itself; the log says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from servelab.core.engine.state import Request
from servelab.core.errors import PluginError
from servelab.core.events import Batch, LaunchDone
from servelab.core.plan import Outcome
from servelab.core.records import RequestAdmitted, RequestForked, TokensEmitted
from servelab.core.request import Phase

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine


class Samples:
    """The requests that are samples of one prompt, by the id of the first.

    Args:
        shares: the kvcache and the prefix store, if any, let requests share pages.
    """

    def __init__(self, engine: Engine, *, shares: bool) -> None:
        self._engine = engine
        self._shares = shares
        self._live: dict[str, list[Request]] = {}
        self.forking = 0
        """Samples whose prompt is being computed by a request that is not waiting (any more, or again)."""

    def arrived(self, first: Request, others: Sequence[Request]) -> None:
        """The others wait for the prompt of the first."""
        for r in others:
            r.phase = Phase.FORKING
        first.forks = list(others)
        self._live[first.id] = [first, *others]

    def of(self, request_id: str) -> list[Request]:
        """What a client means by an id: all live samples of a prompt, or one of them; empty: none is live."""
        samples = self._live.get(request_id)
        if samples is not None:
            return list(samples)
        r = self._engine.requests.get(request_id)
        return [] if r is None else [r]

    def unqueued(self, first: Request) -> None:
        """The first leaves the queue, for the first time or again."""
        self.forking += len(first.forks)

    def admitted(self, first: Request) -> None:
        """The first is going to compute the prompt; a word for each of the others, once."""
        engine = self._engine
        for r in first.forks:
            if r.admitted_ns is not None:
                continue
            r.admitted_ns = engine.now_ns
            engine.emit(RequestAdmitted(t_ns=engine.now_ns, engine=engine.index, request=r.id, resumed=False))

    def requeued(self, first: Request) -> None:
        """The first is back in the queue and computes its prompt later."""
        self.forking -= len(first.forks)

    def ended(self, r: Request, was: Phase) -> list[Request]:
        """A request has ended; returns those that end with it, because nobody computes their prompt now."""
        spec = r.spec
        name = spec.id if not spec.sample else spec.id.removesuffix(f"#{spec.sample}")
        live = self._live.get(name)
        if live is None:
            return []
        live.remove(r)
        if not live:
            del self._live[name]
        if was is Phase.FORKING and live and r in live[0].forks:  # it gives up before the prompt is computed
            live[0].forks.remove(r)
            self.forking -= live[0].phase is not Phase.WAITING
        if was is not Phase.WAITING:
            self.forking -= len(r.forks)
        orphans, r.forks = r.forks, []
        return orphans

    def landed(self, batch: Batch, event: LaunchDone) -> list[tuple[Request, str]]:
        """A launch has ended prompts: their further samples start. Returns those that finished at once."""
        done: list[tuple[Request, str]] = []
        for i, asked in batch.forks.items():
            first, out = batch.requests[i], event.outcomes[i]
            if first.lease is not batch.leases[i] or first.phase is Phase.FINISHED:
                continue  # preempted or ended meanwhile: the prompt is computed again, or by nobody
            if len(out.forks) != len(asked):
                self._bad_outcome(first, batch, f"{len(out.forks)} first tokens", f"{len(asked)}")
            waiting = []
            for r, drawn in zip(asked, out.forks, strict=True):
                if r.phase is Phase.FINISHED:
                    continue
                if len(drawn.tokens) != 1:
                    self._bad_outcome(r, batch, f"{len(drawn.tokens)} output tokens", "1")
                if not self._start(first, r, drawn, event.ends_ns[-1]):
                    waiting.append(r)
                if drawn.finish is not None or r.generated >= r.max_new_tokens:
                    done.append((r, drawn.finish or "length"))
            first.forks = []
            for r in reversed(waiting):
                self._engine.waiting.move_to_end(r.id, last=False)
        return done

    def _start(self, first: Request, r: Request, drawn: Outcome, end_ns: int) -> bool:
        """Run on the pages of the first; False if it must compute the prompt itself."""
        engine = self._engine
        self.forking -= 1
        r.generated = 1
        r.output += drawn.tokens
        r.token_times.append(end_ns)
        reason = self._obstacle(first)
        shared = 0
        if reason:
            r.phase = Phase.WAITING
            r.pending = r.prompt_tokens + 1
            engine.waiting[r.id] = r
        else:
            shared = r.computed = first.prompt_tokens
            r.pending = 1
            engine.ledger.fork(first, r)
            if engine.reuse is not None:
                engine.reuse.forked(first, r)
            r.phase = Phase.RUNNING
            engine.running[r.id] = r
        engine.emit(
            RequestForked(
                t_ns=end_ns,
                engine=engine.index,
                request=r.id,
                parent=first.id,
                shared_tokens=shared,
                reason=reason,
            )
        )
        if engine.token_log:
            engine.emit(
                TokensEmitted(
                    t_ns=end_ns,
                    engine=engine.index,
                    request=r.id,
                    tokens=list(drawn.tokens),
                    logprobs=None if drawn.logprobs is None else list(drawn.logprobs),
                )
            )
        return not reason

    def _obstacle(self, first: Request) -> str:
        """Why no sample can share its pages now; empty: one can."""
        engine = self._engine
        if not self._shares:
            return "the kvcache or the prefix store cannot share pages between samples"
        if not engine.ledger.sees_all(first.lease, first.prompt_tokens):
            return "accepted drafts have moved the window of the first sample on"
        most = engine.limits.max_batch_requests * engine.limits.lanes
        if len(engine.running) >= most:
            return f"{most} requests run, as many as launches take (engine.max_batch_requests)"
        return ""

    def check_integrity(self) -> None:
        """Recount.

        Raises:
            PluginError: a sample waits for a prompt that nobody computes, or the counts are wrong.
        """
        live = self._engine.requests.values()
        promised = [one for r in live for one in r.forks]
        stray = [r.id for r in live if (r.phase is Phase.FORKING) != (r in promised)]
        forking = sum(len(r.forks) for r in live if r.phase is not Phase.WAITING)
        listed = {r.id for samples in self._live.values() for r in samples}
        if stray or forking != self.forking or not listed <= self._engine.requests.keys():
            raise PluginError(
                f"samples do not add up: {stray} stray, {self.forking} counted as forking, {forking} are",
                why="every sample waits for the prompt of one live request, or runs by itself",
            )

    def _bad_outcome(self, r: Request, batch: Batch, what: str, wanted: str) -> None:
        raise PluginError(
            f"the executor reported {what} for samples of the prompt of request {r.id}",
            where=f"launch {batch.launch}, lane {batch.lane}",
            why=f"expected {wanted}",
            do="mend the executor's launch(): Batch.forks asks for one Outcome per sample",
        )

"""Records in, facts per request and per engine out. Fed live by an observer or from a log file alike.

Cost: one append per request and step, one memory copy per request and hold; 8 bytes per output token.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any, get_args

from servelab.core.errors import LogError
from servelab.core.metrics.definitions import e2el_ns, itl_chunk_ns, tpot_ns, ttft_ns
from servelab.core.metrics.memory import MemoryFacts
from servelab.core.records import (
    Ending,
    PagesEvicted,
    QualityBegan,
    QualityMeasured,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestPreempted,
    RequestRouted,
    RunFinished,
    RunStarted,
    StepDone,
)

STATES: tuple[Ending, ...] = get_args(Ending)
"""How requests end; one whose terminal record is missing counts as ``unfinished``."""


class RequestFacts:
    """What is known about one request. Times are in nanoseconds, ``None`` until they happened."""

    __slots__ = (
        "admitted_ns",
        "arrival_ns",
        "bounds",
        "cached_tokens",
        "ended_ns",
        "engine",
        "first_cached",
        "id",
        "outcome",
        "parent",
        "preemptions",
        "prompt_tokens",
        "reason",
        "reported_tokens",
        "request_class",
        "sizes",
        "times",
    )

    def __init__(self, arrived: RequestArrived) -> None:
        self.id = arrived.request
        self.engine = arrived.engine
        self.arrival_ns = arrived.t_ns
        self.prompt_tokens = arrived.prompt_tokens
        self.parent = arrived.parent
        """The request that computes its prompt, if it is a further sample of one."""
        self.request_class = arrived.request_class
        slo = {
            "ttft": arrived.slo_ttft_ns,
            "tpot": arrived.slo_tpot_ns,
            "e2el": arrived.slo_e2el_ns,
            "tbt": arrived.slo_tbt_ns,
        }
        self.bounds: dict[str, int] = {metric: bound for metric, bound in slo.items() if bound is not None}
        """Stated bounds by metric."""
        self.admitted_ns: int | None = None
        """When it was scheduled for the first time."""
        self.times: array[int] = array("q")
        """When each chunk of output came."""
        self.sizes: array[int] | None = None
        """Tokens of each chunk; None: all have one."""
        self.ended_ns: int | None = None
        self.outcome: Ending | None = None
        """As in its terminal record."""
        self.reason = ""
        self.reported_tokens = 0
        """Output tokens according to the terminal record."""
        self.preemptions = 0
        self.cached_tokens = 0
        """Not computed again, when it was last admitted."""
        self.first_cached = 0
        """Prompt tokens not computed, when it was first admitted."""

    def add(self, times: array[int], size: int) -> None:
        """Append chunks of ``size`` tokens each."""
        if size != 1 and self.sizes is None:
            self.sizes = array("q", [1]) * len(self.times)
        if self.sizes is not None:
            self.sizes.extend(array("q", [size]) * len(times))
        self.times.extend(times)

    @property
    def output_tokens(self) -> int:
        """Output tokens that came out, N."""
        return len(self.times) if self.sizes is None else sum(self.sizes)

    @property
    def state(self) -> Ending:
        """How it ended."""
        return self.outcome or "unfinished"

    @property
    def last_ns(self) -> int | None:
        """The last chunk's time; without output, the end."""
        return self.times[-1] if self.times else self.ended_ns

    @property
    def ttft_ns(self) -> int | None:
        return ttft_ns(self.arrival_ns, self.times[0]) if self.times else None

    @property
    def tpot_ns(self) -> float:
        return tpot_ns(self.times[0], self.times[-1], self.output_tokens) if self.times else 0.0

    @property
    def tbt_ns(self) -> int:
        """Longest gap between chunks; 0 with fewer than two."""
        return max(itl_chunk_ns(self.times), default=0)

    @property
    def e2el_ns(self) -> int | None:
        last = self.last_ns
        return None if last is None else e2el_ns(self.arrival_ns, last)


class EngineFacts:
    """Sums over the launches of one engine."""

    __slots__ = (
        "batch_requests",
        "batch_tokens",
        "first_ns",
        "free_integral",
        "last_free",
        "last_ns",
        "launches",
        "max_batch_requests",
        "max_batch_tokens",
        "memory",
        "min_free",
        "steps",
    )

    def __init__(self) -> None:
        self.launches = 0
        self.steps = 0
        self.batch_requests = 0
        """Requests in the batch, summed over steps."""
        self.batch_tokens = 0
        """Tokens run, summed over steps."""
        self.max_batch_requests = 0
        self.max_batch_tokens = 0
        self.first_ns = 0
        """End of the first launch."""
        self.last_ns = 0
        """End of the last launch so far."""
        self.last_free: tuple[int, ...] = ()
        """Free pages per pool at ``last_ns``."""
        self.min_free: tuple[int, ...] = ()
        self.free_integral: list[int] = []
        """Free pages per pool times nanoseconds, from ``first_ns`` to ``last_ns``."""
        self.memory = MemoryFacts()

    def add(self, step: StepDone) -> None:
        size, steps, tokens = len(step.requests), len(step.ends_ns), sum(step.tokens)
        self.launches += 1
        self.steps += steps
        self.batch_requests += size * steps
        self.batch_tokens += tokens + size * (steps - 1)
        self.max_batch_requests = max(self.max_batch_requests, size)
        self.max_batch_tokens = max(self.max_batch_tokens, tokens)
        free = step.free_pages
        if self.launches == 1:
            self.first_ns = step.t_ns
            self.min_free = free
            self.free_integral = [0] * len(free)
        else:
            span = max(0, step.t_ns - self.last_ns)  # lanes may report a little out of order
            for pool, pages in enumerate(self.last_free):
                self.free_integral[pool] += pages * span
            if free != self.last_free:
                self.min_free = tuple(map(min, self.min_free, free))
        self.last_ns = max(step.t_ns, self.last_ns)
        self.last_free = free
        self.memory.step(step)

    @property
    def observed_ns(self) -> int:
        """From the end of the first launch to the end of the last one."""
        return self.last_ns - self.first_ns


class Timeline:
    """Facts of one run. Feed it every record in order; ask at any time."""

    def __init__(self) -> None:
        self.requests: dict[str, RequestFacts] = {}
        """By id, in order of arrival."""
        self.engines: dict[int, EngineFacts] = {}
        """By index; engines that admitted at least one request."""
        self.info: dict[str, Any] = {}
        """What ``RunStarted`` said about the run."""
        self.finished: RunFinished | None = None
        self.last_ns = 0
        """Time of the latest record."""
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.evicted_pages = 0
        """By the prefix store, all pools."""
        self.compared = False
        """Whether quantized models were compared, or about to be."""
        self.quality: dict[str, QualityMeasured] = {}
        """By quantizer, the latest."""
        self._feeders: dict[str, Callable[[Any], None]] = {
            RunStarted.ev: self._run_started,
            RequestArrived.ev: self._arrived,
            RequestAdmitted.ev: self._admitted,
            RequestRouted.ev: self._routed,
            RequestForked.ev: self._forked,
            StepDone.ev: self._step,
            RequestPreempted.ev: self._preempted,
            PagesEvicted.ev: self._evicted,
            RequestFinished.ev: self._finished,
            QualityBegan.ev: self._quality_began,
            QualityMeasured.ev: self._quality,
            RunFinished.ev: self._run_finished,
        }

    def feed(self, record: Record) -> None:
        """Take in one record. Types that no metric needs are only noted for their time.

        Raises:
            LogError: the record contradicts what came before it.
        """
        if record.t_ns > self.last_ns:  # cheaper than max(): once per record
            self.last_ns = record.t_ns
        feeder = self._feeders.get(record.ev)
        if feeder is not None:
            feeder(record)

    def feed_all(self, records: Iterable[Record]) -> Timeline:
        """Take in a whole log; returns itself."""
        for record in records:
            self.feed(record)
        return self

    def _run_started(self, record: RunStarted) -> None:
        self.info = dict(record.info)

    def _run_finished(self, record: RunFinished) -> None:
        self.finished = record

    def _arrived(self, record: RequestArrived) -> None:
        if record.request in self.requests:
            raise LogError(
                f"request {record.request} arrives twice",
                where=f"record 'arrived' at {record.t_ns} ns",
                why="ids are unique over a run",
                do="give every request of the workload its own id",
            )
        self.requests[record.request] = RequestFacts(record)

    def _admitted(self, record: RequestAdmitted) -> None:
        facts = self._facts(record.request, record)
        if facts.admitted_ns is None:
            facts.admitted_ns = record.t_ns
            facts.first_cached = record.cached_tokens
        self._engine(record).memory.admitted(record)

    def _routed(self, record: RequestRouted) -> None:
        self._facts(record.request, record).engine = record.engine

    def _forked(self, record: RequestForked) -> None:
        self._facts(record.request, record).add(array("q", [record.t_ns]), 1)
        self._engine(record).memory.forked(record)

    def _evicted(self, record: PagesEvicted) -> None:
        self.evicted_pages += record.pages

    def _preempted(self, record: RequestPreempted) -> None:
        self._facts(record.request, record).preemptions += 1
        self.preemptions += 1
        self.recomputed_tokens += record.lost_tokens
        self._engine(record).memory.preempted(record)

    def _finished(self, record: RequestFinished) -> None:
        facts = self._facts(record.request, record)
        if facts.outcome is not None:
            raise LogError(
                f"request {record.request} ends twice",
                where=f"record 'finished' at {record.t_ns} ns",
                why=f"it had already ended as {facts.outcome!r}; a request has one terminal record",
                do="look for two runs in one log, or report a bug of the engine",
            )
        facts.outcome = record.outcome
        facts.reason = record.reason
        facts.ended_ns = record.t_ns
        facts.reported_tokens = record.output_tokens
        facts.cached_tokens = record.cached_tokens
        if record.engine in self.engines:
            self.engines[record.engine].memory.finished(record)

    def _quality_began(self, record: QualityBegan) -> None:
        self.compared = True

    def _quality(self, record: QualityMeasured) -> None:
        self.quality[record.label] = record

    def _step(self, record: StepDone) -> None:
        ends = record.ends_ns
        steps = len(ends)
        if not steps:
            return
        self._engine(record).add(record)
        requests = self.requests
        times = array("q", ends)
        try:
            for name, emitted in zip(record.requests, record.emitted, strict=True):
                if emitted == steps:
                    facts = requests[name]
                    if facts.sizes is not None:
                        facts.add(times, 1)
                    elif steps == 1:
                        facts.times.append(ends[0])
                    else:
                        facts.times.extend(times)
                elif emitted:
                    requests[name].add(times, _per_step(emitted, steps, name, record))
        except KeyError as error:
            raise _unknown(error.args[0], record) from None

    def _engine(self, record: Record) -> EngineFacts:
        engine = self.engines.get(record.engine)
        if engine is None:
            engine = self.engines[record.engine] = EngineFacts()
        return engine

    def _facts(self, name: str, record: Record) -> RequestFacts:
        facts = self.requests.get(name)
        if facts is None:
            raise _unknown(name, record)
        return facts


def _per_step(emitted: int, steps: int, name: str, record: StepDone) -> int:
    size, rest = divmod(emitted, steps)
    if rest or size < 1:
        raise LogError(
            f"request {name} emitted {emitted} tokens in {steps} equal steps",
            where=f"record 'step' {record.step} at {record.t_ns} ns, engine {record.engine}",
            why="every step of a launch emits the same number of tokens of a request",
            do="report a bug of the engine",
        )
    return size


def _unknown(name: str, record: Record) -> LogError:
    return LogError(
        f"request {name} is named before it arrived",
        where=f"record {record.ev!r} at {record.t_ns} ns, engine {record.engine}",
        why="its 'arrived' record is missing",
        do="feed the log from its beginning",
    )

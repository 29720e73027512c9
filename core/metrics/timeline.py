"""Records in, facts per request and per engine out. Fed live by an observer or from a log file alike.

Cost of a launch: that of comparing two lists, and a little for each request that joins or leaves the batch.
Memory: 8 bytes per step, a few hundred per request, none per output token (``tracks.py``).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from servelab.core.errors import LogError
from servelab.core.metrics.definitions import e2el_ns, itl_chunk_ns, tpot_ns, ttft_ns
from servelab.core.metrics.memory import MemoryFacts
from servelab.core.metrics.tracks import Span, Track
from servelab.core.records import (
    ROUTER,
    ActionDropped,
    Ending,
    InstanceChanged,
    PagesEvicted,
    QualityBegan,
    QualityMeasured,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestHeld,
    RequestMigrated,
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
        "_chunks",
        "_own",
        "_since",
        "_spans",
        "_track",
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
        self._spans: list[Span] = []
        """When chunks of output came, but for those of the track it is on."""
        self._chunks = 0
        """How many these are."""
        self._own: array[int] | None = None
        """The array of its last span, if nobody shares it."""
        self._track: Track | None = None
        self._since = 0
        """Its first step on the track."""
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
        self.leave()
        if size != 1 and self.sizes is None:
            self.sizes = array("q", [1]) * self.chunks
        if self.sizes is not None:
            self.sizes.extend(array("q", [size]) * len(times))
        self._chunks += len(times)
        if self._own is None:
            self._own = times[:]
            self._spans.append((self._own, 0, len(times)))
        else:
            self._own.extend(times)
            self._spans[-1] = self._own, 0, len(self._own)

    def join(self, track: Track) -> None:
        """From now on it gets one token in each step of the track."""
        self.leave()
        self._track, self._since = track, len(track.ends)
        track.members[self.id] = self
        track.storing += track.memory.join(self.id, track.ends)

    def leave(self) -> None:
        """It takes no part in further steps of the track it is on, if any."""
        track = self._track
        if track is None:
            return
        self._track = None
        if len(track.ends) > self._since:
            self._spans.append((track.ends, self._since, len(track.ends)))
            self._chunks += len(track.ends) - self._since
            self._own = None
        del track.members[self.id]
        track.names = None
        track.storing -= track.memory.leave(self.id)

    def spans(self) -> Iterator[Span]:
        """When chunks of output came, in order."""
        yield from self._spans
        if self._track is not None and len(self._track.ends) > self._since:
            yield self._track.ends, self._since, len(self._track.ends)

    @property
    def times(self) -> array[int]:
        """When each chunk of output came: a copy, 8 bytes each."""
        out: array[int] = array("q")
        for ends, first, last in self.spans():
            out += ends[first:last]
        return out

    @property
    def chunks(self) -> int:
        """Chunks of output that came."""
        return self._chunks + (0 if self._track is None else len(self._track.ends) - self._since)

    @property
    def first_chunk_ns(self) -> int | None:
        """When the first one came."""
        if self._spans:
            ends, first, _ = self._spans[0]
            return ends[first]
        for ends, first, _ in self.spans():
            return ends[first]
        return None

    @property
    def last_chunk_ns(self) -> int | None:
        """When the latest one came."""
        if self._track is None and self._spans:
            ends, _, last = self._spans[-1]
            return ends[last - 1]
        latest = None
        for ends, _, last in self.spans():
            latest = ends[last - 1]
        return latest

    @property
    def output_tokens(self) -> int:
        """Output tokens that came out, N."""
        return self.chunks if self.sizes is None else sum(self.sizes)

    @property
    def state(self) -> Ending:
        """How it ended."""
        return self.outcome or "unfinished"

    @property
    def last_ns(self) -> int | None:
        """The last chunk's time; without output, the end."""
        last = self.last_chunk_ns
        return self.ended_ns if last is None else last

    @property
    def ttft_ns(self) -> int | None:
        first = self.first_chunk_ns
        return None if first is None else ttft_ns(self.arrival_ns, first)

    @property
    def tpot_ns(self) -> float:
        first, last = self.first_chunk_ns, self.last_chunk_ns
        return 0.0 if first is None or last is None else tpot_ns(first, last, self.output_tokens)

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
        "tracks",
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
        self.tracks: dict[int, Track] = {}
        """By lane."""

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


class RouterFacts:
    """What a router did besides choosing an instance at arrival."""

    __slots__ = ("came", "dropped", "held", "held_ns", "left", "moved_bytes", "stopped_ns", "waiting")

    def __init__(self) -> None:
        self.held = 0
        """Requests that it did not place at arrival."""
        self.held_ns = 0
        """Time that they waited there, added up."""
        self.waiting: dict[str, int] = {}
        """Those that still wait, and since when."""
        self.came: Counter[int] = Counter()
        """Requests that moved to each instance."""
        self.left: Counter[int] = Counter()
        self.moved_bytes = 0
        self.stopped_ns = 0
        """Time that moved requests stood still, added up."""
        self.dropped = 0
        """Actions that were not carried out."""

    def hold(self, record: RequestHeld) -> None:
        self.held += 1
        self.waiting[record.request] = record.t_ns

    def release(self, record: RequestRouted | RequestFinished) -> None:
        since = self.waiting.pop(record.request, None)
        if since is not None:
            self.held_ns += record.t_ns - since

    def moved(self, record: RequestMigrated) -> None:
        self.came[record.engine] += 1
        self.left[record.source] += 1
        self.moved_bytes += record.bytes
        self.stopped_ns += record.t_ns - record.stopped_ns


class Timeline:
    """Facts of one run. Feed it every record in order; ask at any time."""

    def __init__(self) -> None:
        self.requests: dict[str, RequestFacts] = {}
        """By id, in order of arrival."""
        self.engines: dict[int, EngineFacts] = {}
        """By index; engines that admitted at least one request."""
        self.started_ns: dict[int, int] = {}
        """By instance; those that a router started."""
        self.stopped_ns: dict[int, int] = {}
        """By instance; those that stopped before the run ended."""
        self.router = RouterFacts()
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
            RequestHeld.ev: self.router.hold,
            RequestRouted.ev: self._routed,
            RequestMigrated.ev: self._migrated,
            RequestForked.ev: self._forked,
            StepDone.ev: self._step,
            RequestPreempted.ev: self._preempted,
            ActionDropped.ev: self._dropped,
            PagesEvicted.ev: self._evicted,
            InstanceChanged.ev: self._instance,
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

    def _instance(self, record: InstanceChanged) -> None:
        if record.state == "starting":
            self.started_ns.setdefault(record.engine, record.t_ns)
        elif record.state == "stopped":
            self.stopped_ns.setdefault(record.engine, record.t_ns)

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
        self.router.release(record)

    def _migrated(self, record: RequestMigrated) -> None:
        facts = self._facts(record.request, record)
        facts.leave()
        facts.engine = record.engine
        if record.source in self.engines:
            self.engines[record.source].memory.left(record.request)
        self._engine(record).memory.came(record.request, record.tokens)
        self.router.moved(record)

    def _dropped(self, record: ActionDropped) -> None:
        self.router.dropped += 1

    def _forked(self, record: RequestForked) -> None:
        self._facts(record.request, record).add(array("q", [record.t_ns]), 1)
        self._engine(record).memory.forked(record)

    def _evicted(self, record: PagesEvicted) -> None:
        self.evicted_pages += record.pages

    def _preempted(self, record: RequestPreempted) -> None:
        facts, engine = self._facts(record.request, record), self._engine(record)
        facts.preemptions += 1
        self.preemptions += 1
        self.recomputed_tokens += record.lost_tokens
        facts.leave()
        engine.memory.preempted(record)

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
        facts.leave()
        if record.engine in self.engines:
            self.engines[record.engine].memory.finished(record)
        elif record.engine == ROUTER:
            self.router.release(record)

    def _quality_began(self, record: QualityBegan) -> None:
        self.compared = True

    def _quality(self, record: QualityMeasured) -> None:
        self.quality[record.label] = record

    def _step(self, record: StepDone) -> None:
        ends = record.ends_ns
        steps = len(ends)
        if not steps:
            return
        names, tokens, emitted = record.requests, record.tokens, record.emitted
        if not len(names) == len(tokens) == len(emitted):
            raise LogError(
                f"step {record.step} names {len(names)} requests, {len(tokens)} counts of tokens and "
                f"{len(emitted)} of output",
                where=f"record 'step' at {record.t_ns} ns, engine {record.engine}",
                why="the three lists go together",
                do="look for a damaged log, or report a bug of the engine",
            )
        engine = self._engine(record)
        engine.add(record)
        track = engine.tracks.get(record.lane)
        if track is None:
            track = engine.tracks[record.lane] = Track(engine.memory)
        regular = tokens.count(1) == emitted.count(steps) == len(names)
        one_each = names if regular else [n for n, out in zip(names, emitted, strict=True) if out == steps]
        try:
            if one_each == track.names or self._regroup(track, one_each):
                track.ends.extend(ends)
                engine.memory.grow(track.storing * steps)
            else:
                for name in one_each:
                    self.requests[name].add(array("q", ends), 1)
                    engine.memory.store(name, steps)
            if not regular:
                self._irregular(record, engine.memory)
        except KeyError as error:
            raise _unknown(error.args[0], record) from None

    def _regroup(self, track: Track, names: list[str]) -> bool:
        """Let requests join and leave the track, so that its members are these. False: it is left alone, as
        the launch has little to do with it (prompts run by themselves), or its requests cannot join.
        """
        members = track.members
        joined = [name for name in names if name not in members]
        if not names or any(self.requests[name].sizes is not None for name in joined):
            return False
        if len(members) + len(joined) != len(names):
            left = members.keys() - set(names)
            if len(left) + len(joined) > len(names):
                return False
            for name in left:
                members[name].leave()
        for name in joined:
            self.requests[name].join(track)
        track.names = names
        return True

    def _irregular(self, record: StepDone, memory: MemoryFacts) -> None:
        """Requests of a launch that ran other than one token in its first step, or emitted other than one
        token in each.
        """
        steps, store = len(record.ends_ns), memory.store
        for name, n, out in zip(record.requests, record.tokens, record.emitted, strict=True):
            if out == steps:
                if n != 1:
                    store(name, n - 1)
            else:
                store(name, n + steps - 1)
                if out:
                    size = _per_step(out, steps, name, record)
                    self.requests[name].add(array("q", record.ends_ns), size)

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

"""What a run did over time, in bounded memory: queue, batch, KV pages, preemptions, for plots.

Time is cut into ``BINS`` bins of equal width, and whenever a record comes after the last one, the width
doubles and neighbours are joined. So however long a run is, it ends with between half of them and all in use,
and sums stay exact: they are whole numbers, over whole nanoseconds. What must be known of requests to read
the records is kept while they are live, and only then.

Three kinds of figures:

- *levels* hold until they change (requests waiting and running, pages in use): value times ns, and largest;
- *launches* fill the time between their start and end (tokens and requests of a step): likewise, with the
  busy time itself, so that a mean is over steps and leaves idle time out;
- *counts* are of what happened (arrivals, preemptions, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, TypeVar

from servelab.core.records import (
    ContextEnded,
    ContextKept,
    PagesEvicted,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestPreempted,
    RunFinished,
    RunStarted,
    StepDone,
    TransferStarted,
)

T = TypeVar("T", int, float)

BINS = 512
"""Bins over time, even."""
FIRST_SHIFT = 10
"""Bins begin 2**10 ns wide, about a microsecond."""
NS_PER_S = 1_000_000_000


class Channel:
    """One figure over the bins: its integral over time (value times ns) and its largest value."""

    __slots__ = ("peaks", "sums")

    def __init__(self) -> None:
        self.sums = [0] * BINS
        self.peaks = [0] * BINS

    def fold(self) -> None:
        """Join neighbours into the first half; the lists stay the same objects."""
        self.sums[:] = [a + b for a, b in _pairs(self.sums)] + [0] * (BINS // 2)
        self.peaks[:] = [max(pair) for pair in _pairs(self.peaks)] + [0] * (BINS // 2)


class Counts:
    """How much of something happened, per bin."""

    __slots__ = ("sums",)

    def __init__(self) -> None:
        self.sums: list[float] = [0] * BINS

    def fold(self) -> None:
        self.sums[:] = [a + b for a, b in _pairs(self.sums)] + [0] * (BINS // 2)


class Level:
    """A value that holds until it changes, and since when."""

    __slots__ = ("channel", "since_ns", "value")

    def __init__(self, channel: Channel, since_ns: int = 0) -> None:
        self.channel = channel
        self.value = 0
        self.since_ns = since_ns


class Series:
    """Figures of one run over time. Feed it every record in order; ask at any time.

    Counts of several engines and lanes are added up; KV pages are means over engines, and of the fullest one.
    """

    def __init__(self) -> None:
        self.shift = FIRST_SHIFT
        """A bin is 2**shift ns wide."""
        self.last_ns = 0
        """Time of the latest record that belongs to the serving. Once every request has ended, what follows
        (measuring quality, the end of the run) is no part of it."""
        self.busy = Channel()
        """Launches running at a time (several lanes and engines); its integral is the busy time."""
        self.tokens = Channel()
        """Tokens run by a step."""
        self.prefill = Channel()
        """Of these, those of requests that have not emitted a token since they were (re)admitted."""
        self.batch = Channel()
        """Requests in a step."""
        self.waiting = Channel()
        self.running = Channel()
        self.away = Channel()
        """Live requests that neither wait nor run: paused, swapped out, or on their way. Samples whose prompt
        another request computes are in none of the three."""
        self.kv: list[Channel] = []
        """Pages in use per pool, added up over engines; the peaks are those of one engine."""
        self.pools: list[dict[str, Any]] = []
        """The pools as the run states them, those that state their pages."""
        self.engines: set[int] = set()
        """Engines that ran."""
        self.arrived = Counts()
        self.completed = Counts()
        self.emitted = Counts()
        """Output tokens, spread over the step that brought them."""
        self.preempted: dict[str, Counts] = {}
        """By mode."""
        self.lost = Counts()
        """Computed tokens that preemptions threw away."""
        self.evicted = Counts()
        """Pages the prefix store gave up, all pools."""
        self.moved: dict[str, Counts] = {}
        """Bytes by direction of transfer, when it starts."""
        self._limit = BINS << self.shift
        self._of_steps = (
            *(self.busy.sums, self.tokens.sums, self.batch.sums, self.emitted.sums),
            *(self.tokens.peaks, self.batch.peaks),
        )
        self._levels = [Level(self.waiting), Level(self.running), Level(self.away)]
        self._live = 0
        """Requests that arrived and have not ended."""
        self._counts: dict[int, tuple[int, int]] = {}
        """Requests waiting and running, per engine."""
        self._on_device: set[str] = set()
        """Requests that were admitted and have neither ended nor been preempted since."""
        self._prefilling: set[str] = set()
        """Of the live ones, those admitted that have not emitted a token since."""
        self._forking: set[str] = set()
        """Further samples of prompts that another request computes: in no queue yet."""
        self._alone: set[str] = set()
        """Samples that share nothing and wait to compute the prompt; their first token may end them."""
        self._kept: set[str] = set()
        """Programs whose KV is kept between turns."""
        self._pages: list[tuple[int, int]] = []
        """(index in ``free_pages``, pages of one engine) per channel of ``kv``."""
        self._used: dict[int, list[Level]] = {}
        """Per engine, pages in use per pool."""
        self._feeders: dict[str, Callable[[Any], None]] = {
            RunStarted.ev: self._run_started,
            RequestArrived.ev: self._arrived,
            RequestAdmitted.ev: self._admitted,
            RequestForked.ev: self._forked,
            StepDone.ev: self._step,
            RequestPreempted.ev: self._preempted,
            PagesEvicted.ev: self._evicted,
            TransferStarted.ev: self._transfer,
            ContextKept.ev: self._context_kept,
            ContextEnded.ev: self._context_ended,
            RequestFinished.ev: self._finished,
            RunFinished.ev: _nothing,
        }

    def feed(self, record: Record) -> None:
        """Take in one record; types that no figure needs are passed over."""
        feeder = self._feeders.get(record.ev)
        if feeder is None:
            return
        now = record.t_ns
        if now > self.last_ns:
            if feeder is _nothing and not self._live:
                return
            self.last_ns = now
            if now >= self._limit:
                self._widen(now)
        feeder(record)

    def feed_all(self, records: Iterable[Record]) -> Series:
        """Take in a whole log; returns itself."""
        for record in records:
            self.feed(record)
        return self

    # ------------------------------------------------------------- reading

    @property
    def bins(self) -> int:
        """Bins in use."""
        return (self.last_ns >> self.shift) + 1 if self.last_ns else 0

    @property
    def edges_s(self) -> list[float]:
        """Borders of the bins in use, in s from the start of the run; the last one is its end."""
        width = 1 << self.shift
        return [*(i * width / NS_PER_S for i in range(self.bins)), self.last_ns / NS_PER_S]

    def widths_ns(self) -> list[int]:
        """How much of each bin in use the run covers, ns; the last one may be cut to 1."""
        width = 1 << self.shift
        return [min(width, max(1, self.last_ns - i * width)) for i in range(self.bins)]

    def level(self, channel: Channel) -> list[float]:
        """Mean over time of a level, per bin in use."""
        self.settle()
        return [total / ns for total, ns in zip(channel.sums, self.widths_ns(), strict=False)]

    def per_step(self, channel: Channel) -> list[float]:
        """Mean over the busy time of a figure of launches, per bin in use; 0 where nothing ran."""
        pairs = zip(channel.sums[: self.bins], self.busy.sums, strict=False)
        return [total / busy if busy else 0.0 for total, busy in pairs]

    def peaks(self, channel: Channel) -> list[int]:
        """Largest value, per bin in use."""
        self.settle()
        return channel.peaks[: self.bins]

    def pages(self, pool: int) -> list[float]:
        """Mean over time and engines of pages in use, per bin in use; ``pool`` indexes ``pools``."""
        engines = max(1, len(self.engines))
        return [value / engines for value in self.level(self.kv[pool])]

    def rate(self, counts: Counts, slices: int) -> tuple[list[float], list[float]]:
        """Per second of run time, in at most so many slices: their borders in s, and the rates.

        The end of the run rarely is the border of a slice; what is left over belongs to the last whole one.
        """
        n = self.bins
        if not n:
            return [0.0], []
        step = max(1, -(-n // slices))
        firsts = [*range(0, n, step)]
        if len(firsts) > 1:
            firsts.pop()
        upto = [*self.upto(counts), 0]  # [-1]: before the first bin
        width = (1 << self.shift) / NS_PER_S
        edges = [*(first * width for first in firsts), self.last_ns / NS_PER_S]
        ends = [*firsts[1:], n]
        sums = (upto[end - 1] - upto[first - 1] for first, end in zip(firsts, ends, strict=True))
        return edges, [total / (b - a) for total, a, b in zip(sums, edges, edges[1:], strict=False)]

    def upto(self, counts: Counts) -> list[float]:
        """How much happened by the end of each bin in use."""
        return list(accumulate(counts.sums[: self.bins]))

    def settle(self) -> None:
        """Add what the levels held since they changed, up to ``last_ns``."""
        for level in (*self._levels, *(one for levels in self._used.values() for one in levels)):
            self._set(level, level.value, self.last_ns)

    # ------------------------------------------------------------- records

    def _run_started(self, record: RunStarted) -> None:
        stated = (record.info.get("kv") or {}).get("pools") or ()
        for index, pool in enumerate(stated):
            if pool.get("pages"):
                self.pools.append(dict(pool))
                self._pages.append((index, pool["pages"]))
                self.kv.append(Channel())

    def _arrived(self, record: RequestArrived) -> None:
        self.arrived.sums[record.t_ns >> self.shift] += 1
        if record.parent is not None:
            self._forking.add(record.request)
            return
        self._live += 1
        self._queue(record, 1, 0)

    def _forked(self, record: RequestForked) -> None:
        self._forking.discard(record.request)
        self.emitted.sums[record.t_ns >> self.shift] += 1
        self._live += 1
        shares = record.shared_tokens > 0
        (self._on_device if shares else self._alone).add(record.request)
        self._queue(record, int(not shares), int(shares))

    def _admitted(self, record: RequestAdmitted) -> None:
        if record.request in self._forking:
            return
        self._alone.discard(record.request)
        self._on_device.add(record.request)
        self._prefilling.add(record.request)
        self._queue(record, -1, 1)

    def _preempted(self, record: RequestPreempted) -> None:
        at = record.t_ns >> self.shift
        counts = self.preempted.get(record.mode)
        if counts is None:
            counts = self.preempted[record.mode] = Counts()
        counts.sums[at] += 1
        self.lost.sums[at] += record.lost_tokens
        again = record.mode == "recompute"
        self._queue(record, int(again), -int(record.request in self._on_device))
        self._on_device.discard(record.request)

    def _finished(self, record: RequestFinished) -> None:
        name = record.request
        if name in self._forking:
            self._forking.discard(name)
            return
        if record.outcome == "completed":
            self.completed.sums[record.t_ns >> self.shift] += 1
        self._live -= 1
        self._prefilling.discard(name)
        alone = name in self._alone
        self._alone.discard(name)
        if name in self._on_device or (record.outcome == "completed" and not alone):
            self._on_device.discard(name)
            self._queue(record, 0, -1)
        else:
            self._queue(record, -1, 0)
        if not self._live:
            self._rest(record.t_ns)

    def _rest(self, now: int) -> None:
        """No request is live: nothing waits or runs, and only KV kept between turns is in use."""
        self._counts.clear()
        idle = list(self._levels)
        if not self._kept:
            idle += [level for levels in self._used.values() for level in levels]
        for level in idle:
            self._set(level, 0, now)

    def _evicted(self, record: PagesEvicted) -> None:
        self.evicted.sums[record.t_ns >> self.shift] += record.pages

    def _transfer(self, record: TransferStarted) -> None:
        counts = self.moved.get(record.direction)
        if counts is None:
            counts = self.moved[record.direction] = Counts()
        counts.sums[record.t_ns >> self.shift] += record.bytes

    def _context_kept(self, record: ContextKept) -> None:
        self._kept.add(record.program)

    def _context_ended(self, record: ContextEnded) -> None:
        self._kept.discard(record.program)

    def _step(self, record: StepDone) -> None:
        ends = record.ends_ns
        if not ends:
            return
        first, last, size = ends[0], ends[-1], len(record.requests)
        tokens = sum(record.tokens)
        prefill = self._prefill(record) if self._prefilling else 0
        emitted = sum(record.emitted) / len(ends)  # the same number in each step
        self._launch(record.start_ns, first, tokens, prefill, size, emitted)
        if last > first:
            self._launch(first, last, size, 0, size, emitted * (len(ends) - 1))
        elif len(ends) > 1:  # steps that take no time
            self.emitted.sums[last >> self.shift] += emitted * (len(ends) - 1)
        engine = record.engine
        if (record.waiting, record.running) != self._counts.get(engine):
            self._state(record, record.waiting, record.running)
        levels = self._used.get(engine)
        if levels is None:
            self.engines.add(engine)
            levels = self._used[engine] = [Level(channel) for channel in self.kv]
        free, at = record.free_pages, record.t_ns >> self.shift
        for level, (index, pages) in zip(levels, self._pages, strict=True):
            used = pages - free[index]
            if used != level.value:
                self._set(level, used, record.t_ns)
                if used > level.channel.peaks[at]:  # even if it is given back at once
                    level.channel.peaks[at] = used

    def _prefill(self, record: StepDone) -> int:
        """Tokens in the first step of requests that prefill; those that emit now are done with it."""
        prefilling, total = self._prefilling, 0
        for name, tokens, emitted in zip(record.requests, record.tokens, record.emitted, strict=True):
            if name in prefilling:
                total += tokens
                if emitted:
                    prefilling.discard(name)
        return total

    # ------------------------------------------------------------- bins

    def _widen(self, now: int) -> None:
        """Double the width until ``now`` is inside."""
        while now >= self._limit:
            for one in self._all():
                one.fold()
            self.shift += 1
            self._limit <<= 1

    def _all(self) -> Iterator[Channel | Counts]:
        yield from (self.busy, self.tokens, self.prefill, self.batch, self.waiting, self.running, self.away)
        yield from self.kv
        yield from (self.arrived, self.completed, self.emitted, self.lost, self.evicted)
        yield from self.preempted.values()
        yield from self.moved.values()

    def _launch(self, start: int, end: int, tokens: int, prefill: int, size: int, emitted: float) -> None:
        """A step, or equal ones, from ``start`` to ``end``."""
        shift, span = self.shift, end - start
        busy_ns, tokens_ns, batch_ns, out, most_tokens, most = self._of_steps
        i, last = start >> shift, end >> shift
        while True:
            ns = (end if i == last else (i + 1) << shift) - start
            busy_ns[i] += ns
            tokens_ns[i] += tokens * ns
            batch_ns[i] += size * ns
            out[i] += emitted if ns == span else emitted * ns / span
            if tokens > most_tokens[i]:
                most_tokens[i] = tokens
            if size > most[i]:
                most[i] = size
            if prefill:
                self.prefill.sums[i] += prefill * ns
                if prefill > self.prefill.peaks[i]:
                    self.prefill.peaks[i] = prefill
            start += ns
            i += 1
            if start == end:  # also where it ends at the border of a bin: nothing of it is in the next one
                return

    def _queue(self, record: Record, waiting: int, running: int) -> None:
        """More or fewer requests of one engine wait and run; the next step's own counts stand."""
        before = self._counts.get(record.engine, (0, 0))
        self._state(record, max(0, before[0] + waiting), max(0, before[1] + running))

    def _state(self, record: Record, waiting: int, running: int) -> None:
        """So many requests of one engine wait and run."""
        engine = record.engine
        before = self._counts.get(engine, (0, 0))
        self._counts[engine] = (waiting, running)
        all_waiting, all_running, away = self._levels
        waiting += all_waiting.value - before[0]
        running += all_running.value - before[1]
        if waiting != all_waiting.value:
            self._set(all_waiting, waiting, record.t_ns)
        if running != all_running.value:
            self._set(all_running, running, record.t_ns)
        elsewhere = max(0, self._live - waiting - running)
        if elsewhere != away.value:
            self._set(away, elsewhere, record.t_ns)

    def _set(self, level: Level, value: int, now: int) -> None:
        """From ``now`` on it is ``value``. Records may come a little out of order: time never goes back."""
        start, held, shift = level.since_ns, level.value, self.shift
        level.value = value
        if now <= start:
            return
        level.since_ns = now
        if not held:
            return
        sums, peaks = level.channel.sums, level.channel.peaks
        i, last = start >> shift, now >> shift
        while i < last:
            border = (i + 1) << shift
            sums[i] += held * (border - start)
            if held > peaks[i]:
                peaks[i] = held
            start = border
            i += 1
        if now > start:
            sums[i] += held * (now - start)
            if held > peaks[i]:
                peaks[i] = held


def _nothing(_: Record) -> None:
    """For records that only end the time."""


def _pairs(values: list[T]) -> Iterator[tuple[T, T]]:
    return zip(values[::2], values[1::2], strict=True)

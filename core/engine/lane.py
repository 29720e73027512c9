"""One lane of a device: launches in flight, a plan being repeated, and the booking of tokens and pages."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from servelab.core.engine.state import Request
from servelab.core.errors import PluginError
from servelab.core.events import Batch, Interrupt, LaunchDone
from servelab.core.plan import Background, Hold, Outcome, Tokens
from servelab.core.request import Phase

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine

Done = list[tuple[Request, str]]
"""Requests that finished, and why."""

_NO_OUTPUT = "none: its prompt is not finished"


def position(item: Tokens, r: Request, layers: int) -> tuple[int, bool]:
    """Where an item that is about to be launched starts, and whether it ends with a new output token."""
    start = r.computed + r.flying
    if item.advance != "append":
        return (r.computed - item.n if item.advance == "rewrite" else start), False
    left = r.pending - item.n
    if item.layers:
        if r.layer_cursor:  # its tokens were booked when the chunk ran its first layers
            start, left = start - item.n, r.pending
        if item.layers[1] < layers:
            return start, False
    return start, left <= 0


class Lane:
    """Books what is launched, and commits what comes back.

    A request's tokens are booked (``flying``, ``expected``) when launched and committed (``computed``,
    ``generated``) when the launch ends; see the invariant in ``Request``.
    """

    __slots__ = ("_engine", "_hold_until", "_steps_left", "_work", "flights", "index", "last_end_ns")

    def __init__(self, engine: Engine, index: int) -> None:
        self._engine = engine
        self.index = index
        self.flights: deque[tuple[Batch, int]] = deque()
        """Launches in flight with the time they were launched, oldest first."""
        self.last_end_ns = 0
        """When its last launch ended; one planned ahead starts then, not when it was planned."""
        self._work: list[Tokens | Background] | None = None
        """The plan to repeat without asking the scheduler."""
        self._steps_left = 0
        self._hold_until: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether one more launch may be sent. Nothing is queued behind a launch of several steps."""
        flights = self.flights
        if not flights:
            return True
        return len(flights) < self._engine.limits.max_in_flight and flights[-1][0].steps == 1

    @property
    def holds(self) -> bool:
        """Whether it repeats a plan."""
        return self._work is not None

    # ------------------------------------------------------------------ holds

    def hold(self, work: list[Tokens | Background], hold: Hold) -> None:
        """Repeat this work from now on."""
        self._work, self._steps_left, self._hold_until = list(work), hold.max_steps, hold.until_ns

    def end_hold(self) -> Interrupt | None:
        """Something happened: ask again. The interrupt, if one must be sent."""
        if self._work is None:
            return None
        self._work = None
        if self.flights and self.flights[-1][0].steps > 1:
            return Interrupt(self.index, self.flights[-1][0].launch)
        return None

    def shorten(self) -> None:
        """Of the held launch in flight only the first step will run: as if it had been launched so."""
        batch, _ = self.flights[0]
        self._unnumber(batch, 1)
        unused, batch.steps = batch.steps - 1, 1
        if self._work is not None:  # the hold goes on
            self._steps_left += unused
        self._engine.ledger.settle(batch.launch)
        self._engine.ledger.landed(())

    def _unnumber(self, batch: Batch, ran: int) -> None:
        """Cut short: give back the numbers of steps that will not run, if no later ones are given."""
        if self._engine.step == batch.first_step + batch.steps:
            self._engine.step = batch.first_step + ran

    def lengthen(self, batch: Batch) -> None:
        """Let a held launch of one step run as many as it can. Nothing else may run beside it."""
        if self._work is None or self._engine.limits.max_in_flight > 1:
            return  # planning ahead, the next step is queued before this one ends
        more = self._steps_ahead(batch, self._steps_left + 1) - 1
        batch.steps += more
        self._steps_left -= more
        self._engine.step += more

    def repeat(self) -> Batch | None:
        """The next launch of a held plan; None if there is none or it cannot go on."""
        work, ledger = self._work, self._engine.ledger
        if work is None:
            return None
        until = self._hold_until
        over = self._steps_left < 1 or (until is not None and self._engine.now_ns >= until)
        if not over:
            free = list(ledger.free())
            for item in work:
                assert isinstance(item, Tokens)
                r = item.request._r
                if r.pending != 1 or r.phase is not Phase.RUNNING:
                    over = True
                    break
                if not r.slack:
                    for i, need in enumerate(ledger.missing(r, 1)):
                        free[i] -= need
            over = over or min(free) < 0
        if over:
            self._work = None
            return None
        return self.launch(work)

    # --------------------------------------------------------------- launching

    def launch(self, work: list[Tokens | Background]) -> Batch:
        """Reserve pages, fence them, put the batch in flight; a held plan runs as many steps as it can."""
        engine = self._engine
        items = [item for item in work if type(item) is Tokens]
        requests = [item.request._r for item in items]
        starts = [r.computed + r.flying for r in requests]
        samples = [True] * len(requests)
        extras: dict[int, Tokens] = {}
        forks: dict[int, list[Request]] = {}
        running, reserve, index = Phase.RUNNING, engine.ledger.reserve, self.index
        for i, (r, item) in enumerate(zip(requests, items, strict=True)):
            if r.phase is not running:
                engine.admit(r)
            if item.plain:
                n = item.n
                if n > r.slack:
                    reserve(r, n)
                r.slack -= n
                r.flying += n
                if n == r.pending:
                    r.expected += 1
                    if r.generated + r.expected < r.max_new_tokens:
                        r.pending = 1
                    else:
                        r.pending = 0
                else:
                    r.pending -= n
                    samples[i] = False
            else:
                extras[i] = item
                starts[i], samples[i] = self._book_special(item, r)
            if r.forks and samples[i] and r.generated + r.expected == 1:
                forks[i] = list(r.forks)
            r.launches += 1
            r.lane = index
            r.lease.in_flight += 1  # the fence; landed() takes it down
        leases = [r.lease for r in requests]
        background = tuple([item for item in work if type(item) is Background])
        engine.launches += 1
        batch = Batch(
            index,
            engine.launches,
            engine.step,
            1,
            requests,
            leases,
            [item.n for item in items],
            starts,
            samples,
            extras,
            background,
            engine.ledger.take_copies(),
            forks,
        )
        if batch.copies and engine.somebody_waits:
            # budgets counted a copy for the last owner too, who keeps the page: there is room to ask about
            self._work = None
        engine.step += 1
        if self._work is not None:
            self._steps_left -= 1
            if engine.limits.lanes == 1:  # with more, the others must be asked first: see fast_forward
                self.lengthen(batch)
        self.flights.append((batch, engine.now_ns))
        return batch

    def _steps_ahead(self, batch: Batch, steps: int) -> int:
        """How many equal steps the launch may run: until a cap, a finish, KV memory ends or comes back."""
        engine = self._engine
        if batch.forks:  # their first tokens come at its end
            return 1
        for r in batch.requests:
            left = r.max_new_tokens - r.generated - r.expected + 1
            if left == r.max_new_tokens:  # its first token: a router may send it on
                return 1
            if left < steps:
                steps = left
        if steps > 1 and engine.ledger.windows and engine.somebody_waits:
            steps = min(steps, engine.ledger.steps_to_slide(batch.requests))
        if steps > 1 and engine.reuse is not None and engine.waiting:
            steps = min(steps, engine.reuse.steps_to_publish(batch.requests, steps))
        if steps > 1:
            known = engine.horizon(batch, steps)
            if type(known) is not int or not 1 <= known <= steps:
                raise PluginError(
                    f"the executor's horizon() answered {known!r}",
                    where=f"launch {batch.launch}, lane {batch.lane}",
                    why=f"a whole number from 1 to {steps} is expected",
                    do="mend the executor",
                )
            steps = known
        if steps > 1:
            steps = 1 + engine.ledger.promise(batch.launch, batch.requests, steps - 1)
        return steps

    def _book_special(self, item: Tokens, r: Request) -> tuple[int, bool]:
        """Book an item with layers, drafts or rewrites. Returns its start position and whether it samples."""
        n, layers = item.n, self._engine.model.layers
        start, sample = position(item, r, layers)
        if item.advance != "append":
            return start, sample
        if not r.layer_cursor:  # later layers of a chunk were booked by its first ones
            self._engine.ledger.reserve(r, n + item.draft)
            r.slack -= n + item.draft
            r.flying += n + item.draft
            r.pending = max(0, r.pending - n)
        if item.layers:
            r.layer_chunk = n
            r.layer_cursor = item.layers[1] % layers
        if sample:
            r.expected += 1
            if not item.draft:  # with drafts the next token depends on what is accepted
                r.pending = 1 if r.generated + r.expected < r.max_new_tokens else 0
        return start, sample

    # -------------------------------------------------------------- committing

    def land(self, event: LaunchDone) -> tuple[Batch, int, int, list[int], Done]:
        """Commit the oldest launch, or its first steps if it goes on.

        Returns the batch, the number of the first step committed, when that step began, the output tokens
        each request got, and who finished.

        Raises:
            PluginError: the outcomes are not what the batch asked for.
        """
        engine = self._engine
        batch, launched_ns = self.flights[0]
        ends = event.ends_ns
        steps = len(ends)
        if len(event.outcomes) != len(batch.requests) or not 1 <= steps <= batch.steps - event.more:
            raise PluginError(
                f"launch {batch.launch} came back with {len(event.outcomes)} outcomes and {steps} steps",
                why=f"it had {len(batch.requests)} requests and at most {batch.steps} steps",
                do="mend the executor",
            )
        self._unnumber(batch, steps + event.more)
        if self._work is not None:  # cut short only to see how far it is: the hold goes on
            self._steps_left += batch.steps - steps - event.more
        engine.ledger.settle(batch.launch)
        emitted, done = self._commit(batch, event)
        first = batch.first_step
        start_ns = max(launched_ns, self.last_end_ns)
        self.last_end_ns = ends[-1]
        ledger = engine.ledger
        if event.more:  # between two steps nothing is in flight, as when stepping
            still = [lease for lease in batch.leases if not lease.released]
            came_back = ledger.unfence(still)
        else:
            self.flights.popleft()
            came_back = ledger.landed(batch.leases)
        if ledger.windows:
            came_back |= self._slide(batch)
        if came_back and engine.somebody_waits:  # pages that may let somebody in: as at an event
            self._work = None
        if engine.reuse is not None:
            self._publish(batch)
        if event.more:
            self._go_on(batch, steps, done)
            for lease in still:
                lease.in_flight += 1
            ledger.landed(())  # a resize may want what it was promised and did not use
        return batch, first, start_ns, emitted, done

    def _slide(self, batch: Batch) -> bool:
        """Windows have moved on. True if pages came back."""
        came_back = False
        for r, lease in zip(batch.requests, batch.leases, strict=True):
            if r.lease is lease and r.phase is not Phase.FINISHED:
                came_back |= self._engine.ledger.slide(r)
        return came_back

    def _publish(self, batch: Batch) -> None:
        """Pages have become full. Somebody who waits may find them: ask again, as at an event."""
        engine = self._engine
        assert engine.reuse is not None
        new = False
        for r, lease in zip(batch.requests, batch.leases, strict=True):
            if r.lease is lease and r.phase is not Phase.FINISHED:
                new |= engine.reuse.publish(r)
        if new and engine.waiting:
            self._work = None

    def _go_on(self, batch: Batch, steps: int, done: Done) -> None:
        """Book the one step of a held launch that is still running."""
        if done:
            raise PluginError(
                f"request {done[0][0].id} finished in the middle of launch {batch.launch}",
                why="horizon() said that nobody would",
                do="mend the executor's horizon()",
            )
        reserve, finished = self._engine.ledger.reserve, Phase.FINISHED
        for i, r in enumerate(batch.requests):
            batch.starts[i] += steps
            if r.lease is not batch.leases[i] or r.phase is finished:
                continue
            if not r.slack:
                reserve(r, 1)  # it was promised when the launch began
            r.launches += 1
            r.slack -= 1
            r.flying += 1
            r.expected += 1
            r.pending = 1 if r.generated + r.expected < r.max_new_tokens else 0
        batch.first_step += steps
        batch.steps = 1
        self.flights[0] = (batch, self.last_end_ns)

    def _commit(self, batch: Batch, event: LaunchDone) -> tuple[list[int], Done]:
        ends = event.ends_ns
        steps = len(ends)
        reserve = self._engine.ledger.reserve
        extras, finished, more = batch.extras, Phase.FINISHED, steps - 1
        emitted = [steps if sampled else 0 for sampled in batch.samples]
        done: Done = []
        rows = zip(batch.requests, batch.leases, event.outcomes, batch.tokens, emitted, strict=True)
        for i, (r, lease, out, n, count) in enumerate(rows):
            if r.lease is not lease or r.phase is finished:
                emitted[i] = 0  # preempted or ended meanwhile: its outcome is dropped
                continue
            r.launches -= 1
            if i in extras:
                emitted[i] = self._commit_special(extras[i], r, out, ends[-1], batch, i)
            else:
                if len(out.tokens) != count:
                    self._bad_outcome(r, batch, out, f"{steps}, one per step" if count else _NO_OUTPUT)
                r.flying -= n
                r.computed += n
                if not count:
                    continue
                r.expected -= 1
                r.generated += count
                r.output += out.tokens
                r.token_times += ends
                if more:
                    if more > r.slack:
                        reserve(r, more)
                    r.slack -= more
                    r.computed += more
            if out.finish is not None or r.generated >= r.max_new_tokens:
                done.append((r, out.finish or "length"))
        return emitted, done

    def _commit_special(self, item: Tokens, r: Request, out: Outcome, end: int, batch: Batch, i: int) -> int:
        """Commit an item with layers, drafts or rewrites; returns the output tokens it brought."""
        count = len(out.tokens)
        if item.advance != "append":
            if count:
                self._bad_outcome(r, batch, out, "none: rewritten tokens bring no output")
            return 0
        final = not item.layers or item.layers[1] == self._engine.model.layers
        sampled = batch.samples[i]
        if not 0 <= out.accepted <= item.draft or count != (1 + out.accepted if sampled else 0):
            self._bad_outcome(
                r,
                batch,
                out,
                f"{1 + out.accepted if sampled else 0} with {out.accepted} of {item.draft} drafts",
            )
        if not final:
            return 0
        r.computed += item.n + out.accepted
        r.flying -= item.n + item.draft
        r.slack += item.draft - out.accepted
        r.drafted += item.draft
        r.accepted += out.accepted
        if not sampled:
            return 0
        r.expected -= 1
        new = out.tokens[: r.max_new_tokens - r.generated]
        r.generated += len(new)
        r.output += new
        r.token_times += [end] * len(new)
        if item.draft:
            r.pending = max(0, r.prompt_tokens + r.generated + r.expected - r.computed - r.flying)
        return len(new)

    def _bad_outcome(self, r: Request, batch: Batch, out: Outcome, wanted: str) -> None:
        raise PluginError(
            f"the executor reported {len(out.tokens)} output tokens for request {r.id}",
            where=f"launch {batch.launch}, lane {batch.lane}",
            why=f"expected {wanted}",
            do="mend the executor's launch()",
        )

"""Links: transfers at the same time on the same link share its bandwidth.

Each gets an equal part of every link on its path, and is as fast as the smallest of them lets it be
(processor sharing). The model is exact: whenever a transfer joins or leaves a link, what is left of the
others is counted on at their new speed. Alone, a transfer takes its latency and its work and nothing else;
the latency passes first and uses no bandwidth. Times are integer nanoseconds, rounded up at the end only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

Link = Hashable
"""Whatever names one direction of one cable; all links of one path are equally fast."""


class _Flow:
    """One transfer."""

    __slots__ = ("done", "join_ns", "joined", "left", "path")

    def __init__(self, path: Sequence[Link], join_ns: int, work_ns: int, done: Callable[[int], None]) -> None:
        self.path = tuple(path)
        self.join_ns = join_ns
        """When its latency is over."""
        self.joined = False
        self.left = Fraction(work_ns)
        """Nanoseconds it would still need alone."""
        self.done = done


class Links:
    """All transfers in flight. Whoever uses it calls ``due`` at every ``next_ns``."""

    def __init__(self) -> None:
        self._flows: dict[int, _Flow] = {}
        self._present: Counter[Link] = Counter()
        """Transfers on each link, those whose latency has not passed included."""
        self._users: Counter[Link] = Counter()
        """Transfers that use its bandwidth."""
        self._now = 0
        self._started = 0

    def __len__(self) -> int:
        return len(self._flows)

    def start(
        self, now: int, path: Sequence[Link], latency_ns: int, work_ns: int, done: Callable[[int], None]
    ) -> int:
        """A transfer begins; ``done`` is called with the time of its end. Returns its number.

        Args:
            now: the time; never before that of an earlier call.
            path: links it uses.
            latency_ns: time before its first byte.
            work_ns: time of its bytes on a link of its own.
            done: what to do then.
        """
        self._to(now)
        self._started += 1
        self._flows[self._started] = _Flow(path, now + latency_ns, work_ns, done)
        self._present.update(path)
        return self._started

    def cancel(self, number: int, now: int) -> None:
        """A transfer is given up; unknown numbers are those of transfers that have ended."""
        if number in self._flows:
            self._to(now)
            self._leave(number)

    def next_ns(self) -> int | None:
        """When a transfer ends or joins others next."""
        return min(map(self._next, self._flows.values()), default=None)

    def due(self, now: int) -> list[Callable[[int], None]]:
        """What to call now: the transfers that have ended, in the order they were started."""
        self._to(now)
        over = [number for number, flow in self._flows.items() if flow.joined and flow.left <= 0]
        return [self._leave(number).done for number in over]

    def predict(self, now: int, path: Sequence[Link], latency_ns: int, work_ns: int) -> int:
        """When a transfer that began now would end, if no other came later."""
        copy = Links()
        copy._now, copy._started = self._now, self._started
        copy._present, copy._users = self._present.copy(), self._users.copy()
        for number, flow in self._flows.items():
            copy._flows[number] = other = _Flow(flow.path, flow.join_ns, 0, flow.done)
            other.joined, other.left = flow.joined, flow.left
        ended: list[int] = []
        copy.start(now, path, latency_ns, work_ns, ended.append)
        while not ended:
            at = copy.next_ns()
            assert at is not None
            for done in copy.due(at):
                if done == ended.append:
                    done(at)
        return ended[0]

    def _next(self, flow: _Flow) -> int:
        if flow.joined:
            return self._now + max(0, _ceil(flow.left * self._sharing(flow)))
        alone = all(self._present[link] == 1 for link in flow.path)
        return flow.join_ns + (_ceil(flow.left) if alone else 0)

    def _sharing(self, flow: _Flow) -> int:
        return max(self._users[link] for link in flow.path)

    def _to(self, now: int) -> None:
        """Count on to a time. No transfer has joined or left a link with others since the last call."""
        since, self._now = self._now, now
        joins = []
        for flow in self._flows.values():
            if flow.joined:
                flow.left -= Fraction(now - since, self._sharing(flow))
            elif flow.join_ns <= now:
                joins.append(flow)
        for flow in joins:
            flow.joined = True
            self._users.update(flow.path)
            flow.left -= now - flow.join_ns  # not 0 only where it was alone

    def _leave(self, number: int) -> _Flow:
        flow = self._flows.pop(number)
        self._present.subtract(flow.path)
        if flow.joined:
            self._users.subtract(flow.path)
        return flow


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)

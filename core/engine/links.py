"""Links: transfers at the same time on the same links share their bandwidth, max-min fair.

Every link is as fast as every other on the paths that meet at it, so that speeds are parts of one link's.
They come by progressive filling (Bertsekas and Gallager, *Data Networks*, 1992, section 6.5.2): all rise
together until a link is full, which fixes those that use it; the others rise on. Of one link each gets an
equal part; what a transfer cannot use because another link holds it back, the others share. The model is
exact: whenever a transfer joins or leaves, what is left of those that are connected with it is counted on at
their new speed. Alone, a transfer takes its latency and its work and nothing else; the latency passes first
and uses no bandwidth. Times are integer nanoseconds, rounded up at the end only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction

Link = Hashable
"""Whatever names one direction of one cable; all links of one path are equally fast."""
Exact = Fraction | int


def fair_rates(paths: Sequence[Sequence[Link]]) -> list[Fraction]:
    """Max-min fair speeds of transfers over links of speed 1: none can be raised without lowering one that is
    no faster.

    Args:
        paths: of each transfer, the links it uses, at least one and each once.
    """
    users: dict[Link, list[int]] = {}
    for i, path in enumerate(paths):
        for link in path:
            users.setdefault(link, []).append(i)
    rates: dict[int, Fraction] = {}
    rising = {link: len(through) for link, through in users.items()}
    room = dict.fromkeys(users, Fraction(1))
    while rising:
        full = min(rising, key=lambda link: room[link] / rising[link])
        rate = room[full] / rising.pop(full)
        for i in users[full]:
            if i in rates:
                continue
            rates[i] = rate
            for link in paths[i]:
                if link in rising:
                    room[link] -= rate
                    rising[link] -= 1
                    if not rising[link]:
                        del rising[link]
    return [rates[i] for i in range(len(paths))]


class _Flow:
    """One transfer."""

    __slots__ = ("done", "left", "next_ns", "path", "rate", "since_ns")

    def __init__(self, path: Sequence[Link], since_ns: int, left: Exact, done: Callable[[int], None]) -> None:
        self.path = tuple(path)
        self.since_ns = since_ns
        """Until when ``left`` is counted; at first, when its latency is over."""
        self.left = left
        """Nanoseconds it would still need alone."""
        self.rate: Exact = 0
        """Its part of a link from ``since_ns`` on; 0: it must be seen to when its latency is over."""
        self.next_ns = since_ns
        """When it ends, or joins the others."""
        self.done = done


class Links:
    """All transfers in flight. Whoever uses it calls ``due`` at every ``next_ns``."""

    def __init__(self) -> None:
        self._flows: dict[int, _Flow] = {}
        self._on: dict[Link, list[_Flow]] = {}
        """Transfers on each link, those whose latency has not passed included."""
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
        self._add(_Flow(path, now + latency_ns, work_ns, done))
        self._share(path, now)
        return self._started

    def cancel(self, number: int, now: int) -> None:
        """A transfer is given up; unknown numbers are those of transfers that have ended."""
        if number in self._flows:
            self._share(self._remove(number).path, now)

    def next_ns(self) -> int | None:
        """When a transfer ends or joins others next."""
        return min((flow.next_ns for flow in self._flows.values()), default=None)

    def due(self, now: int) -> list[Callable[[int], None]]:
        """What to call now: the transfers that have ended, in the order they were started."""
        joining = [flow for flow in self._flows.values() if not flow.rate and flow.next_ns <= now]
        self._share([link for flow in joining for link in flow.path], now)
        over = [number for number, flow in self._flows.items() if flow.rate and flow.next_ns <= now]
        ended = [self._remove(number) for number in over]
        self._share([link for flow in ended for link in flow.path], now)
        return [flow.done for flow in ended]

    def predict(self, now: int, path: Sequence[Link], latency_ns: int, work_ns: int) -> int:
        """When a transfer that began now would end, if no other came later."""
        copy = Links()
        for flow in self._connected(path):
            copy._add(other := _Flow(flow.path, flow.since_ns, flow.left, lambda at: None))
            other.rate = flow.rate
        ended: list[int] = []
        copy.start(now, path, latency_ns, work_ns, ended.append)
        while not ended:
            at = copy.next_ns()
            assert at is not None
            for done in copy.due(at):
                done(at)
        return ended[0]

    def _add(self, flow: _Flow) -> None:
        self._started += 1
        self._flows[self._started] = flow
        for link in flow.path:
            self._on.setdefault(link, []).append(flow)

    def _remove(self, number: int) -> _Flow:
        flow = self._flows.pop(number)
        for link in flow.path:
            self._on[link].remove(flow)
        return flow

    def _connected(self, links: Iterable[Link]) -> list[_Flow]:
        """Transfers on these links, on links of theirs, and so on: no other depends on them."""
        found: dict[_Flow, None] = {}
        todo, seen = list(links), set(links)
        while todo:
            for flow in self._on.get(todo.pop(), ()):
                found[flow] = None
                todo += [link for link in flow.path if link not in seen]
                seen.update(flow.path)
        return list(found)

    def _share(self, links: Iterable[Link], now: int) -> None:
        """Transfers came or went on these links: count on what is left of all concerned, at a new speed."""
        concerned = self._connected(links)
        for flow in concerned:
            if flow.since_ns < now:
                flow.left -= flow.rate * (now - flow.since_ns)
                flow.since_ns = now
        if len(concerned) < 2:
            for flow in concerned:  # nothing can happen to it before its end: nobody need look at it
                flow.rate, flow.next_ns = 1, flow.since_ns + max(0, -(-flow.left // 1))
            return
        joined = [flow for flow in concerned if flow.since_ns <= now]
        for flow in concerned:
            flow.rate, flow.next_ns = 0, flow.since_ns
        for flow, flow.rate in zip(joined, fair_rates([flow.path for flow in joined]), strict=True):
            flow.next_ns = now + max(0, -(-flow.left // flow.rate))  # rounded up

"""What both drivers share: feeding arrivals, hiding truths, sending commands on, ending a run cleanly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from servelab.core.engine.engine import Engine
from servelab.core.errors import PluginError, ServeLabError, WorkloadError
from servelab.core.events import Batch, Command, Emit
from servelab.core.families.cost import CostModel
from servelab.core.families.executor import Executor
from servelab.core.families.workload import Workload
from servelab.core.records import Record, RequestFinished
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth


class Driver:
    """Owns time and the outside of one or many engines. Use ``VirtualDriver`` or ``WallDriver``.

    Args:
        engines: instances, in order of their index.
        executors: one per engine.
        costs: one per engine; prices launches of simulated executors, and all on the virtual clock.
        workload: the traffic.
        truths: filled with the true outcome of each live request; executors and oracles read it.
        emit: takes every record.
        dispatch: engine index for an arriving request; default: the first.
    """

    def __init__(
        self,
        *,
        engines: Sequence[Engine],
        executors: Sequence[Executor],
        costs: Sequence[CostModel],
        workload: Workload,
        truths: dict[str, Truth],
        emit: Callable[[Record], None],
        dispatch: Callable[[RequestSpec], int] | None = None,
    ) -> None:
        if not len(engines) == len(executors) == len(costs) or not engines:
            raise ValueError("one executor and one cost model per engine, and at least one engine")
        self.engines = list(engines)
        self.executors = list(executors)
        self.costs = list(costs)
        self.workload = workload
        self.truths = truths
        self.now_ns = 0
        self._emit = emit
        self._dispatch = dispatch or (lambda spec: 0)
        self._home: dict[str, int] = {}
        self._arrivals: Iterator[Arrival | Cancel] = iter(())
        self._last_arrival_ns = 0

    def run(self) -> None:
        """Serve the workload to its end.

        Raises:
            ServeLabError: whatever stopped the run. Every live request has had its terminal record first.
        """
        self._arrivals = iter(self.workload.arrivals())
        try:
            self._loop()
            for engine in self.engines:  # contexts still kept between turns are let go
                self._do(engine.index, engine.stop(self.now_ns, "the run is over"), self.now_ns)
                if engine.full_checks:
                    engine.check_integrity()
        except BaseException as exc:
            self._abandon(exc)
            raise

    def _loop(self) -> None:
        raise NotImplementedError  # abstract

    def _abandon(self, exc: BaseException) -> None:
        """Give every live request its terminal record; the error that ended the run stays the one raised."""
        reason = "interrupted" if isinstance(exc, KeyboardInterrupt) else _first_line(exc)
        try:
            for engine in self.engines:
                for command in engine.stop(self.now_ns, reason):
                    if isinstance(command, Emit):
                        self._emit(command.record)
        except Exception as second:
            exc.add_note(f"while ending the live requests: {type(second).__name__}: {second}")

    # -------------------------------------------------------------- arrivals

    def _next_arrival(self) -> Arrival | Cancel | None:
        item = next(self._arrivals, None)
        if item is not None:
            if item.time_ns < self._last_arrival_ns:
                raise WorkloadError(
                    f"the workload went back in time, to {item.time_ns} ns",
                    where=f"after an item at {self._last_arrival_ns} ns",
                    why="arrivals() must be in time order",
                    do="sort the trace, or mend the generator",
                )
            self._last_arrival_ns = item.time_ns
        return item

    def _home_of(self, item: Arrival | Cancel) -> int:
        """Engine of an item; remembers homes so that cancellations find them, and books truths."""
        if isinstance(item, Cancel):
            return self._home.get(item.request_id, 0)
        spec = item.spec
        if item.truth is not None:
            self.truths[spec.id] = item.truth
        index = self._dispatch(spec)
        if not 0 <= index < len(self.engines):
            raise PluginError(
                f"dispatch sent request {spec.id} to engine {index}",
                why=f"there are {len(self.engines)} engines",
            )
        if len(self.engines) > 1:
            self._home[spec.id] = index
        return index

    def _finished(self, record: RequestFinished) -> list[Arrival | Cancel]:
        """Forget a request and ask the workload what follows from its end."""
        self.truths.pop(record.request, None)
        self._home.pop(record.request, None)
        follow = list(self.workload.react(record))
        for item in follow:
            if item.time_ns < record.t_ns:
                raise WorkloadError(
                    f"the workload reacted to request {record.request} with an item at {item.time_ns} ns",
                    why=f"the request ended at {record.t_ns} ns",
                    do="react with items at or after the record's time",
                )
        return follow

    def _prices(self, index: int, batch: Batch, steps: int) -> Sequence[int]:
        prices = self.costs[index].price(batch, steps)
        if len(prices) != steps or min(prices) < 1:
            raise PluginError(
                f"cost model of engine {index} priced {steps} steps as {list(prices)[:5]}",
                where=f"launch {batch.launch}, step {batch.first_step}",
                why="it must give one price of at least 1 ns per step",
                do="mend the cost model's price()",
            )
        return prices

    @property
    def _idle(self) -> bool:
        """No request is live and nothing is in flight: timers that are left have nobody to wake."""
        return not any(engine.requests or engine.in_flight for engine in self.engines)

    def _do(self, index: int, commands: list[Command], now_ns: int) -> None:
        raise NotImplementedError  # abstract


def _first_line(exc: BaseException) -> str:
    text = exc.what if isinstance(exc, ServeLabError) else f"{type(exc).__name__}: {exc}"
    return text.splitlines()[0] if text else type(exc).__name__

"""The bus: what it refuses, whom it calls in which order, and what happens when an observer raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.metrics.logs import arrived, ended, started, three_requests

from servelab.core.api import hookimpl
from servelab.core.bus import Bus
from servelab.core.errors import ConfigError, PluginCallError, PluginError
from servelab.core.hookspecs import EVENT_OF_RECORD
from servelab.core.records import RECORDS, Record, RequestArrived, RunFinished, StepDone, TokensEmitted


class Watcher:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.calls.append(f"{self.name} any {record.ev}")

    @hookimpl
    def servelab_on_request_arrived(self, record: RequestArrived) -> None:
        self.calls.append(f"{self.name} arrived {record.request}")


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.seen: list[str] = []

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.seen.append(record.ev)
        raise self.error

    @hookimpl
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        self.seen.append("typed")


def test_every_record_type_has_a_hook() -> None:
    assert set(EVENT_OF_RECORD) == set(RECORDS)


def test_order_is_the_configured_one_and_typed_hooks_come_second() -> None:
    calls: list[str] = []
    bus = Bus([Watcher("x", calls), Watcher("y", calls)])
    bus.emit(arrived(0, "a"))
    bus.emit(started())
    assert calls == [
        "x any arrived",
        "y any arrived",
        "x arrived a",
        "y arrived a",
        "x any run_started",
        "y any run_started",
    ]


def test_nobody_watches() -> None:
    for record in three_requests():
        Bus().emit(record)


def test_hooks_may_leave_the_record_out_or_go_by_another_name() -> None:
    calls: list[str] = []

    class Odd:
        @hookimpl
        def servelab_after_step(self) -> None:
            calls.append("step")

        @hookimpl(specname="servelab_on_run_finished")
        def bye(self, record: RunFinished) -> None:
            calls.append(record.status)

    bus = Bus([Odd()])
    for record in three_requests():
        bus.emit(record)
    assert calls == ["step"] * sum(isinstance(r, StepDone) for r in three_requests()) + ["ok"]


class Reader:
    """Has the hook of tokens, and no other."""

    def __init__(self) -> None:
        self.seen: list[TokensEmitted] = []

    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        self.seen.append(record)


def test_only_the_hook_of_a_record_asks_for_it() -> None:
    """A log listens to every record, and does not ask for those that are made on request."""
    everything, reader = Bus([Watcher("x", [])]), Bus([Watcher("x", []), Reader()])
    for ev in RECORDS:
        assert everything.listens(ev)
        assert everything.asks(ev) == (ev == "arrived")  # Watcher's own hook
        assert reader.asks(ev) == (ev in ("arrived", "tokens"))
        assert not Bus().listens(ev)
        assert not Bus().asks(ev)
    only = Bus([Reader()])
    assert {ev for ev in RECORDS if only.listens(ev)} == {ev for ev in RECORDS if only.asks(ev)} == {"tokens"}


def test_tokens_reach_their_hook_and_everybody_who_watches_everything() -> None:
    calls: list[str] = []
    reader = Reader()
    record = TokensEmitted(t_ns=5, request="a", tokens=[3, 4])
    Bus([reader, Watcher("x", calls)]).emit(record)
    assert reader.seen == [record]
    assert calls == ["x any tokens"]


def unknown() -> object:
    class Unknown:
        @hookimpl
        def servelab_after_stepp(self, record: Record) -> None: ...

    return Unknown()


def wrong_argument() -> object:
    class Wrong:
        @hookimpl
        def servelab_on_record(self, rec: Record) -> None: ...

    return Wrong()


def unmarked() -> object:
    class Unmarked:
        def servelab_on_record(self, record: Record) -> None: ...

    return Unmarked()


def wrapping() -> object:
    class Wrapping:
        @hookimpl(tryfirst=True)
        def servelab_on_record(self, record: Record) -> None: ...

    return Wrapping()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (object, "is an object with no event hook at all"),
        (lambda: Watcher, "Watcher is a class passed instead of an instance"),
        (unknown, "did you mean 'servelab_after_step'"),
        (wrong_argument, "has a hook that does not fit"),
        (unmarked, "is not marked as a hook"),
        (wrapping, "with an option that observers cannot have"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PluginError, match=message) as error:
        Bus([make()])
    assert error.value.why and error.value.do


def test_the_same_observer_twice_is_refused() -> None:
    one = Watcher("x", [])
    with pytest.raises(PluginError, match="given twice"):
        Bus([one, one])


def test_an_observer_that_raises_is_named_and_ends_the_call() -> None:
    calls: list[str] = []
    cause = ValueError("no good")
    bus = Bus([Failing(cause), Watcher("later", calls)])
    with pytest.raises(PluginCallError) as error:
        bus.emit(arrived(3, "a"))
    assert error.value.__cause__ is cause
    assert "Failing" in error.value.what
    assert "record 'arrived' of request a at 3000000 ns" in error.value.where
    assert error.value.why == "ValueError: no good"
    assert calls == []


def test_the_advice_of_our_own_errors_survives() -> None:
    with pytest.raises(PluginCallError) as error:
        Bus([Failing(ConfigError("what", where="where", why="why", do="do this"))]).emit(started())
    assert (error.value.why, error.value.do) == ("what; where; why", "do this")


def test_the_end_of_the_run_reaches_everybody() -> None:
    calls: list[str] = []
    first, second = Failing(ValueError("first")), Failing(ValueError("second"))
    bus = Bus([first, second, Watcher("w", calls)])
    with pytest.raises(PluginCallError, match="first") as error:
        bus.emit(ended(1))
    assert first.seen == second.seen == ["run_finished", "typed"]
    assert calls == ["w any run_finished"]
    assert "second" in error.value.__notes__[0]

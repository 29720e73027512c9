"""The progress line: what it shows, when it is silent, and that it costs little."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.metrics.logs import MS, arrived, ended, finished, preempted, started, step, three_requests
from tests.observers.test_jsonl import context

from servelab.core.bus import Bus
from servelab.core.records import RECORDS, QualityBegan, QualityMeasured, Record
from servelab.plugins.observers import progress as module
from servelab.plugins.observers.progress import Progress, ProgressConfig, Silent, progress
from servelab.plugins.observers.report.observer import ReportConfig, ReportObserver


class Terminal(io.StringIO):
    """A terminal without a width."""

    def isatty(self) -> bool:
        return True

    @property
    def states(self) -> list[str]:
        """What the line said, each time it was drawn."""
        return [text.strip() for text in self.getvalue().split("\r") if text.strip()]


class Gone(Terminal):
    """A terminal that was closed after some writes."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr is a terminal, and every record is drawn."""
    screen = Terminal()
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=screen))  # pytest sets sys.stderr by itself
    monkeypatch.setattr(module._Line, "__init__", _eager(module._Line.__init__))
    return screen


def _eager(init: Any) -> Any:
    def without_interval(self: Any, **settings: Any) -> None:
        init(self, **{**settings, "mininterval": 0})

    return without_interval


def run(records: list[Record], **settings: Any) -> None:
    bus = Bus([progress(ProgressConfig(**settings), context(None))])
    for record in records:
        bus.emit(record)


def test_a_run_on_a_terminal(terminal: Terminal) -> None:
    records = three_requests()
    records[0] = started(workload={"requests": 3})
    run(records)
    first, *middle, last = terminal.states
    assert first.startswith("0/3 requests |")
    assert first.endswith("| 0:00 elapsed, 0 tok/s")
    assert any(
        state.startswith("0/3") and state.endswith(" 25 tok/s, 2 running, 0 waiting, KV 40 %")
        for state in middle
    )  # 3 tokens in 120 ms
    assert any(
        state.startswith("2/3") and "1 running, 0 waiting, KV 30 %, 1 pre" in state for state in middle
    )
    assert last.startswith("3/3 requests |####")
    assert last.endswith("#| 0:00 elapsed, 43 tok/s, 1 preemption")  # 9 tokens in 210 ms
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\n")
    assert max(map(len, terminal.states)) <= module.COLUMNS


def test_figures_that_the_run_does_not_state_are_left_out(terminal: Terminal) -> None:
    first = started()
    first.info = {}
    run([first, arrived(0, "a"), step(0, [500], {"a": (10, 1)}), finished(500, "a", 1), ended(500)])
    assert terminal.states[0].startswith("0 requests |")
    assert terminal.states[-1].startswith("1 requests |")
    assert any(state.endswith("2 tok/s, 1 running, 0 waiting") for state in terminal.states)
    assert "KV" not in terminal.getvalue()


def test_each_pool_has_its_share(terminal: Terminal) -> None:
    pools = [{"pages": 10}, {"pages": 0}, {"pages": 200}]
    run([started(kv={"pools": pools}), step(0, [1], {"a": (10, 1)}, free=(9, 0, 50))])
    assert terminal.states[-1].endswith("KV 10 % and 75 %")


def test_the_rate_is_that_of_the_last_seconds_and_at_the_end_of_the_run(terminal: Terminal) -> None:
    busy = [step(i * 1000, [i * 1000 + 1000], {"a": (1, 100)}) for i in range(10)]
    idle = [step(i * 1000, [i * 1000 + 1000], {"a": (1, 10)}) for i in range(10, 20)]
    run([started(), *busy, *idle, ended(40_000)])
    rates = [state.partition("elapsed, ")[2].partition(",")[0] for state in terminal.states]
    assert rates[1:11] == ["100 tok/s"] * 10
    assert rates[11:16] == ["82 tok/s", "64 tok/s", "46 tok/s", "28 tok/s", "10 tok/s"]
    assert rates[16:21] == ["10 tok/s"] * 5
    assert terminal.states[-1].endswith("0:40 elapsed, 28 tok/s")  # 1,100 tokens in 40 s


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_ends_early_ends_its_line(terminal: Terminal, status: str) -> None:
    run([started(workload={"requests": 9}), preempted(1, "a", 1), preempted(2, "a", 1), ended(7, status)])
    assert terminal.states[-1].startswith("0/9")
    assert terminal.states[-1].endswith(f"2 preemptions, {status}")
    assert terminal.getvalue().endswith("\n")


def test_a_run_that_never_started_shows_nothing(terminal: Terminal) -> None:
    run([step(0, [1], {"a": (1, 1)}), finished(1, "a", 1), ended(1, "failed")])
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("order", [1, -1])
def test_the_report_starts_on_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    observers = [
        progress(ProgressConfig(), context(None)),
        ReportObserver(ReportConfig(), context(None)),
    ]
    bus = Bus(observers[::order])
    for record in three_requests():
        bus.emit(record)
    assert "1 preemption\nServeLab run\n" in screen.getvalue()


# --- silence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "tty"), [("auto", False), ("off", False), ("off", True)])
def test_silent(mode: Any, tty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if tty else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run(three_requests(), mode=mode)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("level", "kind"), [(0, Progress), (logging.INFO, Progress), (logging.WARNING, Silent)]
)
def test_q_silences_what_was_not_switched_on(level: int, kind: type, terminal: Terminal) -> None:
    logger = logging.getLogger("servelab")
    before = logger.level
    logger.setLevel(level)
    try:
        assert isinstance(progress(ProgressConfig(), context(None)), kind)
        assert isinstance(progress(ProgressConfig(mode="on"), context(None)), Progress)
    finally:
        logger.setLevel(before)


def test_silence_looks_at_no_record_but_the_last() -> None:
    bus = Bus([progress(ProgressConfig(mode="off"), context(None))])
    assert [ev for ev in RECORDS if bus.listens(ev)] == ["run_finished"]


def test_on_draws_also_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run(three_requests(), mode="on")
    assert "3 requests" in stream.getvalue()


def test_a_stderr_that_is_closed_or_absent_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Terminal()
    closed.isatty = io.StringIO.isatty.__get__(closed)  # type: ignore[method-assign]
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert isinstance(progress(ProgressConfig(), context(None)), Silent)


# --- trouble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "gone"), ValueError("closed file")])
def test_a_terminal_that_goes_away_is_no_fault(
    error: Exception, after: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Gone(error, after)
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=gone))
    run(three_requests())
    assert gone.left < 0
    assert len(gone.states) <= after


def test_no_thread_stays_behind(terminal: Terminal) -> None:
    before = threading.active_count()
    run(three_requests()[:-1])
    assert threading.active_count() == before


def test_it_is_drawn_a_few_times_a_second_however_many_steps_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the virtual clock thousands of steps pass in a second of real time."""
    now = [1000.0]
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    observer = progress(ProgressConfig(per_second=4), context(None))
    assert isinstance(observer, Progress)
    observer.servelab_on_record(started())
    observer.servelab_on_record(step(0, [0], {"a": (1, 1)}))
    observer._bar._time = lambda: now[0]
    observer._bar.last_print_t = observer._bar.start_t = now[0]
    for i in range(10_000):
        now[0] += 1e-3
        observer.servelab_on_record(step(i, [i + 1], {"a": (1, 1)}))
    assert 30 <= len(stream.states) <= 42
    observer.servelab_on_record(ended(10_000))


def test_quality_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the serving ends where quality begins; a task that serves nothing has none."""
    figures = {
        "kl_mean": 0.01234,
        "kl_p99": 1.0,
        "kl_max": 2.0,
        "perplexity": 9.0,
        "reference_perplexity": 8.0,
    }
    sizes = {"linear_bytes": 1, "reference_linear_bytes": 2, "windows": 1}
    for serves in (True, False):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        observer = progress(ProgressConfig(), context(None))
        assert isinstance(observer, Progress)
        observer.servelab_on_record(started())
        if serves:
            observer.servelab_on_record(step(0, [1], {"a": (1, 1)}))
        observer.servelab_on_record(QualityBegan(t_ns=1, labels=["w4a8"], total=400))
        before = "".join(stream.states)
        assert ("requests" in before) == serves and "quality" not in before
        measured = QualityMeasured(
            t_ns=1, label="w4a8", tokens=100, total=400, top1_agreement=0.931, **figures, **sizes
        )
        observer.servelab_on_record(measured)
        observer.servelab_on_record(ended(1))
        last = "".join(stream.states)
        assert "quality 100/400 tokens |" in last and "| w4a8: KL 0.0123, top-1 93.1 %" in last


def test_a_real_terminal() -> None:
    """A pseudo-terminal with a width: lines fit into it, whatever they have to say."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    program = (
        "from tests.observers.test_progress import *\n"
        "records = three_requests()\n"
        "records[0] = started(workload={'requests': 3})\n"
        "run(records)"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 50))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=False,
        )
    finally:
        os.close(theirs)
    with os.fdopen(ours, "rb", closefd=True) as screen:
        shown = os.read(screen.fileno(), 65536).decode()
    assert done.returncode == 0, shown
    assert done.stdout == b""
    states = [state for state in shown.replace("\n", "\r").split("\r") if state]
    assert states[-1].startswith("3/3 requests |")
    assert 40 < max(map(len, states)) <= 50


# --- small things ------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_durations_read_back(seconds: int) -> None:
    parts = [int(part) for part in module._duration(seconds * 1000 * MS + 999 * MS).split(":")]
    assert sum(part * 60**i for i, part in enumerate(reversed(parts))) == seconds
    assert len(parts) == (3 if seconds >= 3600 else 2)
    assert all(part < 60 for part in parts[1:])


@pytest.mark.parametrize("settings", [{"mode": "always"}, {"per_second": 0}, {"per_second": 61}, {"x": 1}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProgressConfig(**settings)

"""Progress: one live line on the terminal while a run goes on (baseline).

``16/64 requests |####      | 0:21 elapsed, 412 tok/s, 9 running, 2 waiting, KV 31 %, 1 preemption``

Where quality is measured after the serving, a second line follows:

``quality 3,069/8,184 tokens |####      | w4a8: KL 0.0123, top-1 93.1 %``

All figures are the run's own, read from its records: elapsed time and rate are of the run's clock, so on the
virtual clock they are simulated seconds. The line goes to stderr, which leaves stdout to the report, and is
redrawn at most ``per_second`` times a second of real time (tqdm keeps that clock). It is completed and ended
by the last record of the run, whatever ended it, and before any observer's own hook for that record, so the
report starts on a line of its own. A terminal that goes away does not end the run.

Where stderr is no terminal, or ``-q`` is given, there is no line, and no record is looked at: nothing costs
anything.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from contextlib import suppress
from typing import Any, Literal, TextIO, cast

from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from servelab.core.api import Context, hookimpl
from servelab.core.records import QualityBegan, QualityMeasured, Record, RunFinished, RunStarted, StepDone

NS = 1_000_000_000
"""Nanoseconds in a second."""

RATE_WINDOW_NS = 5 * NS
"""The rate is that of the last so many nanoseconds of the run's clock."""

COLUMNS = 100
"""Width of the line where nothing states that of the terminal."""

LINE = "{n_fmt}{postfix.total} requests |{bar}| {postfix}"
QUALITY_LINE = "quality {n_fmt}/{total_fmt} tokens |{bar}| {postfix}"


class ProgressConfig(BaseModel):
    """Settings of the ``progress`` observer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="auto: where stderr is a terminal and -q is not given; on: also elsewhere; off: nowhere.",
    )
    per_second: float = Field(
        default=5.0, gt=0, le=60, description="Redraws per second of real time, at most. Ours."
    )


def progress(config: ProgressConfig, ctx: Context) -> Silent | Progress:
    """The observer these settings and this stderr ask for."""
    quiet = logging.getLogger("servelab").level > logging.INFO  # as -q sets it
    if config.mode == "on" or (config.mode == "auto" and not quiet and _terminal(sys.stderr)):
        return Progress(config, sys.stderr)
    return Silent()


class Silent:
    """Shows nothing. It has the one hook that is called once a run, as an observer needs one."""

    @hookimpl
    def servelab_on_run_finished(self) -> None:
        """Nothing."""


class Progress:
    """Counts on every record; draws when it is time to.

    State: counts since the run started, and a sample (time, output tokens) per redraw of the last seconds.
    """

    def __init__(self, config: ProgressConfig, stream: TextIO) -> None:
        self._interval_s, self._screen = 1 / config.per_second, _Screen(stream)
        self._bar: Any = None
        self._quality: Any = None
        self._started: RunStarted | None = None
        self._figures = _Figures()

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        # one hook for all, as this one is called before any observer's hook for the end of the run
        if self._started is not None:  # not before: a task may serve nothing
            if not isinstance(record, QualityBegan):
                self._open(self._started)
            self._started = None
        if isinstance(record, StepDone):
            figures = self._figures
            figures.step = record
            figures.tokens += sum(record.emitted)
            if self._bar is not None:
                self._bar.update(0)
        elif record.ev == "finished":
            if self._bar is not None:
                self._bar.update(1)
        elif record.ev == "preempted":
            self._figures.preemptions += 1
        elif isinstance(record, RunStarted):
            self._started = record
        elif isinstance(record, QualityBegan):
            self._close(RunFinished(t_ns=record.t_ns, status="ok"))  # of the serving
        elif isinstance(record, QualityMeasured):
            self._compared(record)
        elif isinstance(record, RunFinished):
            self._close(record)

    def _open(self, record: RunStarted) -> None:
        total = (record.info.get("workload") or {}).get("requests")
        pools = (record.info.get("kv") or {}).get("pools") or ()
        self._figures = _Figures(
            start_ns=record.t_ns,
            total=total if isinstance(total, int) else None,
            pages=tuple(pool.get("pages") or 0 for pool in pools),
        )
        self._bar = _Line(
            total=self._figures.requests,
            bar_format=LINE,
            postfix=cast("str", self._figures),  # made a text only when the line is drawn
            **self._style(),
        )

    def _style(self) -> dict[str, Any]:
        return {
            "file": self._screen,
            "mininterval": self._interval_s,
            "miniters": 0,
            "ascii": " #",
            **_width(self._screen),
        }

    def _compared(self, record: QualityMeasured) -> None:
        if self._quality is None:  # not before: models are loaded first, and say so
            self._quality = _Line(total=record.total, bar_format=QUALITY_LINE, **self._style())
        self._quality.postfix = _Compared(record)
        self._quality.update(record.tokens - self._quality.n)

    def _close(self, record: RunFinished) -> None:
        if self._bar is not None:
            self._figures.end = record
            self._bar.close()
        if self._quality is not None:
            self._quality.close()
        self._bar = self._quality = None


class _Screen:
    """A stream that takes what is written to it even when nobody is there any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # the terminal went away, or the stream was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class _Line(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0
    """No thread that watches for bars that stand still."""


class _Compared:
    """What the line on quality says. No text: tqdm would put a comma before that."""

    def __init__(self, record: QualityMeasured) -> None:
        self._record = record

    def __str__(self) -> str:
        one = self._record
        return f"{one.label}: KL {one.kl_mean:.4f}, top-1 {100 * one.top1_agreement:.1f} %"


class _Figures:
    """What the line says; text is made only when it is drawn."""

    def __init__(self, *, start_ns: int = 0, total: int | None = None, pages: tuple[int, ...] = ()) -> None:
        self.start_ns, self.requests, self.pages = start_ns, total, pages
        self.total = "" if total is None else f"/{total}"
        self.step: StepDone | None = None
        self.end: RunFinished | None = None
        self.tokens = self.preemptions = 0
        self.samples = deque([(start_ns, 0)])

    def __str__(self) -> str:
        step, end = self.step, self.end
        now_ns = step.t_ns if step else self.start_ns
        if end is not None:
            now_ns = max(now_ns, end.t_ns)
        parts = [f"{_duration(now_ns - self.start_ns)} elapsed", f"{self._rate(now_ns):,.0f} tok/s"]
        if step is not None and end is None:
            parts += [f"{step.running} running", f"{step.waiting} waiting", *self._used(step.free_pages)]
        if self.preemptions:
            parts.append(f"{self.preemptions} preemption{'s' if self.preemptions > 1 else ''}")
        if end is not None and end.status != "ok":
            parts.append(end.status)
        return ", ".join(parts)

    def _rate(self, now_ns: int) -> float:
        """Output tokens per second: of the last seconds, at the end of the whole run."""
        samples = self.samples
        if now_ns > samples[-1][0]:
            samples.append((now_ns, self.tokens))
        while len(samples) > 2 and samples[1][0] <= now_ns - RATE_WINDOW_NS:
            samples.popleft()
        since_ns, before = samples[0] if self.end is None else (self.start_ns, 0)
        return (self.tokens - before) * NS / (now_ns - since_ns) if now_ns > since_ns else 0.0

    def _used(self, free_pages: tuple[int, ...]) -> list[str]:
        """The share of pages in use, of each pool that has pages."""
        shares = [
            f"{100 * (pages - free) / pages:.0f} %"
            for pages, free in zip(self.pages, free_pages, strict=False)
            if pages
        ]
        return [f"KV {' and '.join(shares)}"] if shares else []


def _duration(ns: int) -> str:
    minutes, seconds = divmod(ns // NS, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _width(stream: _Screen) -> dict[str, Any]:
    """tqdm's settings for the width: that of the terminal as it changes, or ``COLUMNS`` if it states none."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": COLUMNS}


def _terminal(stream: TextIO | None) -> bool:
    """Whether it is there, open, and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False

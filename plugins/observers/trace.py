"""Trace: the run as ``trace.json`` in the Trace Event Format, for Perfetto and chrome://tracing (baseline).

Tracks:

- process ``run``: a slice for the serving and one for the measurement of quality;
- process ``engine N``: a thread per lane with its launches (arguments: first step, steps, requests, tokens,
  tokens of prompts); counters of waiting and running requests, free KV pages per pool, output tokens per
  second; asynchronous tracks of requests and of transfers between the tiers.

A request's track has one slice from its arrival to its end, and in it one per phase
(``core/metrics/phases.py``): queued, prefill, decode, preempted, recompute, swap out, swapped, swap in,
paused. A preemption is an instant in it, with mode, reason and lost tokens.

Times are microseconds of the run's clock, as the format wants, with the nanoseconds behind the point. The
file is a JSON array with one event per line, written as the run goes on. It is closed with the run, however
that ends; a run that was killed leaves it without its ``]``, which the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, PluginError, ServeLabError, hookimpl
from servelab.core.metrics.phases import Phases
from servelab.core.records import (
    ROUTER,
    QualityBegan,
    QualityMeasured,
    Record,
    RequestArrived,
    RequestFinished,
    RequestMigrated,
    RequestPreempted,
    RequestRouted,
    RunFinished,
    RunStarted,
    StepDone,
    TransferEnded,
    TransferStarted,
)
from servelab.core.run_folder import WRITABLE, check_unused, in_use, unwritable

TRACE_FILE = "trace.json"
RUN = 1
"""Process of the run itself; engine N is process N + 2, as 0 means the idle task to some viewers."""
FLUSH_LINES = 1000
FLUSH_NS = 1_000_000_000
"""The file is flushed after so many events, and when the records' own time has moved on by this much."""


class TraceConfig(BaseModel):
    """Settings of the ``trace`` observer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_requests: int = Field(
        default=2000,
        ge=0,
        description="Requests with a track of their own: the first so many, each about 1 kB; 0: none.",
    )


class TraceObserver:
    """Turns records into events as they come.

    State: where every live request is, and the open slices. Cost: a line per launch and three counters.
    """

    def __init__(self, config: TraceConfig, ctx: Context) -> None:
        if ctx.run_dir is None:
            raise ConfigError(
                "observer 'trace' has nowhere to write",
                why="this run has no folder",
                do="give the run a folder, or leave 'trace' out of 'observers'",
            )
        check_unused(ctx.run_dir, f"observer {ctx.name!r}")
        self._path = ctx.run_dir / TRACE_FILE
        if self._path.exists():
            raise in_use(ctx.run_dir, f"observer {ctx.name!r}", [TRACE_FILE])
        self._left = config.max_requests
        self._limit = config.max_requests
        self._out: _TraceFile | None = None
        self._phases = Phases()
        self._ids: dict[str, str] = {}
        """Live requests with a track -> the id of their events."""
        self._open: dict[str, str] = {}
        """Live request -> its open phase."""
        self._next = 0
        self._pools: list[str] = []
        self._known: set[tuple[int, int]] = set()
        """Processes and threads that have a name."""
        self._transfers: dict[tuple[int, int], str] = {}
        self._serving_ns = 0
        self._quality_ns: int | None = None
        self._cut = False
        self._feeders: dict[str, Callable[[_TraceFile, Any], None]] = {
            RunStarted.ev: self._run_started,
            RequestArrived.ev: self._arrived,
            RequestRouted.ev: self._hop,
            RequestMigrated.ev: self._hop,
            StepDone.ev: self._step,
            TransferStarted.ev: self._transfer_started,
            TransferEnded.ev: self._transfer_ended,
            QualityBegan.ev: self._quality_began,
            QualityMeasured.ev: self._quality,
        }

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        if isinstance(record, RunFinished):
            return  # the hook below, which is called even when an observer has raised
        out = self._out
        if out is None:
            out = self._out = _TraceFile(self._path)
            self._name(out, RUN, 0, "run", "phases")
        feeder = self._feeders.get(record.ev)
        if feeder is not None:
            feeder(out, record)
        for change in self._phases.feed(record):
            if change.request not in self._ids:
                continue
            if isinstance(record, RequestPreempted):
                self._preempted(out, record, change.t_ns)
            self._phase(out, change.request, record.engine, change.phase, change.t_ns)
            if isinstance(record, RequestFinished):
                self._finished(out, record, change.t_ns)
        out.settle(record.t_ns)

    @hookimpl
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        out, self._out = self._out, None
        if out is None:
            return
        for engine, live in self._phases.live.items():
            for name, one in live.items():
                if name in self._ids:  # no record ended it
                    end_ns = max(record.t_ns, one.since_ns)
                    self._phase(out, name, engine, None, end_ns)
                    self._async(out, "e", "request", self._ids[name], name, engine, end_ns)
        for (engine, transfer), name in self._transfers.items():
            self._async(out, "e", "transfer", f"0x{transfer:x}", name, engine, record.t_ns)
        end = max(record.t_ns, self._serving_ns)
        if self._quality_ns is None:
            self._slice(out, RUN, 0, "serving", self._serving_ns, end, {"status": record.status})
        else:
            self._slice(out, RUN, 0, "quality", self._quality_ns, max(end, self._quality_ns), {})
        out.close()

    # ------------------------------------------------------------ the run

    def _run_started(self, out: _TraceFile, r: RunStarted) -> None:
        self._serving_ns = r.t_ns
        pools = (r.info.get("kv") or {}).get("pools") or ()
        self._pools = [str(pool.get("id", i)) for i, pool in enumerate(pools)]

    def _quality_began(self, out: _TraceFile, r: QualityBegan) -> None:
        self._slice(out, RUN, 0, "serving", self._serving_ns, max(r.t_ns, self._serving_ns), {})
        self._quality_ns = r.t_ns

    def _quality(self, out: _TraceFile, r: QualityMeasured) -> None:
        self._counter(out, RUN, "mean KL in nats", r.t_ns, {r.label: r.kl_mean})

    # ------------------------------------------------------------ launches

    def _step(self, out: _TraceFile, r: StepDone) -> None:
        if not r.ends_ns:
            return
        pid, prompts = _process(r.engine), sum(n for n in r.tokens if n > 1)
        self._name(out, pid, r.lane + 1, f"engine {r.engine}", f"lane {r.lane}")
        size, steps, emitted = len(r.requests), len(r.ends_ns), sum(r.emitted)
        name = f"{prompts} prompt tokens, batch {size}" if prompts else f"decode, batch {size}"
        args = {
            "step": r.step,
            "steps": steps,
            "requests": size,
            "tokens": sum(r.tokens) + size * (steps - 1),
            "prompt_tokens": prompts,
            "prompts": {who: n for who, n in zip(r.requests, r.tokens, strict=True) if n > 1},
            "emitted": emitted,
        }
        self._slice(out, pid, r.lane + 1, name, r.start_ns, r.ends_ns[-1], args)
        end_ns, took_ns = r.ends_ns[-1], r.ends_ns[-1] - r.start_ns
        self._counter(out, pid, "requests", end_ns, {"waiting": r.waiting, "running": r.running})
        for index, free in enumerate(r.free_pages):  # not stacked: pools have pages of their own sizes
            pool = self._pools[index] if index < len(self._pools) else str(index)
            self._counter(out, pid, f"KV pool {pool}", end_ns, {"free pages": free})
        if took_ns > 0:
            rate = round(emitted * 1e9 / took_ns, 3)
            self._counter(out, pid, f"lane {r.lane}", end_ns, {"output tok/s": rate})

    # ------------------------------------------------------------ requests

    def _arrived(self, out: _TraceFile, r: RequestArrived) -> None:
        if not self._left:
            if self._limit and not self._cut:
                self._cut = True
                text = f"no tracks from here on: max_requests is {self._limit}"
                out.put({"ph": "i", "pid": RUN, "tid": 0, "ts": _us(r.t_ns), "s": "g", "name": text})
            return
        self._left -= 1
        self._next += 1
        self._ids[r.request] = f"0x{self._next:x}"
        if r.engine != ROUTER:  # what the router holds is in the process of the run
            self._name(out, _process(r.engine), 1, f"engine {r.engine}", "lane 0")
        args = {
            "prompt_tokens": r.prompt_tokens,
            "max_new_tokens": r.max_new_tokens,
            "class": r.request_class,
        }
        self._async(out, "b", "request", self._ids[r.request], r.request, r.engine, r.t_ns, args)

    def _hop(self, out: _TraceFile, r: RequestRouted | RequestMigrated) -> None:
        """Its track ends in one process and begins in another."""
        number, phase = self._ids.get(r.request), self._open.get(r.request)
        if number is None:
            return
        self._name(out, _process(r.engine), 1, f"engine {r.engine}", "lane 0")
        for what, engine in (("e", r.source), ("b", r.engine)):
            names = [name for name in (phase, r.request) if name is not None]
            for name in names if what == "e" else reversed(names):
                self._async(out, what, "request", number, name, engine, r.t_ns)

    def _preempted(self, out: _TraceFile, r: RequestPreempted, t_ns: int) -> None:
        args = {"mode": r.mode, "reason": r.reason, "lost_tokens": r.lost_tokens}
        self._async(out, "n", "request", self._ids[r.request], f"preempted: {r.mode}", r.engine, t_ns, args)

    def _phase(self, out: _TraceFile, request: str, engine: int, phase: str | None, t_ns: int) -> None:
        number, before = self._ids[request], self._open.pop(request, None)
        if before is not None:
            self._async(out, "e", "request", number, before, engine, t_ns)
        if phase is not None:
            self._async(out, "b", "request", number, phase, engine, t_ns)
            self._open[request] = phase

    def _finished(self, out: _TraceFile, r: RequestFinished, t_ns: int) -> None:
        args = {"outcome": r.outcome, "reason": r.reason, "output_tokens": r.output_tokens}
        self._async(out, "e", "request", self._ids.pop(r.request), r.request, r.engine, t_ns, args)

    # ------------------------------------------------------------ transfers

    def _transfer_started(self, out: _TraceFile, r: TransferStarted) -> None:
        name = f"swap {r.direction} {r.request}"
        self._transfers[r.engine, r.transfer] = name
        args = {"pages": r.pages, "bytes": r.bytes}
        self._async(out, "b", "transfer", f"0x{r.transfer:x}", name, r.engine, r.t_ns, args)

    def _transfer_ended(self, out: _TraceFile, r: TransferEnded) -> None:
        name = self._transfers.pop((r.engine, r.transfer), None)
        if name is not None:
            self._async(out, "e", "transfer", f"0x{r.transfer:x}", name, r.engine, r.t_ns)

    # ------------------------------------------------------------ events of the format

    def _name(self, out: _TraceFile, pid: int, tid: int, process: str, thread: str) -> None:
        if (pid, tid) in self._known:
            return
        if not any(known == pid for known, _ in self._known):
            out.put({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}})
            out.put({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}})
        self._known.add((pid, tid))
        out.put({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}})

    def _slice(
        self, out: _TraceFile, pid: int, tid: int, name: str, start_ns: int, end_ns: int, args: dict[str, Any]
    ) -> None:
        event = {"ph": "X", "pid": pid, "tid": tid, "ts": _us(start_ns), "dur": _us(end_ns - start_ns)}
        out.put({**event, "name": name, "cat": "launch" if pid != RUN else "run", "args": args})

    def _counter(self, out: _TraceFile, pid: int, name: str, t_ns: int, values: dict[str, float]) -> None:
        out.put({"ph": "C", "pid": pid, "ts": _us(t_ns), "name": name, "args": values})

    def _async(
        self,
        out: _TraceFile,
        ph: str,
        cat: str,
        number: str,
        name: str,
        engine: int,
        t_ns: int,
        args: dict[str, Any] | None = None,
    ) -> None:
        # a local id, or viewers would put the track beside the processes instead of into its engine
        event: dict[str, Any] = {"ph": ph, "cat": cat, "id2": {"local": number}, "pid": _process(engine)}
        event |= {"tid": 0, "ts": _us(t_ns), "name": name}
        out.put({**event, "args": args} if args else event)


def _process(engine: int) -> int:
    return engine + 2


def _us(ns: int) -> float:
    """Microseconds; a float holds their thousandths exactly enough for a hundred days."""
    return ns / 1000


class _TraceFile:
    """The file being written: an array with one event per line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines, self._flushed_ns = 0, 0
        self._before = "[\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: TextIO = path.open("x", encoding="utf-8", newline="\n", buffering=1 << 18)
        except FileExistsError as error:
            if not path.exists():
                raise self._cannot_write(error) from error  # the folder's own path is a file
            raise in_use(path.parent, "observer 'trace'", [path.name]) from error
        except OSError as error:
            raise self._cannot_write(error) from error

    def put(self, event: dict[str, Any]) -> None:
        """Write an event.

        Raises:
            PluginError: it holds what JSON does not know.
            ServeLabError: the file cannot be written.
        """
        try:
            text = _dumps(event)
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"a record cannot be written to {self._path.name}",
                where=f"event {event.get('name')!r} at {event.get('ts')} us",
                why=f"it holds something that JSON does not know: {error}",
                do="put only text, finite numbers, booleans, lists and dicts into records",
            ) from error
        self._write(self._before + text)
        self._before = ",\n"
        self._lines += 1

    def settle(self, t_ns: int) -> None:
        """A record is done: flush if it is time to."""
        if self._lines >= FLUSH_LINES or t_ns - self._flushed_ns >= FLUSH_NS:
            self._lines, self._flushed_ns = 0, t_ns
            try:
                self._stream.flush()
            except OSError as error:
                raise self._cannot_write(error) from error

    def close(self) -> None:
        """End the array and the file."""
        self._write("\n]\n" if self._before == ",\n" else "[]\n")
        try:
            self._stream.close()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ServeLabError:
        return unwritable(self._path, error, f"{WRITABLE}, or leave 'trace' out of 'observers'")


_dumps: Callable[[Any], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

"""Logs on disk: the coding of records as JSON lines, and reading them back. Standard library only.

``events.jsonl`` holds all records but plans, ``plan.jsonl`` the plans with their reasons; observer ``jsonl``
writes them, and ``read_log`` gives the very same records back. Both begin with a header line::

    {"log": "servelab-events", "format": 1, "schema": 1}

``format`` is the version of this coding, ``schema`` that of the records (``LOG_SCHEMA``). Every other line
has ``ev`` (the record type), ``t_ns`` and the record's fields under their own names; fields at their default
are left out. Two types repeat themselves, so they are coded against the previous line of the same type,
engine and lane:

**A list coded against its predecessor** (``requests`` of a step; ``requests`` and ``deferred`` of a plan; at
first the predecessor is empty):

- left out: the same list again;
- ``{"del": [i, ...], "add": [[j, item], ...]}``: drop the items at those places of the old list, then insert
  these, in order, each at its place in the new list; either key may be missing;
- a plain list: the whole list anew.

**Counts over a list**, flat ``[place, count, place, count, ...]``: only places that differ from the usual.

``step`` lines:

- ``requests``: coded as above;
- ``tokens``: places where a request ran other than 1 token in the first step;
- ``emitted``: places where it emitted other than 1 token per step;
- ``steps_ns``: how long each step took, the first from ``start_ns``; left out for one step that took
  ``t_ns - start_ns``. The ends are their running sum;
- everything else under its own name.

``planned`` lines:

- ``requests``: who works, coded as above; ``tokens``: places where the plan runs other than 1 token;
- ``deferred``: ``[request, reason]`` pairs, coded as above;
- ``preempted``, ``swapped_in``, ``rejected``, ``aborted``: plain lists, left out when empty;
- everything else under its own name.

After a crash the last line may be cut off: ``read_log`` says so, or skips it when told
``allow_truncated=True``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, compress, count
from operator import ne, sub
from pathlib import Path
from typing import Any, TypeVar

from servelab.core.errors import LogError
from servelab.core.records import LOG_SCHEMA, Planned, Record, RunStarted, StepDone, from_dict, to_dict

EVENTS_FILE = "events.jsonl"
PLANS_FILE = "plan.jsonl"
"""Names of the files in the folder of a run."""

FORMAT = 1
EVENTS_LOG = "servelab-events"
PLANS_LOG = "servelab-plans"

Key = tuple[str, int, int]
"""Type, engine and lane: lines are coded against the previous one of the same key."""

Item = TypeVar("Item", str, tuple[str, str])

MOST_DROPPED = 8
"""Items left out up to which a change is looked for by comparing slices; beyond it, item by item."""


def header(log: str) -> dict[str, Any]:
    """The first line of a log."""
    return {"log": log, "format": FORMAT, "schema": LOG_SCHEMA}


# ---------------------------------------------------------------- lists against their predecessors


def encode_list(old: Sequence[Item], new: Sequence[Item]) -> dict[str, Any] | list[Any] | None:
    """``new`` coded against ``old``; None: they are equal."""
    if old == new:
        return None
    had = set(old)
    if len(had) != len(old) or had.isdisjoint(new):
        return list(new)
    gone = _dropped(old, new)
    if gone is not None and len(gone) < len(old):  # most often: a few have left, others come at the end
        came = new[len(old) - len(gone) :]
        if had.isdisjoint(came) and len(set(came)) == len(came):
            return _change(gone, list(enumerate(came, len(old) - len(gone))))
    wanted = set(new)
    kept = [item for item in old if item in wanted]
    if len(wanted) != len(new) or not kept or kept != [item for item in new if item in had]:
        return list(new)
    gone = [i for i, item in enumerate(old) if item not in wanted]
    return _change(gone, [(j, item) for j, item in enumerate(new) if item not in had])


def _change(gone: list[int], came: list[tuple[int, Item]]) -> dict[str, Any]:
    change: dict[str, Any] = {}
    if gone:
        change["del"] = gone
    if came:
        change["add"] = [[j, item] for j, item in came]
    return change


def _dropped(old: Sequence[Item], new: Sequence[Item]) -> list[int] | None:
    """The places in ``old`` without which ``new`` begins with it; None: it does not, or they are many.

    Items are compared at C speed, which is much faster.
    """
    gone: list[int] = []
    i, size = 0, len(old)
    while len(gone) <= MOST_DROPPED:
        j = i - len(gone)
        if old[i:] == new[j : j + size - i]:
            return gone
        i += next(compress(count(), map(ne, old[i:], new[j:])), len(new) - j)  # items in common from here on
        gone.append(i)
        i += 1
    return None


def decode_list(old: list[Item], change: dict[str, Any] | list[Any] | None) -> list[Any]:
    """The inverse of ``encode_list``; items that JSON turned into lists are still lists."""
    if change is None:
        return old
    if isinstance(change, list):
        return change
    dropped = set(change.get("del", ()))
    new: list[Any] = [item for i, item in enumerate(old) if i not in dropped] if dropped else list(old)
    for place, item in change.get("add", ()):
        new.insert(place, item)
    return new


def encode_counts(counts: Sequence[int], usual: int) -> list[int]:
    """Places and values of the counts that differ from the usual one."""
    if counts.count(usual) == len(counts):
        return []
    return [x for place, one in enumerate(counts) if one != usual for x in (place, one)]


def decode_counts(size: int, exceptions: Sequence[int], usual: int) -> list[int]:
    """The inverse of ``encode_counts``."""
    counts = [usual] * size
    for place, one in zip(exceptions[::2], exceptions[1::2], strict=True):
        counts[place] = one
    return counts


# ---------------------------------------------------------------- records


class Encoder:
    """Records to JSON-ready dicts, one after the other."""

    def __init__(self) -> None:
        self._requests: dict[Key, list[str]] = {}
        self._deferred: dict[Key, list[tuple[str, str]]] = {}

    def __call__(self, record: Record) -> dict[str, Any]:
        """The line of the next record.

        Raises:
            ValueError: parallel lists of a step differ in length.
        """
        if isinstance(record, StepDone):
            return self._step(record)
        if isinstance(record, Planned):
            return self._planned(record)
        line = to_dict(record)
        if isinstance(record, RunStarted):
            line["info"] = dict(record.info)
        return line

    def _step(self, r: StepDone) -> dict[str, Any]:
        if not len(r.requests) == len(r.tokens) == len(r.emitted):
            raise ValueError("requests, tokens and emitted differ in length")
        line: dict[str, Any] = {"ev": r.ev, "t_ns": r.t_ns}
        if r.engine:
            line["engine"] = r.engine
        line |= {"lane": r.lane, "step": r.step, "start_ns": r.start_ns}
        ends = r.ends_ns
        if len(ends) != 1 or ends[0] != r.t_ns:
            line["steps_ns"] = list(map(sub, ends, [r.start_ns, *ends]))
        self._code_requests(line, (r.ev, r.engine, r.lane), r.requests)
        for name, counts, usual in (("tokens", r.tokens, 1), ("emitted", r.emitted, len(ends))):
            exceptions = encode_counts(counts, usual)
            if exceptions:
                line[name] = exceptions
        line |= {"waiting": r.waiting, "running": r.running, "free_pages": r.free_pages}
        if r.unusable_pages:
            line["unusable_pages"] = r.unusable_pages
        return line

    def _planned(self, r: Planned) -> dict[str, Any]:
        line: dict[str, Any] = {"ev": r.ev, "t_ns": r.t_ns}
        if r.engine:
            line["engine"] = r.engine
        line |= {"lane": r.lane, "step": r.step}
        key = (r.ev, r.engine, r.lane)
        if len(r.requests) != len(r.tokens):
            raise ValueError("requests and tokens differ in length")
        self._code_requests(line, key, r.requests)
        tokens = encode_counts(r.tokens, 1)
        if tokens:
            line["tokens"] = tokens
        before = self._deferred.get(key, [])
        if r.deferred or before:
            deferred = encode_list(before, r.deferred)
            if deferred is not None:
                line["deferred"] = deferred
                self._deferred[key] = list(r.deferred)
        for name in ("preempted", "swapped_in", "rejected", "aborted", "unpinned"):
            entries = getattr(r, name)
            if entries:
                line[name] = entries
        line["held"] = r.held
        if r.wake_at is not None:
            line["wake_at"] = r.wake_at
        return line

    def _code_requests(self, line: dict[str, Any], key: Key, requests: list[str]) -> None:
        change = encode_list(self._requests.get(key, []), requests)
        if change is not None:
            line["requests"] = change
            self._requests[key] = list(requests)


class Decoder:
    """The inverse of ``Encoder``."""

    def __init__(self) -> None:
        self._requests: dict[Key, list[str]] = {}
        self._deferred: dict[Key, list[tuple[str, str]]] = {}

    def __call__(self, line: dict[str, Any]) -> Record:
        """The record behind the next line.

        Raises:
            KeyError, TypeError, ValueError, IndexError: not a line of this format.
        """
        ev = line["ev"]
        if ev == StepDone.ev:
            self._step(line)
        elif ev == Planned.ev:
            self._planned(line)
        return from_dict(line)

    def _step(self, line: dict[str, Any]) -> None:
        durations = line.pop("steps_ns", None)
        if durations is None:
            ends = [line["t_ns"]]
        else:
            ends = list(accumulate(durations, initial=line["start_ns"]))[1:]
        requests = self._decode_requests(line)
        line["ends_ns"] = ends
        line["tokens"] = decode_counts(len(requests), line.get("tokens", ()), 1)
        line["emitted"] = decode_counts(len(requests), line.get("emitted", ()), len(ends))

    def _planned(self, line: dict[str, Any]) -> None:
        requests = self._decode_requests(line)
        line["tokens"] = decode_counts(len(requests), line.get("tokens", ()), 1)
        key = _key(line)
        deferred = [tuple(item) for item in decode_list(self._deferred.get(key, []), line.get("deferred"))]
        line["deferred"] = self._deferred[key] = deferred
        for name in ("preempted", "swapped_in", "rejected", "aborted", "unpinned"):
            line[name] = [tuple(entry) for entry in line.get(name, ())]

    def _decode_requests(self, line: dict[str, Any]) -> list[str]:
        key = _key(line)
        requests = decode_list(self._requests.get(key, []), line.get("requests"))
        line["requests"] = self._requests[key] = requests
        return requests


def _key(line: dict[str, Any]) -> Key:
    return line["ev"], line.get("engine", 0), line["lane"]


# ---------------------------------------------------------------- reading


def read_log(path: Path | str, *, allow_truncated: bool = False) -> Iterator[Record]:
    """The records of an ``events.jsonl`` or ``plan.jsonl``, in order, one at a time.

    Args:
        path: the file.
        allow_truncated: skip a last line that was cut off, as a crash leaves it.

    Raises:
        LogError: not such a file, a newer format, or a damaged line; names file and line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    decode = Decoder()
    with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        for number, text in enumerate(stream, start=1):
            try:
                line = json.loads(text)
            except ValueError as error:
                if text.endswith("\n"):
                    raise _damaged(path, number, str(error)) from error
                if allow_truncated:
                    return
                raise LogError(
                    "the log ends in the middle of a line",
                    where=f"{path}, line {number}",
                    why="the run was cut off while it wrote this line",
                    do="read it with allow_truncated=True, which leaves that line out",
                ) from error
            if number == 1:
                _check_header(path, line)
                continue
            try:
                record = decode(line)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise _damaged(path, number, f"{type(error).__name__}: {error}") from error
            yield record


def _check_header(path: Path, line: object) -> None:
    if not isinstance(line, dict) or line.get("log") not in (EVENTS_LOG, PLANS_LOG):
        raise LogError(
            "this is not a ServeLab log",
            where=f"{path}, line 1",
            why="its first line is not a log header",
            do=f"give an {EVENTS_FILE} or {PLANS_FILE} that observer 'jsonl' wrote",
        )
    found = (line.get("format"), line.get("schema"))
    if found != (FORMAT, LOG_SCHEMA):
        raise LogError(
            "the log was written in another version of its format",
            where=f"{path}, line 1",
            why=f"(format, schema) is {found}, this version reads {(FORMAT, LOG_SCHEMA)}",
            do="read it with the version of ServeLab that wrote it",
        )


def _damaged(path: Path, number: int, reason: str) -> LogError:
    return LogError(
        "the log has a damaged line",
        where=f"{path}, line {number}",
        why=reason,
        do="if a newer ServeLab wrote it, read it with that one; else restore the file from a copy: lines "
        "after a damaged one cannot be read, as they build on it",
    )

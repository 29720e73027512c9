"""``servelab explain RUN [REQUEST]``: arguments in, text out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice

from servelab.core.errors import ServeLabError
from servelab.core.logs import PLANS_FILE
from servelab.core.metrics import Timeline
from servelab.core.run_folder import RunFolder
from servelab.plugins.commands.explain.machine import as_json
from servelab.plugins.commands.explain.reader import UnknownRequest, read_life
from servelab.plugins.commands.explain.table import NUMBERS, SORTABLE, render, rows
from servelab.plugins.commands.explain.text import tell

FIRST = 20
"""Requests that are listed when none is named."""


def main(argv: Sequence[str]) -> None:
    """Tell the life of a request, or list the requests.

    Raises:
        ServeLabError: no such run or request, or logs that cannot be read.
    """
    args = _parser().parse_args(argv)
    run = RunFolder.find(args.run)
    if args.list:
        _list(run, args.by, args.json)
        return
    request = args.request
    if args.worst is not None:
        request = _worst(run, args.worst)
    if request is None:
        found = rows(_timeline(run).requests.values(), args.by)
        print(f"{len(found):,} requests in {run}; name one, or let one be chosen:\n")
        for line in render(found[:FIRST]):
            print(line)
        if len(found) > FIRST:
            print(f"  ... and {len(found) - FIRST:,} more: servelab explain {args.run} --list")
        print(f"\nservelab explain {args.run} {found[0]['request'] if found else 'REQUEST'}")
        print(f"servelab explain {args.run} --worst ttft")
        return
    plans = run.plans() if run.has(PLANS_FILE) else None
    try:
        life = read_life(request, run.events(), plans)
    except UnknownRequest as error:
        raise _unknown(request, error.known, run, args.run) from None
    if args.json:
        print(json.dumps(as_json(life), indent=2))
        return
    for line in tell(life, str(run)):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab explain",
        description="The life of one request of a run, from its logs: why it waited, when it was admitted, "
        "by which plan it was preempted and why, how it decoded, and whether it met its SLO.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, a file in it, or 'last'")
    parser.add_argument(
        "request", metavar="REQUEST", nargs="?", help="its id; without one, requests are listed"
    )
    parser.add_argument("--list", action="store_true", help="all requests, one line each")
    parser.add_argument(
        "--by", default="arrival", metavar="COLUMN", help=f"order of the list: {', '.join(SORTABLE)}"
    )
    parser.add_argument(
        "--worst", metavar="COLUMN", help=f"explain the request with the most: {', '.join(NUMBERS)}"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _timeline(run: RunFolder) -> Timeline:
    return Timeline().feed_all(run.events())


def _list(run: RunFolder, by: str, as_json: bool) -> None:
    found = rows(_timeline(run).requests.values(), by)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for line in render(found):
        print(line)


def _worst(run: RunFolder, column: str) -> str:
    found = rows(_timeline(run).requests.values(), column)
    if column == "arrival" or not found or found[0][column] is None:
        raise ServeLabError(
            f"no request has the most {column}",
            where=str(run),
            why="none has a figure there" if column != "arrival" else "that is the order of the list",
            do=f"servelab explain {run} --list",
        )
    return str(found[0]["request"])


def _unknown(request: str, known: Sequence[str], run: RunFolder, given: str) -> ServeLabError:
    close = get_close_matches(request, known, n=3)
    some = close or list(islice(known, 3))
    hint = (
        f"did you mean {' or '.join(close)}? "
        if close
        else f"ids look like {', '.join(some)}. "
        if some
        else ""
    )
    return ServeLabError(
        f"the run has no request {request!r}",
        where=str(run),
        why=f"{len(known):,} requests arrived, none of that id",
        do=f"{hint}all of them: servelab explain {given} --list",
    )

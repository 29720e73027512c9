"""``servelab export RUN --to guidellm|aiperf``: a finished run under the names of other tools.

Everything is computed anew from ``events.jsonl``, because the other tools' rules differ and not only their
names: see ``docs/reference/run_folder.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from servelab.core.api import ConfigError, ServeLabError
from servelab.core.metrics import Timeline
from servelab.plugins.commands._aiperf import aiperf
from servelab.plugins.commands._guidellm import guidellm
from servelab.plugins.observers.jsonl import read_log

EVENTS_FILE = "events.jsonl"
DIALECTS: dict[str, Callable[[Timeline], dict[str, Any]]] = {"aiperf": aiperf, "guidellm": guidellm}


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: no run in the folder, or the output file is there already.
        ServeLabError: the output file cannot be written.
        LogError: the log is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="servelab export", description="A run under the names of other tools."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("--to", required=True, choices=sorted(DIALECTS), help="whose names")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to; stdout by default")
    chosen = parser.parse_args(argv)
    text = json.dumps(export(chosen.run, chosen.to), indent=2, allow_nan=False) + "\n"
    if chosen.out is None:
        sys.stdout.write(text)
    else:
        _write(chosen.out, text)


def export(run: Path, to: str) -> dict[str, Any]:
    """The run in a folder, in the names of ``aiperf`` or ``guidellm``.

    Raises:
        ConfigError: there is no run in the folder.
    """
    log = run / EVENTS_FILE
    if not log.is_file():
        raise ConfigError(
            f"{run} holds no run that can be exported",
            where=str(log),
            why="there is no such file" if run.is_dir() else "there is no such folder",
            do="name the folder in the last line of a run's report; the run needs the observer jsonl",
        )
    return DIALECTS[to](Timeline().feed_all(read_log(log, allow_truncated=True)))


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already", where="--out", do="choose another file, or remove that one"
        ) from None
    except OSError as error:
        raise ServeLabError(
            f"{path} cannot be written",
            where="--out",
            why=error.strerror or str(error),
            do="choose a file in a folder that is there and can be written",
        ) from error

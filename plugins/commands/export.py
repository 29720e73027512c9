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
from servelab.core.run_folder import RunFolder
from servelab.plugins.commands._aiperf import aiperf
from servelab.plugins.commands._guidellm import guidellm

DIALECTS: dict[str, Callable[[Timeline], dict[str, Any]]] = {"aiperf": aiperf, "guidellm": guidellm}


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RunFolderError: there is no run in the folder, or it has no event log.
        ConfigError: the output file is there already.
        ServeLabError: the output file cannot be written.
        LogError: the log is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="servelab export", description="A run under the names of other tools."
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run; last for the newest")
    parser.add_argument("--to", required=True, choices=sorted(DIALECTS), help="whose names")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to; stdout by default")
    chosen = parser.parse_args(argv)
    text = json.dumps(export(chosen.run, chosen.to), indent=2, allow_nan=False) + "\n"
    if chosen.out is None:
        sys.stdout.write(text)
    else:
        _write(chosen.out, text)


def export(run: str | Path, to: str) -> dict[str, Any]:
    """The run in a folder, in the names of ``aiperf`` or ``guidellm``.

    Raises:
        RunFolderError: there is no run in the folder, or it has no event log.
        ServeLabError: no request arrived.
    """
    folder = RunFolder.find(run)
    timeline = Timeline().feed_all(folder.events())
    if not timeline.requests:
        raise ServeLabError(
            "there is nothing to export",
            where=str(folder),
            why="no request arrived: the run was killed before, or its task serves nothing",
            do="name a run that served requests",
        )
    return DIALECTS[to](timeline)


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

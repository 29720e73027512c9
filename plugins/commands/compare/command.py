"""``servelab compare RUN RUN [RUN...]``: arguments in, tables out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from servelab.core.errors import ServeLabError
from servelab.core.run_folder import RunFolder
from servelab.plugins.commands.compare.differences import ABSENT, labels, table, warnings
from servelab.plugins.commands.compare.facts import RunFacts, check_comparable, read_run
from servelab.plugins.commands.compare.measures import measure
from servelab.plugins.commands.compare.text import tell, verdict

JSON_SCHEMA = 1


def main(argv: Sequence[str]) -> None:
    """Print what differs between runs.

    Raises:
        ServeLabError: no such run, the same one twice, or results of different versions.
    """
    args = _parser().parse_args(argv)
    folders = [RunFolder.find(given) for given in args.runs]
    real = [folder.path.resolve() for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise ServeLabError(
                "a run cannot be compared with itself",
                where=f"command line: {folder}",
                why="it is named twice",
                do="name different runs",
            )
    if len(folders) < 2:
        raise ServeLabError(
            "nothing to compare with",
            where=f"command line: {folders[0]}",
            why="one run is named",
            do=f"servelab compare {folders[0]} ANOTHER_RUN",
        )
    runs = [read_run(folder) for folder in folders]
    check_comparable(runs)
    if args.json:
        print(json.dumps(as_json(runs, everything=args.all), indent=2))
        return
    for line in tell(runs, everything=args.all):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab compare",
        description="Runs side by side: settings, versions and figures that differ, and warnings where a "
        "difference may come from something else. The first run is what the others are held against.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, a file in it, or 'last'")
    parser.add_argument("--all", action="store_true", help="equal settings and every figure as well")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def as_json(runs: Sequence[RunFacts], *, everything: bool) -> dict[str, Any]:
    """The same for machines; lists have one entry per run. A value that a run does not have is null."""
    figures = {}
    for key in dict.fromkeys(key for run in runs for key in run.figures):
        values = [run.figures.get(key) for run in runs]
        base = values[0]
        figures[key] = {
            "unit": measure(key).unit,
            "better": measure(key).better or None,
            "values": values,
            "difference": [None if v is None or base is None else v - base for v in values],
            "ratio": [None if v is None or not base else v / base for v in values],
            "verdict": [verdict(key, base, v) or None for v in values],
        }
    return {
        "schema_version": JSON_SCHEMA,
        "runs": [
            {
                "label": label,
                "folder": run.folder,
                "status": run.status,
                "partial": run.partial,
                "samples": run.samples,
                "stamps": run.stamps,
            }
            for label, run in zip(labels(runs), runs, strict=True)
        ],
        "warnings": warnings(runs),
        "settings": _known(table([run.settings for run in runs], equal=everything)),
        "ground": _known(table([run.ground for run in runs], equal=everything)),
        "figures": figures,
    }


def _known(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: [None if value is ABSENT else value for value in row] for key, row in rows.items()}

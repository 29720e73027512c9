"""``servelab sweep FOLDER``: make the comparison of a sweep's jobs again, from what is in its folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from servelab.plugins.sweeps.comparison import compare


def main(argv: Sequence[str]) -> None:
    """Print the table, and write ``sweep.md``, ``sweep.csv``, ``sweep.json`` and ``plots/`` into the folder.

    Raises:
        ConfigError: no sweep is in the folder.
        ServeLabError: a file cannot be read or written.
    """
    parser = argparse.ArgumentParser(
        prog="servelab sweep",
        description="Compare the jobs of a sweep again, as they stand: a table, and in the folder sweep.md, "
        "sweep.csv, sweep.json and plots/.",
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="of the sweep: hydra.sweep.dir, by default multirun/DATE/TIME",
    )
    compare(parser.parse_args(argv).folder.absolute())

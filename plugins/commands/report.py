"""``servelab report RUN``: the plots and the page of a finished run again, from its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Write ``plots/`` and ``report.html`` into the folder of each run, and say where.

    Args:
        argv: folders of runs.

    Raises:
        ServeLabError: a folder holds no run, its log is damaged, or a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="servelab report", description="Make the plots and the page of finished runs again."
    )
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="folder of a run, with events.jsonl")
    from servelab.plugins.observers.report.page import PAGE_FILE, write_page

    for folder in parser.parse_args(argv).run:
        for note in write_page(folder):
            print(note)
        print(f"report: {folder / PAGE_FILE}")

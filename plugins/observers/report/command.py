"""``servelab report RUN``: the plots and the page of a finished run again, from its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from servelab.core.run_folder import RunFolder


def main(argv: Sequence[str]) -> None:
    """Write ``plots/`` and ``report.html`` into the folder of each run, and say where.

    Args:
        argv: folders of runs, or ``last``.

    Raises:
        RunFolderError: there is no run, or it has no event log.
        LogError: its log is damaged.
        ServeLabError: a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="servelab report", description="Make the plots and the page of finished runs again."
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="folder of a run; last for the newest")
    from servelab.plugins.observers.report.page import PAGE_FILE, write_page

    for run in parser.parse_args(argv).run:
        folder = RunFolder.find(run).path
        for note in write_page(folder):
            print(note)
        print(f"report: {folder / PAGE_FILE}")

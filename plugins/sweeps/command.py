"""``servelab sweep FOLDER``: make the comparison of a sweep's jobs again, from what is in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from servelab.core.api import ConfigError
from servelab.plugins.sweeps.comparison import compare

USAGE = """\
servelab sweep FOLDER      compare the jobs of a sweep again, as they stand: a table, sweep.md, sweep.csv,
                           sweep.json and plots/ in FOLDER (hydra.sweep.dir; by default multirun/DATE/TIME)
"""


def main(argv: Sequence[str]) -> None:
    """Do it, or print how to ask for it.

    Raises:
        ConfigError: not exactly one folder is given, or no sweep is in it.
        ServeLabError: a file cannot be read or written.
    """
    if {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return
    if len(argv) != 1:
        raise ConfigError(
            "sweep takes the folder of a sweep",
            where=f"command line: sweep {' '.join(argv)}".rstrip(),
            do="servelab sweep multirun/DATE/TIME",
        )
    compare(Path(argv[0]).absolute())

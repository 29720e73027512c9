"""The folder of a run: what the observers write there, and that it is not another run's."""

from __future__ import annotations

from pathlib import Path

from servelab.core.api import ConfigError
from servelab.core.logs import EVENTS_FILE as EVENTS_FILE
from servelab.core.logs import PLANS_FILE as PLANS_FILE
from servelab.core.run_folder import RESULTS_FILE as RESULTS_FILE


def check_unused(folder: Path, observer: str) -> None:
    """Refuse a folder that holds a run already.

    Raises:
        ConfigError: one of the files is there.
    """
    found = [name for name in (EVENTS_FILE, PLANS_FILE, RESULTS_FILE) if (folder / name).exists()]
    if found:
        raise in_use(folder, observer, found)


def in_use(folder: Path, observer: str, found: list[str]) -> ConfigError:
    """The refusal itself."""
    return ConfigError(
        f"observer {observer!r} will not write over another run",
        where=str(folder),
        why=f"the folder already holds {', '.join(found)}",
        do="choose another folder (hydra.run.dir=..., hydra.sweep.dir=... for a sweep), leave that setting "
        "out for a fresh one, or remove the old files",
    )

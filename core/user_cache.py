"""Where what is fetched or made once per user is kept: models, and data sets of recorded traffic."""

from __future__ import annotations

import os
from pathlib import Path

CACHED = "cache:"
"""Begins a stated path that is below the cache folder, wherever that is."""
DATA = "data"
"""Folder of data sets in the cache."""


def cache_root() -> Path:
    """``$SERVELAB_CACHE``, or ``servelab`` in ``$XDG_CACHE_HOME``, or ``~/.cache/servelab``."""
    if own := os.environ.get("SERVELAB_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "servelab"


def stated_path(stated: str) -> Path:
    """The path that a setting states: ``cache:NAME`` in the cache, ``~`` at home, any other from here."""
    if stated.startswith(CACHED):
        return cache_root() / stated.removeprefix(CACHED)
    return Path(stated).expanduser()

"""Notices which files a piece of code writes, wherever they are."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_listening: list[tuple[int, list[Path]]] = []
"""Who listens: thread, and where it notes paths."""
_hooked = False
_CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.link": 2}
"""Audit event -> how many of its first arguments are paths that it changes."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _listening or (event != "open" and event not in _CHANGES):
        return
    if event == "open":
        path, mode, flags = args
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITES)
        paths = [path] if writes else []
    else:
        paths = list(args[: _CHANGES[event]])
    for thread, noted in _listening:
        if thread == threading.get_ident():
            noted += [
                Path(os.path.abspath(os.fsdecode(p))) for p in paths if isinstance(p, str | bytes | Path)
            ]


@contextmanager
def files_written() -> Iterator[list[Path]]:
    """The paths that this thread opens for writing, makes, renames or removes while it lasts.

    Devices, byte code and the caches of libraries in the user's cache folder are left out.
    """
    global _hooked
    if not _hooked:  # for good: Python cannot take audit hooks off again
        sys.addaudithook(_audit)
        _hooked = True
    noted: list[Path] = []
    entry = (threading.get_ident(), noted)
    _listening.append(entry)
    try:
        yield noted
    finally:
        _listening.remove(entry)
        noted[:] = [path for path in dict.fromkeys(noted) if not _a_librarys(path)]


def _a_librarys(path: Path) -> bool:
    caches = [Path.home() / ".cache", Path.home() / ".config", Path("/dev"), Path("/proc")]
    caches += [Path(os.environ[name]) for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR") if name in os.environ]
    return path.suffix == ".pyc" or "__pycache__" in path.parts or any(map(path.is_relative_to, caches))

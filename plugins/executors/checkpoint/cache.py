"""Folders that are made once per user and then only read: complete, or not there.

A folder is made under another name beside its own and renamed when it is complete, so an interrupt, a crash
or a full disk leaves nothing that looks like a model. Processes that want the same folder wait for the first.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from servelab.core.user_cache import cache_root
from servelab.plugins.executors.checkpoint.errors import OTHER_SOURCES, ModelError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def made_once(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The cached folder ``models/name``, made first if it is not there.

    Args:
        name: of the folder.
        make: called with a scratch folder and with the empty folder to fill.

    Raises:
        ModelError: the cache cannot be written or the disk is full; nothing is left behind.
    """
    models = cache_root() / "models"
    final = models / name
    if final.is_dir():
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _alone(models, name):
            if not final.is_dir():  # made by the process we waited for
                _make(models, final, make)
    except OSError as exc:
        raise unwritable(exc, models) from exc
    return final


def unwritable(exc: OSError, where: Path, needed: int | None = None) -> ModelError:
    """The error for a cache that cannot be written.

    Args:
        exc: what writing raised.
        where: folder that was written to.
        needed: bytes that had to fit, where known.
    """
    if exc.errno in _FULL:
        room = f"{needed:,} bytes are needed" if needed else "the model does not fit"
        return ModelError(
            "the disk is full; nothing was left behind",
            where=str(where),
            why=f"{room}, {_free(where):,} bytes are free ({exc})",
            do=f"make room; or name a folder on another disk in SERVELAB_CACHE; {OTHER_SOURCES}",
        )
    return ModelError(
        "the model cannot be written to the cache",
        where=str(where),
        why=str(exc),
        do=f"make the folder writable, or name another in SERVELAB_CACHE; {OTHER_SOURCES}",
    )


def _make(models: Path, final: Path, make: Callable[[Path, Path], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=models))
    try:
        # the folder that stays is not the one of mkdtemp, which only its owner may read
        folder = scratch / "model"
        folder.mkdir()
        make(scratch, folder)
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():  # where locks do not work, another process may have been first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone(models: Path, name: str) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies."""
    with (models / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: two may make the folder, one of them in vain
            yield
            return
        for stale in models.glob(f".{name}.*.tmp"):  # of processes that were killed
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _free(where: Path) -> int:
    existing = next(p for p in (where, *where.parents) if p.exists())
    return shutil.disk_usage(existing).free

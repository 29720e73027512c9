"""Which file a workload's ``path`` names."""

from __future__ import annotations

from pathlib import Path

from servelab.core.api import ConfigError, WorkloadError
from servelab.core.errors import nearest
from servelab.core.user_cache import DATA, cache_root, stated_path


def must_be_stated(path: str | None, workload: str, example: str) -> str:
    """The setting ``path`` of a workload that has nothing to send without a file.

    Args:
        path: the setting.
        workload: whose.
        example: a data set that can be fetched.

    Raises:
        ConfigError: it is None.
    """
    if path is None:
        raise ConfigError(
            f"workload {workload!r} has no trace to replay",
            where="workload.path",
            why="nothing is stated, and the trace is not part of ServeLab",
            do=f"servelab data fetch {example}, then workload.path={example}; or name your own copy",
        )
    return path


def trace_path(stated: str, remedy: str) -> Path:
    """A file, ``cache:FILE`` below the cache folder, or the name of a data set that was fetched.

    Args:
        stated: the setting.
        remedy: where a good file comes from, for the error.

    Raises:
        WorkloadError: there is no such file, and no data set of that name was fetched.
    """
    path = stated_path(stated)
    if path.is_file():
        return path
    folder = cache_root() / DATA
    fetched = {p.stem: p for p in sorted(folder.glob("[!.]*")) if p.suffix in (".csv", ".jsonl")}
    if stated in fetched:
        return fetched[stated]
    raise WorkloadError(
        f"there is no trace {stated!r}",
        where="workload.path",
        why=f"{path.absolute()} is {_instead(path)}, and of data sets "
        f"{', '.join(fetched) or 'none'} was fetched",
        do="; ".join([*[nearest(stated, fetched)] * bool(fetched), f"check the path, or {remedy}"]),
    )


def _instead(path: Path) -> str:
    """What is there instead of a file."""
    if path.is_dir():
        return "a folder"
    return "no regular file" if path.exists() else "not there"

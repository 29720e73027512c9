"""Which file a workload's ``path`` names."""

from __future__ import annotations

from pathlib import Path

from servelab.core.api import WorkloadError
from servelab.core.errors import nearest
from servelab.core.user_cache import DATA, cache_root, stated_path


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
        why=f"{path.absolute()} is {'a folder' if path.is_dir() else 'not there'}, and of data sets "
        f"{', '.join(fetched) or 'none'} was fetched",
        do=(f"{nearest(stated, fetched)}; " if fetched else "") + remedy,
    )

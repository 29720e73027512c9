"""A model of the Hugging Face hub (source: hub), kept in huggingface_hub's own cache."""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from servelab.core.config import ModelConfig
from servelab.core.user_cache import cache_root
from servelab.plugins.executors.checkpoint.errors import ModelError, library

log = logging.getLogger("servelab")

CONFIG = ("config.json",)
FILES = (
    *CONFIG,
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Never a pickle, never code."""
_CONNECT_SECONDS = 15.0
_LOCAL = "or download it elsewhere (hf download) and run model=local model.path=FOLDER"


def snapshot(model: ModelConfig, patterns: tuple[str, ...] = FILES) -> Path:
    """Folder with a repository's files, downloaded where the cache lacks them; it is named by the commit.

    Where the hub cannot be reached it is what an earlier run downloaded, if that is complete.

    Args:
        model: with ``repo`` and, where stated, ``revision``.
        patterns: of the files wanted.

    Raises:
        ModelError: no such repository or revision, no access, no network, or the disk is full.
    """
    hub: Any = library("huggingface_hub", why="model.source=hub downloads with it")
    log.info("looking for %s on the Hugging Face hub", model.repo)
    wanted = {
        "revision": model.revision,
        "allow_patterns": list(patterns),
        "ignore_patterns": ["*/*"],
        "etag_timeout": _CONNECT_SECONDS,
    }
    try:
        # asked first with a bound: a download alone tries a silent server for minutes
        hub.HfApi().repo_info(model.repo, revision=model.revision, timeout=_CONNECT_SECONDS)
        found = Path(hub.snapshot_download(model.repo, **wanted))
    except Exception as exc:  # of huggingface_hub, of its HTTP library, of the file system
        if _unreachable(exc) and (cached := _cached(hub, model, wanted)) is not None:
            return cached
        raise _explained(exc, model) from exc
    if patterns == FILES:
        _note_complete(model, found)
    return found


def _unreachable(exc: BaseException) -> bool:
    """Whether it is the network that failed, or that was switched off (HF_HUB_OFFLINE)."""
    errors: Any = library("huggingface_hub.errors", why="model.source=hub downloads with it")
    while isinstance(exc, errors.LocalEntryNotFoundError) and exc.__cause__ is not None:
        exc = exc.__cause__
    # of whichever HTTP library huggingface_hub is built on: of httpx and its successors, or of requests
    http: Any = library(
        errors.HTTPError.__module__.partition(".")[0], why="huggingface_hub downloads with it"
    )
    named = (getattr(http, name, None) for name in ("TransportError", "ConnectionError", "Timeout"))
    return isinstance(exc, (ConnectionError, TimeoutError, *(kind for kind in named if kind is not None)))


def _cached(hub: Any, model: ModelConfig, wanted: dict[str, Any]) -> Path | None:
    """What an earlier run downloaded, if all of it is there."""
    try:
        found = Path(hub.snapshot_download(model.repo, local_files_only=True, **wanted))
    except Exception:  # as above: then the first error is the one to tell
        return None
    names = list(CONFIG) if wanted["allow_patterns"] == list(CONFIG) else _noted(model, found)
    if not names or not all((found / name).is_file() for name in names):
        return None
    log.warning("the hub cannot be reached; using %s from its cache, commit %s", model.repo, found.name)
    return found


def _note(model: ModelConfig, found: Path) -> Path:
    """Our file that lists a whole snapshot; older huggingface_hub cannot tell it from a part."""
    return cache_root() / "models-hub" / f"{str(model.repo).replace('/', '--')}@{found.name}.json"


def _note_complete(model: ModelConfig, found: Path) -> None:
    """List what a download that succeeded left: every file of the revision that we ask for."""
    note = _note(model, found)
    names = sorted(p.name for p in found.iterdir() if any(fnmatch(p.name, pattern) for pattern in FILES))
    scratch = None
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{note.name}.", suffix=".tmp", dir=note.parent)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(names, file)
        os.replace(scratch, note)
    except OSError as exc:  # the model is there; only a later run without network would miss this
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        log.warning("%s cannot be written (%s); offline, %s will not be found", note, exc, model.repo)


def _noted(model: ModelConfig, found: Path) -> list[str]:
    try:
        names = json.loads(_note(model, found).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _explained(exc: Exception, model: ModelConfig) -> ModelError:
    errors: Any = library("huggingface_hub.errors", why="model.source=hub downloads with it")
    at = f"{model.repo}{'@' + model.revision if model.revision else ''}"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        what, do = f"the disk is too full for {at}", "make room, or set HF_HOME to a folder on another disk"
    elif isinstance(exc, errors.GatedRepoError):
        what = f"{at} is gated"
        do = f"accept its licence on huggingface.co and log in (hf auth login); or choose another; {_LOCAL}"
    elif isinstance(exc, errors.RevisionNotFoundError):
        what = f"{model.repo} has no revision {model.revision!r}"
        do = f"correct model.revision; or leave it out for the main branch; {_LOCAL}"
    elif isinstance(exc, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        what = f"there is no repository {model.repo!r} on the hub, or it is private"
        do = f"correct model.repo (OWNER/NAME); or log in (hf auth login) if it is private; {_LOCAL}"
    else:
        what = f"{at} could not be downloaded from the Hugging Face hub"
        do = f"check the network and run again; or name a mirror in HF_ENDPOINT; {_LOCAL}"
    first = str(exc).strip().splitlines()
    return ModelError(what, where="model.repo", why=first[0] if first else type(exc).__name__, do=do)

"""A model of the Hugging Face hub (source: hub), kept in huggingface_hub's own cache."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

from servelab.core.config import ModelConfig
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
        return Path(hub.snapshot_download(model.repo, **wanted))
    except Exception as exc:  # of huggingface_hub, of its HTTP library, of the file system
        if (cached := _cached(hub, model, wanted, exc)) is not None:
            return cached
        raise _explained(exc, model) from exc


def _cached(hub: Any, model: ModelConfig, wanted: dict[str, Any], exc: Exception) -> Path | None:
    """What an earlier run downloaded, where it is the network that failed."""
    errors: Any = library("huggingface_hub.errors", why="model.source=hub downloads with it")
    refused = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    if isinstance(exc, refused):
        return None
    try:
        found = Path(hub.snapshot_download(model.repo, local_files_only=True, **wanted))
    except Exception:  # as above: then the first error is the one to tell
        return None
    log.warning("the hub cannot be reached; using %s from its cache, commit %s", model.repo, found.name)
    return found


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

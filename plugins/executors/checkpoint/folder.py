"""A folder in Hugging Face format: ``config.json`` and safetensors, one file or shards with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.safetensors_file import ITEM_BYTES, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    "convert them to safetensors once, where you trust the file: "
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER')"
    ".save_pretrained('NEW_FOLDER')\", and copy the tokenizer's files"
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelError(
            f"{path.name} cannot be read", where=str(path), why=str(exc), do="download or copy it again"
        ) from exc
    if not isinstance(value, dict):
        raise ModelError(
            f"{path.name} cannot be read",
            where=str(path),
            why=f"it holds a {type(value).__name__}, not an object",
            do="download or copy it again",
        )
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Fields of ``config.json``.

    Raises:
        ModelError: it is missing or malformed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "the folder has no config.json",
            where=str(folder),
            why=f"it holds {_listing(folder)}",
            do="model.path is the folder that holds config.json and *.safetensors, or a GGUF file",
        )
    return read_json(path)


def weights(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, each file checked whole.

    Raises:
        ModelError: weights are missing, damaged, or in pickles only.
    """
    if (folder / SINGLE).is_file():
        return {name: folder / SINGLE for name in _tensors(folder / SINGLE)}
    if (folder / INDEX).is_file():
        return _sharded(folder)
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "the weights are in pickle files",
            where=str(folder / pickles[0]),
            why="a pickle can run any code when it is loaded; only safetensors and GGUF are read",
            do=_CONVERT,
        )
    raise ModelError(
        f"the folder has neither {SINGLE} nor {INDEX}",
        where=str(folder),
        why=f"it holds {_listing(folder)}",
        do="complete the download, or name another folder",
    )


def _sharded(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(
            "the index names no weights",
            where=str(index),
            why="weight_map is missing",
            do="download it again",
        )
    files: dict[str, set[str]] = {}
    for shard in sorted(set(map(str, named.values()))):
        path = folder / shard
        if Path(shard).name != shard or not path.is_file():
            raise ModelError(
                f"the shard {shard} is missing",
                where=str(folder),
                why=f"{INDEX} names it",
                do="complete the download",
            )
        files[shard] = _tensors(path)
    for tensor, shard in named.items():
        if tensor not in files[shard]:
            raise ModelError(
                f"the tensor {tensor} is not in {shard}",
                where=str(folder),
                why=f"{INDEX} says it is: index and shard are of different checkpoints",
                do="download both again",
            )
    return {tensor: folder / shard for tensor, shard in named.items()}


def _tensors(path: Path) -> set[str]:
    entries = read_header(path)
    for name, entry in entries.items():
        if entry.dtype not in ITEM_BYTES:
            raise ModelError(
                f"the tensor {name} is of type {entry.dtype}",
                where=str(path),
                why=f"weights are read in {', '.join(ITEM_BYTES)}; this checkpoint is quantized",
                do="use the checkpoint it was made from",
            )
    return set(entries)


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"

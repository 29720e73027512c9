"""A GGUF file into a complete folder in Hugging Face format, float32, that transformers loads too."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from servelab.plugins.executors.checkpoint.architectures import checked
from servelab.plugins.executors.checkpoint.cache import unwritable
from servelab.plugins.executors.checkpoint.folder import SINGLE
from servelab.plugins.executors.checkpoint.gguf_config import config_of
from servelab.plugins.executors.checkpoint.gguf_file import GgufFile
from servelab.plugins.executors.checkpoint.gguf_tensors import dequantized, named
from servelab.plugins.executors.checkpoint.gguf_tokenizer import tokenizer_files
from servelab.plugins.executors.checkpoint.safetensors_file import header_bytes

PROVENANCE = "provenance.json"


def convert(gguf: GgufFile, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write the folder's files; it must exist and be empty.

    One tensor is in memory at a time.

    Raises:
        ModelError: the model is not supported, or the disk is full.
    """
    raw = config_of(gguf)
    config = checked(raw, str(gguf.path))
    tokenizer, tokenizer_config = tokenizer_files(gguf.metadata, str(gguf.path))
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]
    ids: dict[str, Any] = {
        key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw
    }
    shapes = [(name, tensor.shape) for name, tensor in named(gguf).items()]
    header = header_bytes(shapes, {"format": "pt"})
    needed = len(header) + sum(4 * prod(shape) for _, shape in shapes) + len(tokenizer.encode())
    try:
        _write_weights(gguf, config, header, folder / SINGLE)
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", tokenizer_config)
        _write_json(folder / "config.json", {**raw, "dtype": "float32"})
        _write_json(folder / "generation_config.json", ids)
        _write_json(folder / PROVENANCE, provenance)
    except OSError as exc:
        raise unwritable(exc, folder, needed) from exc


def _write_weights(gguf: GgufFile, config: Mapping[str, Any], header: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(header)
        for _, values in dequantized(gguf, config):
            file.write(values.data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""A model's files on this machine, found and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servelab.core.text import Tokenizer
from servelab.plugins.executors.checkpoint.gguf_file import GgufFile


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What ``find`` returns; nothing of the weights is loaded yet."""

    config: Mapping[str, Any]
    """Fields of config.json with defaults filled in, and what ``architectures.py::checked`` adds."""
    provenance: Mapping[str, Any]
    """``source`` (path, hub, wheel), where it is from, and ``quantization`` of the origin, such as
    ``Q4_1 (dequantized)``, or ``none``."""
    files: tuple[Path, ...]
    """Weight files: safetensors shards, or one GGUF."""
    weights: Mapping[str, Path]
    """Safetensors: tensor name -> its file. Empty for a GGUF."""
    gguf: GgufFile | None = None

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, made anew at each call.

        Raises:
            ModelError: its files are missing, damaged, or of a kind we cannot read exactly.
            ConfigError: its chat template cannot be read.
        """
        from servelab.plugins.executors.checkpoint import tokenizer

        if self.gguf is None:
            return tokenizer.from_folder(self.files[0].parent, self.config)
        from servelab.plugins.executors.checkpoint.gguf_tokenizer import tokenizer_files

        where = str(self.gguf.path)
        text, settings = tokenizer_files(self.gguf.metadata, where)
        return tokenizer.from_gguf(text, settings, self.gguf.metadata, where)

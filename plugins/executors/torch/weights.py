"""The tensors of a checkpoint, under their Hugging Face names, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from servelab.plugins.executors.checkpoint.checkpoint import Checkpoint
from servelab.plugins.executors.checkpoint.errors import library
from servelab.plugins.executors.checkpoint.gguf_tensors import dequantized


def tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that the files hold, as ``(name, tensor)``, on the CPU.

    Of safetensors in the type they are stored in, mapped from the file: copy what is kept in place. Of a GGUF
    as float32, each its own copy.
    """
    yield from _gguf(checkpoint) if checkpoint.gguf is not None else _safetensors(checkpoint)


def _safetensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    library("safetensors", why="the weights are in this format")
    from safetensors import safe_open

    for path in checkpoint.files:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if checkpoint.weights.get(name) == path:
                    yield name, file.get_tensor(name)


def _gguf(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    assert checkpoint.gguf is not None
    config: Mapping[str, Any] = checkpoint.config
    for name, values in dequantized(checkpoint.gguf, config):
        yield name, torch.from_numpy(values)

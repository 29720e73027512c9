"""A GGUF file: metadata and where its tensors lie, with every length checked against the file's size.

Read with the standard library: ``gguf.GGUFReader`` takes seconds for a vocabulary and follows corrupt
lengths.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from servelab.plugins.executors.checkpoint.errors import ModelError, library

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _MAX_DIMS = 8, 9, 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as numpy and torch write it; the file stores it the other way round."""
    type: int
    """Number of the element type, a ``gguf.GGMLQuantizationType``."""
    offset: int
    """First byte within the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file's contents without its data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def type_name(self, tensor: GgufTensor) -> str:
        """Such as ``Q4_1``."""
        return str(
            library("gguf", why="GGUF files hold quantized tensors").GGMLQuantizationType(tensor.type).name
        )


def read_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of a file.

    Raises:
        ModelError: the file is cut short, is damaged, or is of a version or byte order we do not read.
    """
    size = path.stat().st_size
    if size < 24:
        raise _damaged(path, f"it has {size} bytes, a header has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data)
        if reader.take(4) != MAGIC:
            raise _damaged(path, f"it starts with {data[:4]!r}, not {MAGIC!r}")
        version = reader.scalar("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0
            kind = "big-endian" if swapped else f"of version {version}"
            raise ModelError(
                f"{path.name} is {kind}",
                where=str(path),
                why=f"GGUF is read little-endian, in versions {', '.join(map(str, _VERSIONS))}",
                do="convert it again with a current llama.cpp, or use the model's Hugging Face folder",
            )
        tensor_count, pairs = reader.scalar("Q"), reader.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(reader.plausible(pairs, 13)):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("I"))
        if metadata.get("split.count", 0) > 1:
            raise ModelError(
                f"{path.name} is one of {metadata['split.count']} parts",
                where=str(path),
                why="a GGUF is read from one file",
                do="join them: llama-gguf-split --merge FIRST_PART OUTPUT",
            )
        table = [_tensor_info(reader) for _ in range(reader.plausible(tensor_count, 24))]
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1 or align & (align - 1):
        raise _damaged(path, f"its alignment is {align!r}, not a power of two")
    start = -(-reader.at // align) * align
    tensors: dict[str, GgufTensor] = {}
    for name, shape, element, offset in table:
        nbytes = _nbytes(path, name, shape, element)
        if name in tensors:
            raise _damaged(path, f"it holds {name!r} twice")
        if start + offset + nbytes > size:
            raise _damaged(path, f"{name!r} ends at byte {start + offset + nbytes}, the file has {size}")
        tensors[name] = GgufTensor(name, shape, element, start + offset, nbytes)
    return GgufFile(path, metadata, tensors)


class _Reader:
    """A place in the file that never runs over its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _damaged(self.path, f"it ends at byte {len(self.data)}, within its header")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def plausible(self, count: int, each: int) -> int:
        """The count, unless so many items of at least ``each`` bytes cannot be in the rest of the file."""
        if count * each > len(self.data) - self.at:
            raise _damaged(self.path, f"at byte {self.at} it claims {count} items, more than it can hold")
        return count

    def string(self) -> str:
        raw = self.take(self.plausible(self.scalar("Q"), 1))
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise _damaged(self.path, f"a string before byte {self.at} is not UTF-8") from exc

    def value(self, kind: int) -> Any:
        if code := _SCALARS.get(kind):
            return self.scalar(code)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _damaged(self.path, f"before byte {self.at} a value has the unknown type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if code := _SCALARS.get(item):
            width = struct.calcsize("<" + code)
            return list(struct.unpack(f"<{count}{code}", self.take(self.plausible(count, width) * width)))
        if item == _ARRAY:
            raise _damaged(self.path, f"before byte {self.at} an array holds arrays")
        return [self.value(item) for _ in range(self.plausible(count, 8))]


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = reader.string(), reader.scalar("I")
    if dims > _MAX_DIMS:
        raise _damaged(reader.path, f"{name!r} has {dims} dimensions")
    shape = tuple(reversed([reader.scalar("Q") for _ in range(dims)]))
    return name, shape, reader.scalar("I"), reader.scalar("Q")


def _nbytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    gguf = library("gguf", why="GGUF files hold quantized tensors")
    try:
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as exc:
        raise _damaged(path, f"{name!r} has the unknown element type {kind}") from exc
    if shape and shape[-1] % block:
        raise _damaged(
            path, f"rows of {name!r} have {shape[-1]} elements, no multiple of its block of {block}"
        )
    return prod(shape) // int(block) * int(width)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path.name} is not a whole GGUF file", where=str(path), why=why, do="download or copy it again"
    )

"""The header of a safetensors file, checked against the file before anything is loaded from it.

Format: 8 bytes little-endian length ``n``, ``n`` bytes of JSON (name -> dtype, shape, data_offsets), then the
data without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from servelab.plugins.executors.checkpoint.errors import ModelError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Element types of weights we read."""
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_LFS = b"version "


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header states it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a file by name.

    Raises:
        ModelError: the file is cut short, is damaged, or is not in this format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _LFS:
            raise _damaged(path, "it is a pointer of git-lfs, not the file itself", "run: git lfs pull")
        if len(start) < 8:
            raise _damaged(path, f"it has {size} bytes, not even a header's length")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MAX_HEADER):
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        header = _json(file, length, path)
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int]] = []
    for name, item in header.items():
        try:
            dtype, shape = item["dtype"], tuple(int(n) for n in item["shape"])
            begin, end = (int(n) for n in item["data_offsets"])
        except (KeyError, TypeError, ValueError) as exc:
            raise _damaged(path, f"its header describes {name!r} as {item!r}") from exc
        item_bytes = ITEM_BYTES.get(dtype) or _OTHER_BYTES.get(dtype)
        if min((*shape, 0)) < 0 or (item_bytes and end - begin != prod(shape) * item_bytes):
            raise _damaged(path, f"{name!r} of {dtype} {list(shape)} lies in bytes {begin} to {end}")
        entries[name] = Entry(dtype, shape)
        spans.append((begin, end))
    data = _gapless(spans, path)
    if (expected := 8 + length + data) != size:
        raise _damaged(path, f"its header describes {expected} bytes, the file has {size}")
    return entries


def header_bytes(tensors: Iterable[tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The start of a file whose data are these tensors in float32, in this order: length and JSON."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, shape in tensors:
        end = offset + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _json(file: BinaryIO, length: int, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(file.read(length))
    except ValueError as exc:
        raise _damaged(path, "its header is not JSON") from exc
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _gapless(spans: list[tuple[int, int]], path: Path) -> int:
    at = 0
    for begin, end in sorted(spans):
        if begin != at or end < begin:
            raise _damaged(path, f"its header leaves a gap or an overlap at byte {at} of the data")
        at = end
    return at


def _damaged(path: Path, why: str, do: str = "") -> ModelError:
    return ModelError(
        f"{path.name} is not a whole safetensors file",
        where=str(path),
        why=why,
        do=do or "download or copy it again",
    )

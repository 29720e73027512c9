"""Token ids of prompts that are made when somebody reads them: a simulator never does."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from random import Random
from typing import overload


class DrawnIds(Sequence[int]):
    """``length`` token ids, uniform over ``[0, vocab)``; equal keys give equal ids."""

    __slots__ = ("_ids", "key", "length", "vocab")

    def __init__(self, key: str, length: int, vocab: int) -> None:
        self.key, self.length, self.vocab = key, length, vocab
        self._ids: array[int] | None = None

    def _made(self) -> array[int]:
        if self._ids is None:
            self._ids = uniform_ids(self.length, self.vocab, Random(self.key))
        return self._ids

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        return self._made()[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DrawnIds) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"DrawnIds({self.key!r}, {self.length}, {self.vocab})"

    def __reduce__(self) -> tuple[type[DrawnIds], tuple[str, int, int]]:
        return DrawnIds, self._identity()  # made anew where it is read

    def _identity(self) -> tuple[str, int, int]:
        return self.key, self.length, self.vocab


def uniform_ids(n: int, vocab: int, rng: Random) -> array[int]:
    """``n`` token ids, uniform over ``[0, vocab)`` up to one part in ``2**32 / vocab``."""
    return array("I", [x * vocab >> 32 for x in struct.unpack(f"<{n}I", rng.randbytes(4 * n))])

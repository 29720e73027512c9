"""Token ids of prompts that are made when somebody reads them: a simulator never does."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, overload


class MadeWhenRead(Sequence[int]):
    """Token ids that follow from what the constructor is given; equal values are equal ids."""

    __slots__ = ("_given", "_ids", "_length")

    def __init__(self, length: int, given: tuple[Any, ...]) -> None:
        self._length, self._given = length, given
        self._ids: array[int] | None = None

    def make(self) -> array[int]:
        """All of them."""
        raise NotImplementedError  # abstract

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        return self._made()[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._made())  # the inherited one asks for each by its place

    def _made(self) -> array[int]:
        if self._ids is None:
            self._ids = self.make()
        return self._ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MadeWhenRead):
            return NotImplemented
        return (type(self), self._given) == (type(other), other._given)

    def __hash__(self) -> int:
        return hash(self._given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._given}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # made anew where it is read


class DrawnIds(MadeWhenRead):
    """``length`` ids, uniform over ``[0, vocab)``; equal keys give equal ids."""

    __slots__ = ()

    def __init__(self, key: str, length: int, vocab: int) -> None:
        super().__init__(length, (key, length, vocab))

    def make(self) -> array[int]:
        key, length, vocab = self._given
        return uniform_ids(length, vocab, Random(key))

    def first(self, length: int) -> DrawnIds:
        """The beginning of them, as little made as they are."""
        key, _, vocab = self._given
        return DrawnIds(key, length, vocab)


class BlockIds(MadeWhenRead):
    """``length`` ids made of blocks: blocks of equal hash are equal tokens, uniform over ``[0, vocab)``; the
    last block may be cut.
    """

    __slots__ = ()

    def __init__(self, key: str, hashes: tuple[int, ...], block_tokens: int, length: int, vocab: int) -> None:
        super().__init__(length, (key, hashes, block_tokens, length, vocab))

    def make(self) -> array[int]:
        key, hashes, block_tokens, length, vocab = self._given
        ids = array("I")
        for one in hashes:
            ids.extend(uniform_ids(block_tokens, vocab, Random(f"{key}/{one}")))
        return ids[:length]


def uniform_ids(n: int, vocab: int, rng: Random) -> array[int]:
    """``n`` token ids, uniform over ``[0, vocab)`` up to one part in ``2**32 / vocab``."""
    return array("I", [x * vocab >> 32 for x in struct.unpack(f"<{n}I", rng.randbytes(4 * n))])

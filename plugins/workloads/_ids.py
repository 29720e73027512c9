"""Token ids of prompts that are made when somebody reads them: a simulator never does."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, overload


class MadeWhenRead(Sequence[int]):
    """Token ids that follow from a few values, ``recipe``; equal recipes are equal ids."""

    __slots__ = ("_ids", "length", "recipe")

    def __init__(self, length: int, *recipe: Any) -> None:
        self.length, self.recipe = length, recipe
        self._ids: array[int] | None = None

    def make(self) -> array[int]:
        """All ``length`` of them."""
        raise NotImplementedError  # abstract

    def __len__(self) -> int:
        return self.length

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
        if type(other) is not type(self):
            return NotImplemented
        return (self.length, self.recipe) == (other.length, other.recipe)

    def __hash__(self) -> int:
        return hash((self.length, self.recipe))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, (self.length, *self.recipe)))})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.length, *self.recipe)  # made anew where it is read


class DrawnIds(MadeWhenRead):
    """``DrawnIds(length, key, vocab)``: uniform over ``[0, vocab)``."""

    __slots__ = ()

    def make(self) -> array[int]:
        key, vocab = self.recipe
        return uniform_ids(self.length, vocab, Random(key))


class BlockIds(MadeWhenRead):
    """``BlockIds(length, key, hashes, block_tokens, vocab)``: blocks of equal hash are equal tokens, uniform
    over ``[0, vocab)``; the last block may be cut.
    """

    __slots__ = ()

    def make(self) -> array[int]:
        key, hashes, block_tokens, vocab = self.recipe
        ids = array("I")
        for one in hashes:
            ids.extend(uniform_ids(block_tokens, vocab, Random(f"{key}/{one}")))
        return ids[: self.length]


def uniform_ids(n: int, vocab: int, rng: Random) -> array[int]:
    """``n`` token ids, uniform over ``[0, vocab)`` up to one part in ``2**32 / vocab``."""
    return array("I", [x * vocab >> 32 for x in struct.unpack(f"<{n}I", rng.randbytes(4 * n))])

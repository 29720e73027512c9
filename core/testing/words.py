"""A tokenizer small enough to read: a token is a word with the white space before it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BOS, USER, SYSTEM, ASSISTANT = range(4)


class Words:
    """Lossless: ids are given out in the order in which words are met. Every text begins with ``BOS``."""

    vocab_size = 1_000_000
    stop_ids = frozenset({ASSISTANT})

    def __init__(self) -> None:
        self.words = ["", "<user>", "<system>", "<assistant>"]
        self.ids: dict[str, int] = {}
        self.chats: list[list[dict[str, str]]] = []

    def encode(self, text: str) -> list[int]:
        return [BOS, *map(self._id, re.findall(r"\s*\S+|\s+$", text))]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        self.chats.append([dict(message) for message in messages])
        marks = {"user": USER, "system": SYSTEM}
        turns = [[marks[m["role"]], *self.encode(m["content"])[1:]] for m in messages]
        return [BOS, *(i for turn in turns for i in turn), ASSISTANT]

    def _id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = len(self.words)
            self.words.append(word)
        return self.ids[word]

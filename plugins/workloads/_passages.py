"""Passages of a wanted length, cut from texts where a reader would cut them.

A text is a row of units: sentences of its prose, and whole paragraphs where lines are indented (code, lists,
tables). A passage is a run of units of one text; its length is counted in tokens, once per unit, so that
cutting costs no tokenizing. White space belongs to the unit after it, as GPT-2 style tokenizers have it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from random import Random
from typing import NamedTuple

from servelab.core.corpus import Topic, paragraphs

TRIES = 16
"""Beginnings that are looked at for each passage; the one whose length comes nearest is taken."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“*(])")


class Passage(NamedTuple):
    """A run of units of one text."""

    topic: str
    """Name of the text."""
    text: str
    """Without white space around it, but with the indentation of its first line."""
    tokens: int
    """Its length as the units count it; joined text may take a few tokens less."""


class Passages:
    """Draws passages.

    Args:
        topics: where they come from; every passage lies within one.
        count: tokens of a text.
    """

    def __init__(self, topics: tuple[Topic, ...], count: Callable[[str], int]) -> None:
        self._texts: list[_Text] = [_Text(topic, count) for topic in topics]
        self._starts = [(text, i) for text in self._texts for i in range(len(text.spans))]

    @property
    def longest(self) -> int:
        """Tokens of the longest passage there is."""
        return max((text.ends[-1] for text in self._texts if text.spans), default=0)

    def draw(self, tokens: int, rng: Random) -> Iterator[Passage]:
        """Passages of about so many tokens: some chosen by chance, the nearest in length first; then, from
        a place chosen by chance, one for each beginning that there is.
        """
        picked = [self._starts[rng.randrange(len(self._starts))] for _ in range(TRIES)]
        yield from sorted(
            (text.passage(i, tokens) for text, i in picked),
            key=lambda passage: abs(passage.tokens - tokens),
        )
        first = rng.randrange(len(self._starts))
        for text, i in self._starts[first:] + self._starts[:first]:
            yield text.passage(i, tokens)


class _Text:
    def __init__(self, topic: Topic, count: Callable[[str], int]) -> None:
        self.name, self.text = topic
        self.spans = list(units(topic.text))
        befores = [0, *(end for _, end in self.spans)]
        sizes = (count(self.text[a:end]) for a, (_, end) in zip(befores, self.spans, strict=False))
        self.ends = list(accumulate(sizes))
        """Tokens from the beginning of the text to the end of each unit."""

    def passage(self, first: int, tokens: int) -> Passage:
        """The run of units from ``first`` whose length is nearest; the shorter one of two."""
        before = self.ends[first - 1] if first else 0
        last = min(bisect_left(self.ends, before + tokens, lo=first), len(self.ends) - 1)
        if last > first and before + tokens - self.ends[last - 1] <= self.ends[last] - before - tokens:
            last -= 1
        text = self.text[self.spans[first][0] : self.spans[last][1]]
        return Passage(self.name, text, self.ends[last] - before)


def units(text: str) -> Iterator[tuple[int, int]]:
    """Where the units of a text begin and end, in order; between them is white space only."""
    at = 0
    for paragraph in paragraphs(text):
        start = text.index(paragraph, at)
        at = start + len(paragraph)
        prose = not any(line[:1] in " +|*" for line in paragraph.splitlines())
        begin = start
        for gap in _SENTENCE.finditer(text, start, at) if prose else ():
            yield begin, gap.start()
            begin = gap.end()
        yield begin, begin + len(text[begin:at].rstrip())

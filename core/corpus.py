"""Text that every machine has: the help topics of Python itself, in three parts that share no text.

Workloads, calibration of quantizers and measurements of quality draw on different parts, so that nothing is
measured on what it was fitted to. The source is ``pydoc_data.topics`` of the standard library, English prose
with code; it differs between versions of Python, so reports should name the version and a digest.

How it is split:
    1. A paragraph is *long* from 40 characters on, white space collapsed. Topics are read from the longest to
       the shortest (by name among equals). One of whose long paragraphs half or more stood in earlier ones
       is an excerpt and left out; of the others, the long paragraphs that stood earlier are left out.
    2. Each topic left goes to one part by the BLAKE2b hash of its name: two quarters ``prompt``, one
       ``calibration``, one ``evaluation``. Neither order nor the presence of other topics matters.

Raises of every function:
    ConfigError: this Python comes without the topics, or there is no such part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import blake2b, sha256
from typing import NamedTuple

from servelab.core.errors import ConfigError, nearest

PARTS = ("prompt", "calibration", "evaluation")
"""Names of the parts."""

QUARTERS = ("prompt", "prompt", "calibration", "evaluation")
"""Part of a topic by the last two bits of its hash."""

SALT = "16"
"""Goes before a topic's name into the hash; the first number whose parts of Python 3.11 have their stated
shares in topics and in characters, each within 5 points."""

LONG = 40
"""Characters from which a paragraph counts as text of its own; shorter ones are headings and examples."""

_BLANK = re.compile(r"\n[ \t]*\n+")


class Topic(NamedTuple):
    """One help text."""

    name: str
    """Its name in ``help()``, such as ``while``."""
    text: str
    """Paragraphs with an empty line between them; code and tables are indented or framed."""


def part(name: str) -> tuple[Topic, ...]:
    """The topics of one part, in the order of their names."""
    _check(name, PARTS)
    return tuple(topic for topic in _distinct() if part_of(topic.name) == name)


def digest(name: str) -> str:
    """SHA-256 in hexadecimal of one part, or of the source before any split (``whole``).

    It covers names and texts in the order of the names, each in UTF-8 and followed by a zero byte.
    """
    _check(name, (*PARTS, "whole"))
    topics = sorted(_source().items()) if name == "whole" else part(name)
    return sha256("".join(f"{title}\0{text}\0" for title, text in topics).encode()).hexdigest()


def part_of(topic: str) -> str:
    """The part that a topic of this name belongs to, whether or not there is one."""
    return QUARTERS[blake2b(f"{SALT}/{topic}".encode(), digest_size=8).digest()[-1] % 4]


def paragraphs(text: str) -> list[str]:
    """A text at its empty lines."""
    return [paragraph for paragraph in _BLANK.split(text.strip("\n")) if paragraph.strip()]


def distinct(topics: Mapping[str, str]) -> tuple[Topic, ...]:
    """Step 1 of the split: topics in which every long paragraph stands once, in the order of their names."""
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        stood = {p: collapsed(p) in seen for p in paragraphs(topics[name])}
        long = {p for p in stood if len(collapsed(p)) >= LONG}
        if 2 * sum(stood[p] for p in long) >= max(len(long), 1):
            continue
        text: list[str] = []
        for paragraph in paragraphs(topics[name]):
            key = collapsed(paragraph)
            if len(key) < LONG or key not in seen:
                text.append(paragraph)
            if len(key) >= LONG:
                seen.add(key)
        kept.append(Topic(name, "\n\n".join(text)))
    return tuple(sorted(kept))


def collapsed(text: str) -> str:
    """The text with each run of white space as one space."""
    return " ".join(text.split())


@cache
def _distinct() -> tuple[Topic, ...]:
    return distinct(_source())


@cache
def _source() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError(
            "this Python comes without its help topics",
            where="module pydoc_data.topics of the standard library",
            why=str(error),
            do="install the full standard library, or choose a workload or task that needs no text",
        ) from error
    found: dict[str, str] = topics
    return found


def _check(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(
            f"the corpus has no part {name!r}",
            where="servelab.core.corpus",
            do=nearest(name, known),
        )

"""Reasons that differ in numbers only, told as one: ``out of KV pages: 0 to 5 free`` (38 plans)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)")
"""A number that stands alone: not the 12 of r12."""


@dataclass(slots=True)
class Reason:
    """One sort of answer that plans gave to a waiting request."""

    parts: list[str]
    """The text around its numbers."""
    numbers: list[tuple[str, str]]
    """Least and greatest of each."""
    own: bool
    """Said of this request; False: of others, while this one was not named."""
    plans: int = 0
    ns: int = 0
    """How long these answers stood: each until the next plan."""
    others: Counter[str] = field(default_factory=Counter)
    """Plans by the other request that was named."""

    @property
    def text(self) -> str:
        """The reason with ranges in place of numbers that varied."""
        shown = [low if low == high else f"{low} to {high}" for low, high in self.numbers]
        return "".join(part + number for part, number in zip(self.parts, [*shown, ""], strict=True))


class Reasons:
    """What plans said while a request waited; an answer stands until the next one."""

    def __init__(self) -> None:
        self._found: dict[tuple[bool, tuple[str, ...]], Reason] = {}
        self._standing: Reason | None = None
        self._since_ns = 0
        self.unanswered_ns = 0
        """Before the first plan."""

    def begin(self, t_ns: int) -> None:
        """The wait began."""
        self._since_ns = t_ns

    def say(self, t_ns: int, text: str, *, own: bool, other: str = "") -> None:
        """A plan of this time gave this reason; empty: it passed over nobody."""
        self.close(t_ns)
        numbers = NUMBER.findall(text)
        parts = NUMBER.split(text)
        key = own, tuple(parts)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = Reason(parts, [(n, n) for n in numbers], own)
        else:
            found.numbers = [
                (min(low, n, key=float), max(high, n, key=float))
                for (low, high), n in zip(found.numbers, numbers, strict=True)
            ]
        found.plans += 1
        if other:
            found.others[other] += 1
        self._standing = found

    def close(self, t_ns: int) -> None:
        """The answer that stood stood until now."""
        passed, self._since_ns = t_ns - self._since_ns, t_ns
        if self._standing is None:
            self.unanswered_ns += passed
        else:
            self._standing.ns += passed

    def __iter__(self) -> Iterator[Reason]:
        """The longest first."""
        return iter(sorted(self._found.values(), key=lambda reason: (-reason.ns, -reason.plans)))

    @property
    def plans(self) -> int:
        """Plans that answered."""
        return sum(reason.plans for reason in self._found.values())

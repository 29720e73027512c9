"""What tests draw: as many as they state, or others and more, to explore."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import settings

_first_seed = 0
_times = 1.0


def explore(first_seed: int, times: float) -> None:
    """Called before tests are collected."""
    global _first_seed, _times
    _first_seed, _times = first_seed, times


def seeds(n: int) -> range:
    """0 to n - 1; others, and more, where draws are to be new."""
    return range(_first_seed, _first_seed + max(1, round(n * _times)))


def multiply_examples(tests: Iterable[Any]) -> None:
    """Also of tests that state a number: hypothesis lets that go before the profile's."""
    for test in {id(f): f for f in (getattr(test, "__func__", test) for test in tests)}.values():
        stated = getattr(test, "_hypothesis_internal_use_settings", None)
        if stated is not None and _times != 1:
            test._hypothesis_internal_use_settings = settings(
                stated, max_examples=max(1, round(stated.max_examples * _times))
            )

"""What a plugin's factory is given besides its own settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.request import Truth

Oracle = Callable[[str], Truth]
"""True outcome of a request by id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Second argument of every factory: ``factory(config, context)``."""

    kind: str
    name: str
    rng: random.Random
    """The plugin's own generator, seeded by the run's seed, its kind and its name: its only chance."""
    model: ModelFacts
    hardware: HardwareFacts | None
    limits: Limits
    oracle: Oracle | None = None
    """Given to executors and to plugins whose spec says ``oracle=True``; None otherwise."""
    run_dir: Path | None = None
    """Where observers and tasks write; None when nothing may be written."""


def seeded(seed: int, kind: str, name: str) -> random.Random:
    """A generator of one plugin's own, stable across Python versions and processes."""
    return random.Random(f"{seed}/{kind}/{name}")

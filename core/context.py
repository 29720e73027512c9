"""What a plugin's factory is given besides its own settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from servelab.core.errors import PluginError
from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.request import Truth

if TYPE_CHECKING:
    from servelab.core.config import Choice, ModelConfig
    from servelab.core.families.kernel import AttentionBackend
    from servelab.core.families.quant import Quantizer
    from servelab.core.layout import KVLayout
    from servelab.core.text import Tokenizer

Oracle = Callable[[str], Truth]
"""True outcome of a request by id."""


class BuildPart(Protocol):
    """Builds a plugin that is chosen within the settings of another."""

    def __call__(self, kind: str, choice: Choice, key: str = "") -> Any:
        """The plugin.

        Args:
            kind: of the plugin.
            choice: a setting marked ``PartOf(kind)`` (``servelab.core.config``).
            key: tells equal parts of one plugin apart. Without a key, a part has the chance that it would
                have as a plugin of the run.

        Raises:
            PluginError: the setting is not marked, or the part's factory failed.
        """
        ...


def no_parts(kind: str, choice: Choice, key: str = "") -> Any:
    """``Context.part`` of a context that was made by hand."""
    raise PluginError(
        f"{kind} {choice.name!r} cannot be built here",
        why="this context was made without a builder of parts",
        do="compose the run, or give Context(part=...)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Second argument of every factory: ``factory(config, context)``."""

    kind: str
    """The plugin's kind."""
    name: str
    """The plugin's name."""
    rng: random.Random
    """The plugin's own generator, seeded by the run's seed, its kind and its name: its only chance."""
    model: ModelFacts
    """The model's shape."""
    hardware: HardwareFacts | None
    """Peak figures of the device; None: not stated."""
    limits: Limits
    """What the device takes."""
    oracle: Oracle | None = None
    """Given to executors and to plugins whose spec says ``oracle=True``; None otherwise."""
    checkpoint: ModelConfig | None = None
    """Given to executors: the whole ``model`` section, with where the weights are."""
    kernel: AttentionBackend | None = None
    """Given to executors and cost models: the selected backend, which has accepted the layout."""
    quant: Quantizer | None = None
    """Given to executors and cost models: the selected quantizer, whose formats have been checked; None:
    unquantized."""
    layout: KVLayout | None = None
    """How KV memory is divided, given to what is built after the kvcache and the kernel."""
    instance: int = 0
    """Which of several instances it is built for."""
    seed: int = 0
    """The run's seed, for chance that must not depend on order (a request's own draws)."""
    tokenizer: Tokenizer | None = None
    """The executor's, given to what is built after it (workload, cost, scheduler, observers, task)."""
    run_dir: Path | None = None
    """Where observers and tasks write; None when nothing may be written."""
    sweep: bool = False
    """The run is one of many: what takes long and can be made later from its files is left for later."""
    part: BuildPart = no_parts
    """Builds the plugins that are chosen within the plugin's settings."""


def seeded(seed: int, kind: str, name: str) -> random.Random:
    """A generator of one plugin's own, stable across Python versions and processes."""
    return random.Random(f"{seed}/{kind}/{name}")

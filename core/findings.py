"""What an examination of this machine found: one line of ``servelab doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from servelab.core.config import ModelConfig

State = Literal["ok", "warn", "fail"]
"""It works; it works with a limit that the user should know; it does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What: a few words."""
    state: State
    about: str
    """What was found: one sentence, with figures."""
    do: str = ""
    """What the user can do; not empty unless the state is ``ok``."""


class Diagnose(Protocol):
    """What ``PluginSpec.diagnose`` names."""

    def __call__(self, model: ModelConfig, online: bool) -> Iterable[Finding]:
        """Look at what the plugin needs of this machine; change nothing, download nothing.

        Args:
            model: the model of the default run.
            online: whether the network may be asked.
        """
        ...


def shown(path: Path) -> str:
    """A path as its owner would write it."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)

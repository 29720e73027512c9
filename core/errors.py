"""Every error a user can see. Each has four parts: what failed, where, why, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

INSTALL = 'pip install -c constraints.txt -e ".[run]"'
"""In the checkout, installs everything a run of a real model imports."""


class ServeLabError(Exception):
    """Base of all errors shown to users without a traceback.

    Args:
        what: what failed, one sentence.
        where: plugin, family, hook, step, request, file or configuration path.
        why: the value met and the limit or rule it broke.
        do: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        self.what, self.where, self.why, self.do = what, where, why, do
        parts = [("where", where), ("why", why), ("do", do)]
        super().__init__("\n".join([what, *(f"  {name + ':':<6} {text}" for name, text in parts if text)]))

    @property
    def in_short(self) -> str:
        """What, where and why in one line, for an error that comes of this one."""
        return "; ".join(part for part in (self.what, self.where, self.why) if part)


class ConfigError(ServeLabError):
    """The configuration is wrong: a name, a field, a type or a bound."""


class CapabilityError(ServeLabError):
    """Parts that are each fine cannot work together, or one lacks what another needs."""


class PluginError(ServeLabError):
    """A plugin is missing, broken, or misbehaved."""


class PluginLoadError(PluginError):
    """A plugin that was asked for by name could not be loaded."""


class ApiVersionError(PluginError):
    """A plugin was written for another version of the hook API."""


class PluginCallError(PluginError):
    """A plugin raised while the engine was calling it; the original exception is chained."""


class PlanError(PluginError):
    """A scheduler returned a plan the core cannot execute. The core never repairs a plan."""


class ViewError(PluginError):
    """A plugin wrote to a view, or used one outside the call it was given to."""


class LedgerError(PluginError):
    """KV pages would be lost, double-booked or used after release."""


class WorkloadError(ServeLabError):
    """A workload produced requests that cannot be served as stated."""


class LogError(ServeLabError):
    """A log that is damaged, incomplete at its beginning, or contradicts itself."""


class StallError(ServeLabError):
    """Requests are waiting, nothing is in flight, and nothing will ever change: timers are left at most."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that helps after an unknown name: the nearest known names and the full list."""
    names = sorted(known)
    close = _close(name, names)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}known: {', '.join(names) if names else '(none)'}"


def _close(name: str, names: list[str]) -> list[str]:
    """The names that begin with what was given (at most three), else the most similar one; capitals and
    punctuation count for nothing, nor does an owner in front (``meta-llama/Llama-2-7b-hf``)."""
    wanted, plain = _plain(name.rpartition("/")[2]), {_plain(one): one for one in names}
    begin = [one for one in plain if len(wanted) > 1 and one.startswith(wanted)]
    close = get_close_matches(wanted, begin, n=3, cutoff=0) or get_close_matches(wanted, plain, n=1)
    return [plain[one] for one in (close[:1] if wanted in plain else close)]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()

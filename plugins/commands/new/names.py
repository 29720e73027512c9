"""Names of a new package, all derived from the plugin's, and refused before anything is written."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points

from servelab.core.errors import PluginError, nearest
from servelab.core.families import KINDS
from servelab.core.registry import CONFIG_GROUP, GROUP, Registry
from servelab.plugins.commands.new.kinds import OFFERS

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PREFIX = "servelab_"


@dataclass(frozen=True, slots=True)
class Names:
    """What things are called in a new package."""

    kind: str
    name: str
    """Of the plugin: ``+scheduler=NAME``."""
    package: str
    """Imported as."""

    @property
    def distribution(self) -> str:
        """Installed as."""
        return self.package.replace("_", "-")

    @property
    def entry(self) -> str:
        """Both entry points; left out of a run with ``-p no:ENTRY``."""
        return self.package.removeprefix(_PREFIX) or self.package

    @property
    def cls(self) -> str:
        return "".join(part.capitalize() for part in self.name.split("_") if part)


def checked_names(kind: str, name: str, package: str | None, registry: Registry) -> Names:
    """The names, if a package of these can be made and installed here.

    Args:
        kind: as the user gave it.
        name: likewise.
        package: likewise; None: ``servelab_NAME``.
        registry: whose plugins' names are taken.

    Raises:
        PluginError: the first thing that is wrong.
    """
    if kind not in OFFERS:
        known = (
            f"; {kind!r} is a kind of plugin, but none can be made from a template" if kind in KINDS else ""
        )
        raise PluginError(
            f"servelab new makes no {kind!r}{known}", where="command line: KIND", do=nearest(kind, OFFERS)
        )
    _check_identifier("NAME", name, f"servelab new {kind}")
    names = Names(kind, name, package or f"{_PREFIX}{name}")
    if package is not None:
        _check_identifier("--package", package, f"servelab new {kind} {name} --package")
    if name == "none":
        raise PluginError(
            "a plugin cannot be called 'none'",
            where="command line: NAME",
            why="'none' means no plugin",
            do="choose another name",
        )
    if name in registry.names(kind):
        raise PluginError(
            f"{kind} {name!r} exists already",
            where="command line: NAME",
            why=f"it is provided by {registry.provider(kind, name)}; the first to take a name keeps it",
            do=f"choose a name that is free, such as {_free(name, registry.names(kind))!r}; taken: "
            f"{', '.join(registry.names(kind))}",
        )
    _check_package(names)
    return names


def _check_identifier(what: str, given: str, command: str) -> None:
    if _NAME.fullmatch(given) and not keyword.iskeyword(given):
        return
    better = re.sub(r"\W+", "_", given.lower()).strip("_")
    if not _NAME.fullmatch(better) or keyword.iskeyword(better):
        better = f"my_{better}".rstrip("_")
    raise PluginError(
        f"{given!r} cannot be {'the name of a plugin' if what == 'NAME' else 'the name of a package'}",
        where=f"command line: {what}",
        why="it becomes the name of a Python module: lower-case letters, digits and '_', beginning with a "
        "letter, and no keyword",
        do=f"{command} {better}",
    )


def _check_package(names: Names) -> None:
    """Neither hides another module, nor loses its entry point to another package."""
    package = names.package
    other = f"choose another: servelab new {names.kind} {names.name} --package {package}_{names.kind}"
    if importlib.util.find_spec(package) is not None:
        raise PluginError(
            f"there is a module {package!r} already",
            where="command line: --package",
            why="a package of this name would hide it, or be hidden by it",
            do=other,
        )
    for group in (GROUP, CONFIG_GROUP):
        if names.entry in {entry.name for entry in entry_points(group=group)}:
            raise PluginError(
                f"a plugin package {names.entry!r} is installed already",
                where=f"entry points of group {group}",
                why="of two packages with one name only the first is loaded",
                do=other,
            )


def _free(name: str, taken: Iterable[str]) -> str:
    """The nearest name that nobody has."""
    names = set(taken)
    tried = [f"my_{name}", *(f"{name}_{n}" for n in range(2, len(names) + 3))]
    return next(one for one in tried if one not in names)

"""Which plugins there are: in-tree tables and strangers' packages, loaded without importing any technique.

A package that cannot be loaded is set aside with the reason, and nothing else stops; only asking for one
of its plugins by name is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn, cast

import pluggy

from servelab.core import __version__
from servelab.core.commands import Command, Main, check_command, check_table
from servelab.core.errors import (
    INSTALL,
    ApiVersionError,
    ConfigError,
    PluginError,
    PluginLoadError,
    nearest,
)
from servelab.core.families import KINDS
from servelab.core.hookspecs import PROJECT, Commands, Events, Registration
from servelab.core.spec import PluginSpec
from servelab.core.spec_check import WrongApi, check_spec

GROUP = "servelab"
"""Entry points whose value is a module with registration hooks."""
CONFIG_GROUP = "servelab.configs"
"""Entry points whose value is a package of Hydra YAML; the files are read, the package holds no code."""
BLOCK_ENV = "SERVELAB_BLOCK"
"""Comma-separated names to leave out, set by ``-p no:NAME``; in the environment so that workers see it.

``-p`` refuses names that no package has; here they are ignored, as one setting may serve several machines."""

WITHOUT_MODEL = "python run.py +experiment=scripted"
"""The run that needs nothing but the base dependencies."""

IN_TREE = "servelab."
"""In-tree families are packages of this prefix and their folder."""

FOLDERS = sorted({kind.folder for kind in KINDS.values()} | {"commands"})
"""Folders of in-tree tables."""

HOOKS = {kind.hook: kind.name for kind in KINDS.values()}
COMMANDS_HOOK = "servelab_commands"
EVENT_HOOKS = frozenset(name for name in vars(Events) if name.startswith("servelab_"))


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a plugin comes from."""

    package: str
    """Name it is registered and blocked by: its entry point, or the in-tree family folder."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True, slots=True)
class Broken:
    """A package, or one plugin of it, that was set aside."""

    package: str
    provider: Provider | None
    reason: str
    do: str = ""
    kind: str = ""
    """With ``name``: the one plugin concerned; empty: the whole package."""
    name: str = ""
    api: bool = False
    """Refused because it was written for another hook API."""

    def __str__(self) -> str:
        whose = f" ({self.provider})" if self.provider else ""
        which = f" {self.kind} {self.name!r}:" if self.name else ""
        advice = f"; {self.do}" if self.do else ""
        return f"{self.package}{whose}:{which} {self.reason}{advice}"


@dataclass(frozen=True, slots=True)
class ConfigPackage:
    """A stranger's package of YAML on the configuration search path."""

    name: str
    provider: Provider
    package: str
    problem: str | None
    """Why it cannot be read; None if it can."""


def selection(kind: str, name: str) -> str:
    """How a plugin is chosen on the command line."""
    if kind == "observer":
        return f"observers=[{name}]"
    return f"{'+' if KINDS[kind].technique else ''}{kind}={name}"


def blocked_names() -> frozenset[str]:
    """Packages left out of this process and its workers."""
    return frozenset(filter(None, os.environ.get(BLOCK_ENV, "").split(",")))


def check_blocks(names: Iterable[str]) -> None:
    """Refuse to leave out what is not there.

    Raises:
        ConfigError: no plugin package has one of these names.
    """
    known = {f"{IN_TREE}{folder}" for folder in FOLDERS}
    known |= {entry.name for group in (GROUP, CONFIG_GROUP) for entry in _entry_points(group)}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"there is no plugin package {name!r} to leave out",
                where=f"command line: -p no:{name}",
                do=nearest(name, known),
            )


def config_packages() -> list[ConfigPackage]:
    """All YAML packages that are not blocked, in a fixed order. In-tree ``configs`` is not among them."""
    blocked = blocked_names()
    return [
        ConfigPackage(entry.name, _provider(entry), entry.value, _unreadable(entry.value))
        for entry in _entry_points(CONFIG_GROUP)
        if entry.name not in blocked
    ]


@dataclass
class Registry:
    """Every known plugin by ``(kind, name)``."""

    specs: dict[tuple[str, str], PluginSpec] = field(default_factory=dict)
    providers: dict[tuple[str, str], Provider] = field(default_factory=dict)
    commands: dict[str, Command] = field(default_factory=dict)
    """Declared subcommands by name."""
    command_providers: dict[str, Provider] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    blocked: list[Provider] = field(default_factory=list)
    """Installed packages and in-tree families that were left out on request."""
    config_packages: list[ConfigPackage] = field(default_factory=list)
    _objects: dict[tuple[str, str, str], Any] = field(default_factory=dict)

    @classmethod
    def load(cls) -> Registry:
        """In-tree plugins, then installed packages by name; the first to take a name keeps it."""
        registry = cls()
        loader = _Loader(registry)
        for folder in FOLDERS:
            loader.load_in_tree(folder)
        for entry in _entry_points(GROUP):
            loader.load_entry_point(entry)
        registry.config_packages = config_packages()
        for package in registry.config_packages:
            if package.problem:
                registry.broken.append(Broken(package.name, package.provider, package.problem))
        return registry

    def add(
        self,
        kind: str,
        spec: PluginSpec,
        *,
        provider: str = "python",
        factory: Callable[..., Any] | None = None,
        config: type | None = None,
    ) -> None:
        """Register a plugin from Python.

        Args:
            kind: its kind, a name in ``KINDS``.
            spec: its declaration.
            provider: who adds it, for tables and errors.
            factory: the factory itself, instead of the import path in the spec.
            config: the config model itself, likewise.

        Raises:
            PluginError: unknown kind, bad spec, or a name that is taken.
        """
        if kind not in KINDS:
            raise PluginError(f"unknown kind of plugin {kind!r}", where=provider, do=nearest(kind, KINDS))
        who = Provider(provider, provider, "")
        problem = self._register(kind, spec, who)
        if problem:
            raise _refusal(problem)
        if factory is not None:
            self._objects[kind, spec.name, "factory"] = factory
        if config is not None:
            self._objects[kind, spec.name, "config"] = config

    def names(self, kind: str) -> list[str]:
        """Registered names of a kind, sorted."""
        return sorted(name for k, name in self.specs if k == kind)

    def spec(self, kind: str, name: str) -> PluginSpec:
        """The declaration of a plugin.

        Raises:
            PluginLoadError: a package that is broken declares it.
            ApiVersionError: it was written for another hook API.
            PluginError: nobody declares it.
        """
        try:
            return self.specs[kind, name]
        except KeyError:
            self.unknown(kind, name)

    def provider(self, kind: str, name: str) -> Provider:
        """Where a registered plugin comes from."""
        self.spec(kind, name)
        return self.providers[kind, name]

    def unavailable(self, spec: PluginSpec) -> str | None:
        """The reason a plugin cannot run here, or None. Imports nothing unless it has a probe."""
        missing = [module for module in spec.imports if not _installed(module)]
        if missing:
            return f"needs {', '.join(missing)}, not installed"
        if spec.probe is None:
            return None
        try:
            reason = import_target(spec.probe)()
        except (Exception, SystemExit) as exc:
            return f"its probe failed: {_describe(exc)}"
        if reason is None or isinstance(reason, str):
            return reason
        return f"its probe returned {reason!r}, neither a reason nor None"

    def resolve(self, kind: str, name: str, what: str) -> Any:
        """Import a plugin's ``factory`` or ``config`` (None if it takes no settings).

        Raises:
            PluginLoadError: it is disabled here, or the import failed; the cause is chained.
            PluginError: see ``spec``.
        """
        spec = self.spec(kind, name)
        where = f"{kind} {name!r} of {self.providers[kind, name]}"
        if reason := self.unavailable(spec):
            raise PluginLoadError(
                f"{kind} {name!r} is disabled", where=where, why=reason, do=self._remedy(kind, name)
            )
        if (kind, name, what) in self._objects:
            return self._objects[kind, name, what]
        target = getattr(spec, what)
        if target is None:
            return None
        try:
            return import_target(target)
        except (Exception, SystemExit) as exc:
            raise PluginLoadError(
                f"the {what} of {kind} {name!r} could not be loaded",
                where=where,
                why=f"{target}: {_describe(exc)}",
                do="correct the path in its PluginSpec, or reinstall its package",
            ) from exc

    def command(self, name: str) -> Main:
        """Import a subcommand.

        Raises:
            PluginLoadError: its import failed (the cause is chained), or a broken package may have it.
            PluginError: nobody declares it, or it is no function.
        """
        if name not in self.commands:
            for broken in self.broken:
                if (broken.kind, broken.name) == ("command", name):
                    raise _refusal(broken)
            raise self._nobody("command", name, self.commands)
        command, where = self.commands[name], f"command {name!r} of {self.command_providers[name]}"
        try:
            main = import_target(command.target)
        except (Exception, SystemExit) as exc:
            raise PluginLoadError(
                f"command {name!r} could not be loaded",
                where=where,
                why=f"{command.target}: {_describe(exc)}",
                do="correct the path in its table, or reinstall its package",
            ) from exc
        if not callable(main):
            raise PluginError(
                f"command {name!r} cannot be called",
                where=where,
                why=f"{command.target} is {type(main).__name__}, not a function",
                do="correct the path in its table",
            )
        return cast("Main", main)

    def _remedy(self, kind: str, name: str) -> str:
        """What to do about a plugin that is disabled here."""
        ways: list[str] = []
        lacking = any(not _installed(module) for module in self.specs[kind, name].imports)
        if lacking and self.providers[kind, name].distribution == "servelab":
            ways.append(f"in the checkout: {INSTALL}")
        if lacking and kind == "executor":
            ways.append(f"run without a model: {WITHOUT_MODEL}")
        others = [n for n in self.names(kind) if n != name and self.unavailable(self.specs[kind, n]) is None]
        ways.append(f"choose another {kind}: {', '.join(others)}" if others else f"choose no {kind}")
        return "; or ".join(ways)

    def _register(self, kind: str, spec: object, provider: Provider) -> Broken | None:
        """Take a spec in, or say why not."""
        name = str(getattr(spec, "name", spec))
        try:
            checked = check_spec(spec)
        except WrongApi as exc:
            return Broken(provider.package, provider, str(exc), exc.do, kind, name, api=True)
        except TypeError as exc:
            return Broken(provider.package, provider, str(exc), "correct its PluginSpec", kind, name)
        key = (kind, checked.name)
        if key in self.specs:
            return Broken(
                provider.package,
                provider,
                f"the name is already provided by {self.providers[key]}; kept that one",
                f"rename it, or leave the other out with -p no:{self.providers[key].package}",
                kind,
                checked.name,
            )
        self.specs[key] = checked
        self.providers[key] = provider
        return None

    def _register_command(self, name: object, entry: object, provider: Provider) -> Broken | None:
        """Take a line of a table of commands in, or say why not."""
        try:
            command = check_command(name, entry)
        except TypeError as exc:
            return Broken(provider.package, provider, str(exc), "correct its table", "command", str(name))
        if command.name in self.commands:
            return Broken(
                provider.package,
                provider,
                f"the name is already provided by {self.command_providers[command.name]}; kept that one",
                "give the command another name",
                "command",
                command.name,
            )
        self.commands[command.name] = command
        self.command_providers[command.name] = provider
        return None

    def unknown(self, kind: str, name: str, others: Iterable[str] = ()) -> NoReturn:
        """Raise the error about a name that no plugin has, as ``spec`` does.

        Args:
            kind: of plugin.
            name: what was asked for.
            others: names that could have been chosen as well, such as those of configuration files.
        """
        if kind not in KINDS:
            raise PluginError(f"unknown kind of plugin {kind!r}", do=nearest(kind, KINDS))
        for broken in self.broken:
            if (broken.kind, broken.name) == (kind, name):
                raise _refusal(broken)
        raise self._nobody(kind, name, {*self.names(kind), *others})

    def _nobody(self, kind: str, name: str, known: Iterable[str]) -> PluginError:
        """Nobody declares it; names the packages that might have."""
        from servelab.core.help import choices

        do = nearest(name, known)
        if name in choices().get(kind, ()):
            do = (
                f"{name} is a file of settings, which stands for a whole section only ({kind}={name}); here "
                f"name what is in it: python run.py {kind}={name} --cfg job --package {kind}"
            )
        packages = [str(b) for b in self.broken if not b.name]
        error = PluginLoadError if packages else PluginError
        reasons = [f"package not loaded: {p}" for p in packages]
        reasons += [f"package left out by -p no:{who.package} ({who})" for who in self.blocked]
        return error(
            f"unknown {kind} {name!r}",
            why="\n         ".join(reasons),
            do=do,
        )


class _Loader:
    """Fills a registry through pluggy, one package at a time, so that each failure has one owner."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.blocked = blocked_names()
        self.seen: set[str] = set()
        self.pm = pluggy.PluginManager(PROJECT)
        self.pm.add_hookspecs(Registration)
        self.pm.add_hookspecs(Commands)
        self.pm.add_hookspecs(Events)  # known, so that a stranger's event hook gets its own advice

    def load_in_tree(self, folder: str) -> None:
        module = f"servelab.plugins.{folder}"
        if importlib.util.find_spec(module) is None:
            return  # a family without in-tree plugins
        provider = Provider(f"{IN_TREE}{folder}", "servelab", __version__)
        self._load(provider, lambda: importlib.import_module(module))

    def load_entry_point(self, entry: EntryPoint) -> None:
        self._load(_provider(entry), entry.load, source=entry.value)

    def _load(self, provider: Provider, load: Callable[[], object], source: str = "") -> None:
        name = provider.package
        taken = name in self.seen
        self.seen.add(name)
        if name in self.blocked:
            self.registry.blocked.append(provider)
            return
        if taken:
            self._broken(
                provider,
                f"another package is already registered as {name!r}; kept that one",
                "give the entry point another name",
            )
            return
        try:
            module = load()
            self.pm.register(module, name=name)
        except (Exception, SystemExit) as exc:  # one bad package must not stop the program
            self._forget(name)
            self._broken(provider, f"{source + ': ' if source else ''}{_describe(exc)}")
            return
        problem = self._misuse(module)
        if problem:
            self._forget(name)
            self._broken(provider, *problem)
            return
        self._collect(module, provider)

    def _misuse(self, module: object) -> tuple[str, str] | None:
        """What is wrong with the hooks of a registered module, and what to do about it."""
        callers = self.pm.get_hookcallers(module) or []
        if not callers:
            return "it declares no plugin", "mark its registration function with @hookimpl"
        for caller in callers:
            impls = [impl for impl in caller.get_hookimpls() if impl.plugin is module]
            if not caller.has_spec():
                if all(impl.optionalhook for impl in impls):
                    continue
                return f"there is no hook {caller.name!r}", nearest(
                    caller.name, [*HOOKS, COMMANDS_HOOK, *EVENT_HOOKS]
                )
            if caller.name in EVENT_HOOKS:
                return (
                    f"it implements the event hook {caller.name!r}, but installing activates nothing",
                    "put the hook into an observer class, declare it in servelab_observers() and select it "
                    "with observers=[...]",
                )
            if any(impl.wrapper or impl.hookwrapper for impl in impls):
                return (
                    f"its {caller.name!r} is a wrapper, which would change other packages' plugins",
                    "return its own declarations from a plain @hookimpl",
                )
        return None

    def _collect(self, module: object, provider: Provider) -> None:
        for hook, kind in HOOKS.items():
            for impl in getattr(self.pm.hook, hook).get_hookimpls():
                if impl.plugin is module:
                    self._collect_kind(kind, hook, impl.function, provider)
        for impl in getattr(self.pm.hook, COMMANDS_HOOK).get_hookimpls():
            if impl.plugin is module:
                self._collect_commands(impl.function, provider)

    def _collect_kind(
        self, kind: str, hook: str, declare: Callable[[], Iterable[object]], provider: Provider
    ) -> None:
        try:
            found = declare()
            if isinstance(found, (str, bytes, PluginSpec)) or not isinstance(found, Iterable):
                raise TypeError(f"it returned {type(found).__name__}, not an iterable of PluginSpec")
            specs = list(found)
        except (Exception, SystemExit) as exc:
            self._broken(provider, f"{hook}: {_describe(exc)}", f"{hook} must return its PluginSpecs")
            return
        for spec in specs:
            if problem := self.registry._register(kind, spec, provider):
                self.registry.broken.append(problem)

    def _collect_commands(self, declare: Callable[[], object], provider: Provider) -> None:
        try:
            table = dict(check_table(declare()))
        except (Exception, SystemExit) as exc:
            reason = f"{COMMANDS_HOOK}: {_describe(exc)}"
            self._broken(provider, reason, f"{COMMANDS_HOOK} must return its table of commands")
            return
        for name, entry in table.items():
            if problem := self.registry._register_command(name, entry, provider):
                self.registry.broken.append(problem)

    def _forget(self, name: str) -> None:
        if self.pm.has_plugin(name):  # older pluggy leaves a refused plugin half registered
            self.pm.unregister(name=name)

    def _broken(self, provider: Provider, reason: str, do: str = "") -> None:
        self.registry.broken.append(Broken(provider.package, provider, reason, do))


def _refusal(broken: Broken) -> PluginError:
    error = ApiVersionError if broken.api else PluginLoadError
    return error(
        f"{broken.kind} {broken.name!r} cannot be used",
        where=f"plugin package {broken.package} ({broken.provider})",
        why=broken.reason,
        do=broken.do,
    )


def _entry_points(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda e: (e.name, e.dist.name if e.dist else "", e.value))


def _provider(entry: EntryPoint) -> Provider:
    if entry.dist is None:
        return Provider(entry.name, "unknown distribution", "")
    return Provider(entry.name, entry.dist.name, entry.dist.version)


def import_target(target: str) -> Any:
    """What ``"package.module:Attribute"`` names; raises whatever importing it raises."""
    module, _, attributes = target.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _unreadable(package: str) -> str | None:
    """Why a package of YAML cannot be read. Imports its parent packages, as reading it would."""
    try:
        found = importlib.util.find_spec(package)
    except (Exception, SystemExit) as exc:
        return f"config package {package}: {_describe(exc)}"
    if found is None:
        return f"config package {package} does not exist"
    if not found.submodule_search_locations:
        return f"config package {package} is a module, not a folder of YAML files"
    return None


def _describe(exc: BaseException) -> str:
    if isinstance(exc, SystemExit):
        return f"it called sys.exit({exc.code!r})"
    return f"{type(exc).__name__}: {exc}"

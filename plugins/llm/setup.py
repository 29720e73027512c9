"""From the arguments of ``LLM`` to a checked configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, cast

from servelab.core.config import RunConfig, validate
from servelab.core.errors import ConfigError, nearest
from servelab.core.families import KINDS
from servelab.core.given import is_factory, spec_of
from servelab.core.records import RequestFinished
from servelab.core.registry import Registry
from servelab.core.request import Arrival
from servelab.core.spec import PluginSpec

FAMILIES = tuple(kind for kind in KINDS if kind not in ("observer", "workload", "task"))
"""Kinds that ``LLM`` takes as arguments."""
_OURS = ("workload", "task", "clock", "slo", "observers")
"""Sections that an ``LLM`` decides itself."""
_NO_TRAFFIC = PluginSpec(
    name="python",
    factory="servelab.plugins.llm.setup:NoTraffic",
    summary="requests come from Python",
    provides=frozenset({"workload.prompt_ids"}),
)
_hydra = Lock()
"""Hydra's state is global."""


class NoTraffic:
    """A workload without requests of its own: everything comes through the mailbox."""

    def __init__(self, config: None = None, context: object = None) -> None:
        pass

    def arrivals(self) -> Iterator[Arrival]:
        return iter(())

    def react(self, finished: RequestFinished) -> Iterable[Arrival]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


def configure(
    lines: Sequence[str], plugins: Mapping[str, Any], observers: Sequence[Any], overrides: Sequence[str]
) -> tuple[RunConfig, Registry]:
    """A run without traffic of its own, on the wall clock.

    Args:
        lines: settings, as on the command line.
        plugins: by family: a name, a mapping, or an object; None: the configured one.
        observers: likewise.
        overrides: the caller's own lines; they may set fields of plugins given by argument.

    Raises:
        ServeLabError: an unknown name, a wrong value, something stated twice.
    """
    given = {kind: plugin for kind, plugin in plugins.items() if plugin is not None}
    for kind in plugins:
        if kind not in FAMILIES:
            raise ConfigError(f"LLM takes no argument {kind!r}", do=nearest(kind, FAMILIES))
    for line in overrides:
        _check_override(line, given)
    registry = Registry.load()
    raw = _composed([*lines, *overrides, "clock=wall"])
    for kind, plugin in given.items():
        raw[kind] = _section(kind, plugin, raw.get(kind) or {}, registry)
    if isinstance(observers, str | Mapping):
        raise ConfigError("observers must be a list", where=f"LLM(observers={observers!r:.60})")
    raw["observers"] = [_section("observer", one, {}, registry) for one in observers]
    registry.add("workload", _NO_TRAFFIC, factory=NoTraffic)
    raw["workload"] = _NO_TRAFFIC.name
    return validate(raw, registry), registry


def model_lines(model: str | Path) -> list[str]:
    """Settings that select a model: a configured name, a place on this machine, or one on the hub."""
    from importlib.resources import files

    known = sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("servelab.configs").joinpath("model").iterdir()
        if entry.name.endswith(".yaml") and entry.name not in ("local.yaml", "hub.yaml")
    )
    name, path = str(model), Path(model).expanduser()
    if name in known:
        return [f"model={name}"]
    if isinstance(model, Path) or path.exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return ["model=local", f"model.path={_quoted(str(path))}", f"model.name={_quoted(path.name)}"]
    if name.count("/") == 1:
        return ["model=hub", f"model.repo={_quoted(name)}", f"model.name={_quoted(name)}"]
    raise ConfigError(
        f"unknown model {name!r}",
        where="LLM(model=...)",
        why="it is no configured name, no folder or GGUF file here, and not OWNER/NAME of the hub",
        do=nearest(name, known),
    )


def _quoted(value: str) -> str:
    """A text as Hydra's override grammar takes it literally."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _check_override(line: str, given: Mapping[str, Any]) -> None:
    key = line.partition("=")[0].lstrip("+~")
    if key.partition(".")[0] in _OURS:
        raise ConfigError(
            f"an LLM has its own {key.partition('.')[0]}",
            where=f"overrides: {line}",
            why="requests come from Python, in real time; observers are an argument",
            do="leave it out, or use the command line (`servelab`)",
        )
    kind, _, field = key.partition(".")
    plugin = given.get(kind)
    if kind in given and (not field or (isinstance(plugin, Mapping) and field.partition(".")[0] in plugin)):
        raise ConfigError(
            f"{key} is stated twice",
            where=f"overrides: {line}",
            why=f"it is an argument too: {kind}={plugin!r:.60}",
            do="keep one of them",
        )


def _composed(lines: Sequence[str]) -> dict[str, Any]:
    """The default configuration with overrides, as the command line composes it."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from servelab.core.overrides import check_choices, normalize
    from servelab.core.searchpath import install

    with _hydra:
        state = Singleton.get_state()  # an application may be using Hydra itself
        try:
            install()
            GlobalHydra.instance().clear()
            with initialize_config_module("servelab.configs", version_base="1.3"):
                composed = compose("config", overrides=check_choices(normalize(lines)))
            raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as exc:
            raise ConfigError(str(exc), where="LLM(...)") from exc
        finally:
            Singleton.set_state(state)
    return cast("dict[str, Any]", raw)


def _section(kind: str, plugin: Any, section: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """A section of the configuration. Fields that overrides set stay; objects are registered first."""
    fields = {key: value for key, value in section.items() if key != "name"}
    if isinstance(plugin, str):
        return {**fields, "name": plugin}
    if isinstance(plugin, Mapping):
        return {**({"name": section["name"]} if "name" in section else {}), **plugin, **fields}
    return {**fields, "name": _registered(kind, plugin, registry)}


def _registered(kind: str, plugin: Any, registry: Registry) -> str:
    """Register an object, class or factory; its name."""
    spec, n = spec_of(plugin, "given in Python"), 1
    while (kind, spec.name) in registry.specs:  # a registered one, or another observer of this class
        spec = replace(spec, name=f"{spec.name.partition('.python')[0]}.python{n if n > 1 else ''}")
        n += 1
    registry.add(kind, spec, factory=plugin if is_factory(kind, plugin) else lambda config, context: plugin)
    return spec.name

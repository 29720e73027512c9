"""``servelab show``: one plugin, or one section of settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from servelab.core.errors import PluginError, nearest
from servelab.core.families import KINDS
from servelab.core.registry import Registry, selection
from servelab.core.spec import PluginSpec
from servelab.plugins.commands.plugins import summary

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

SECTIONS = {
    "engine": "EngineConfig",
    "slo": "SLOConfig",
    "model": "ModelConfig",
    "clock": "ClockConfig",
    "cluster": "ClusterConfig",
    "hardware": "HardwareConfig",
    "quality": "QualityConfig",
}
"""Sections of our own and their models in ``core/config``, which only ``show`` imports."""
WIDTH = 100
"""Columns that ``show`` keeps to."""


def main(argv: Sequence[str]) -> None:
    """Print what is known of one plugin or section.

    Raises:
        PluginError: there is none of this name.
    """
    chosen = arguments().parse_args(argv)
    if chosen.kind in SECTIONS:
        _section(chosen.kind, chosen.name, chosen.json)
        return
    if chosen.kind not in KINDS:
        do = nearest(chosen.kind, [*KINDS, *SECTIONS])
        raise PluginError(f"unknown kind of plugin or section {chosen.kind!r}", do=do)
    registry = Registry.load()
    if chosen.name is None:
        raise PluginError(
            f"which {chosen.kind}?",
            where=f"servelab show {chosen.kind} NAME",
            do=nearest("", registry.names(chosen.kind)),
        )
    _show(registry, chosen.kind, chosen.name, chosen.json)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab show",
        description="One plugin: paper, deviations, capabilities, settings; or one section of settings.",
    )
    kinds = f"{', '.join(KINDS)}; or a section: {', '.join(SECTIONS)}"
    parser.add_argument("kind", metavar="KIND", help=kinds)
    parser.add_argument("name", nargs="?", metavar="NAME", help="the plugin; none for a section")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def _section(name: str, extra: str | None, as_json: bool) -> None:
    """One of our own sections, which no plugin owns."""
    from servelab.core import config

    if extra is not None:
        raise PluginError(
            f"{name!r} is a section, not a kind of plugin", where=extra, do=f"servelab show {name}"
        )
    model: type[BaseModel] = getattr(config, SECTIONS[name])
    if as_json:
        print(json.dumps({"section": name, "settings": model.model_json_schema()}, indent=2))
        return
    about = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
    _print_wrapped(f"section {name!r}: {about}", 2)
    print(f"  {'set with:':<12} {name}.{next(iter(model.model_fields))}=...")
    print("\nSettings:")
    _print_fields(model)


def _show(registry: Registry, kind: str, name: str, as_json: bool) -> None:
    spec = registry.spec(kind, name)
    model = registry.resolve(kind, name, "config")
    if as_json:
        about = _spec_dict(spec)
        about["settings"] = model.model_json_schema() if model else None
        print(json.dumps({"kind": kind, **summary(registry, kind, name), **about}, indent=2))
        return
    provider = registry.provider(kind, name)
    print(f"{kind} {name!r}: {spec.summary}" if spec.summary else f"{kind} {name!r}")
    facts = {
        "decides": KINDS[kind].decides,
        "select with": selection(kind, name),
        "source": str(spec.paper),
        "tier": spec.tier,
        "runs": " and ".join(spec.runs),
        "provides": ", ".join(sorted(spec.provides)),
        "requires": ", ".join(sorted(spec.requires)),
        "conflicts": ", ".join(sorted(spec.conflicts)),
        "oracle": "reads true output lengths; every report of such a run is stamped" if spec.oracle else "",
        "imports": ", ".join(spec.imports),
        "from": f"{provider}, {spec.factory}",
    }
    for label, text in facts.items():
        if text:
            _print_wrapped(f"  {label + ':':<12} {text}", 15)
    for number, deviation in enumerate(spec.deviations, 1):
        _print_wrapped(f"  {'deviations:' if number == 1 else '':<12} {number}. {deviation}", 18)
    print("\nSettings" + (":" if model else ": none"))
    if model:
        _print_fields(model)


def _spec_dict(spec: PluginSpec) -> dict[str, Any]:
    values = asdict(spec)
    for key in ("provides", "requires", "conflicts"):
        values[key] = sorted(values[key])
    values["paper"] = str(spec.paper)
    return values


def _print_fields(model: type[BaseModel]) -> None:
    """Per field: name, type with bounds and default; below it what it means."""
    width = max(len(name) for name in model.model_fields) + 2
    for name, field in model.model_fields.items():
        given = "required" if field.is_required() else f"default {default_text(field)}"
        kind = type_text(field)
        _print_wrapped(f"  {name:<{width}}{kind}; {given}", width + 4)
        _print_wrapped(f"  {'':<{width}}{field.description or ''}", width + 2)


def type_text(field: FieldInfo) -> str:
    """Type and bounds of a setting: ``int >= 1 or null``."""
    bounds = [
        f"{sign} {getattr(m, attribute)}"
        for m in field.metadata
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(m, attribute, None) is not None
    ]
    titles = [title for m in field.metadata if isinstance(title := getattr(m, "title", None), str)]
    kind, null, _ = (field.title or (titles or [type_words(field.annotation)])[0]).partition(" or null")
    return " ".join([kind, ", ".join(bounds)]).strip() + null


def default_text(field: FieldInfo) -> str:
    """The default of a setting, as it would be written on the command line."""
    return _plain(field.get_default(call_default_factory=True))


def type_words(annotation: Any) -> str:
    """A type as a reader of the settings wants it, without names of classes."""
    if annotation is None or annotation is type(None):
        return "null"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        titles = [title for one in args[1:] if (title := getattr(one, "title", None))]
        return titles[0] if titles and isinstance(titles[0], str) else type_words(args[0])
    if origin is Literal:
        return " | ".join(map(_plain, args))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(type_words, args)))
    if origin in (tuple, list, set, frozenset, Sequence):
        return f"list of {type_words(args[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {type_words(args[0])} to {type_words(args[1])}"
    if fields := getattr(annotation, "model_fields", None):
        return f"{{{', '.join(fields)}}}"
    return getattr(annotation, "__name__", str(annotation))


def _plain(value: object) -> str:
    """A default as it would be written on the command line."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        value = dump(mode="json")
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _print_wrapped(text: str, indent: int) -> None:
    lead = text[: len(text) - len(text.lstrip())]
    lines = wrap(text.lstrip(), WIDTH - len(lead), break_on_hyphens=False, drop_whitespace=True)
    rest = wrap(" ".join(lines[1:]), WIDTH - indent, break_on_hyphens=False, break_long_words=False)
    for number, line in enumerate([*lines[:1], *rest]):
        print((lead if not number else " " * indent) + line)

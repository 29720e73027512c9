"""``servelab plugins`` and ``servelab show``: what there is, where it comes from, what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from servelab.core.errors import PluginError, nearest
from servelab.core.families import KINDS
from servelab.core.registry import Registry, selection
from servelab.core.spec import Paper, PluginSpec

if TYPE_CHECKING:
    from pydantic import BaseModel


def command(args: Sequence[str]) -> None:
    """Run ``plugins [KIND] [--json]`` or ``show KIND NAME [--json]``.

    Raises:
        PluginError: an unknown kind or plugin.
    """
    parser = argparse.ArgumentParser(prog="servelab")
    commands = parser.add_subparsers(dest="command", required=True)
    plugins = commands.add_parser("plugins", help="all plugins, and packages that could not be loaded")
    plugins.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    show = commands.add_parser("show", help="one plugin: paper, deviations, capabilities, settings")
    show.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    show.add_argument("name", metavar="NAME")
    for one in (plugins, show):
        one.add_argument("--json", action="store_true", help="machine-readable")
    chosen = parser.parse_args(args)
    if chosen.kind is not None and chosen.kind not in KINDS:
        raise PluginError(f"unknown kind of plugin {chosen.kind!r}", do=nearest(chosen.kind, KINDS))
    registry = Registry.load()
    if chosen.command == "plugins":
        _plugins(registry, chosen.kind, chosen.json)
    else:
        _show(registry, chosen.kind, chosen.name, chosen.json)


def _plugins(registry: Registry, only: str | None, as_json: bool) -> None:
    found = [
        {"kind": kind, **_summary(registry, kind, name)}
        for kind in KINDS
        if only in (None, kind)
        for name in registry.names(kind)
    ]
    broken = [
        {
            "package": b.package,
            "provider": str(b.provider) if b.provider else "",
            "kind": b.kind,
            "name": b.name,
            "reason": b.reason,
            "do": b.do,
        }
        for b in registry.broken
    ]
    if as_json:
        configs = [
            {"package": p.package, "name": p.name, "provider": str(p.provider), "problem": p.problem}
            for p in registry.config_packages
        ]
        print(json.dumps({"plugins": found, "broken": broken, "config_packages": configs}, indent=2))
        return
    rows = [
        (
            p["kind"],
            p["name"],
            "+".join(p["runs"]),
            p["tier"],
            p["source"],
            f"disabled: {p['disabled']}" if p["disabled"] else "ok",
            p["provider"],
        )
        for p in found
    ]
    _table(("kind", "name", "runs", "tier", "source", "state", "provider"), rows)
    if broken:
        print("\nNot loaded:")
        for b in registry.broken:
            print(f"  {b}")


def _summary(registry: Registry, kind: str, name: str) -> dict[str, Any]:
    spec = registry.spec(kind, name)
    provider = registry.provider(kind, name)
    return {
        "name": name,
        "summary": spec.summary,
        "runs": list(spec.runs),
        "tier": spec.tier,
        "source": f"{spec.paper.year}, {spec.paper.id}" if isinstance(spec.paper, Paper) else spec.paper,
        "disabled": registry.unavailable(spec),
        "provider": str(provider),
        "package": provider.package,
    }


def _show(registry: Registry, kind: str, name: str, as_json: bool) -> None:
    spec = registry.spec(kind, name)
    model = registry.resolve(kind, name, "config")
    if as_json:
        about = _spec_dict(spec)
        about["settings"] = model.model_json_schema() if model else None
        print(json.dumps({"kind": kind, **_summary(registry, kind, name), **about}, indent=2))
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
            print(f"  {label + ':':<12} {text}")
    for number, deviation in enumerate(spec.deviations, 1):
        print(f"  {'deviations:' if number == 1 else '':<12} {number}. {deviation}")
    print("\nSettings" + (":" if model else ": none"))
    if model:
        _table(("field", "default", "type", "meaning"), _fields(model), indent="  ")


def _spec_dict(spec: PluginSpec) -> dict[str, Any]:
    values = asdict(spec)
    for key in ("provides", "requires", "conflicts"):
        values[key] = sorted(values[key])
    values["paper"] = str(spec.paper)
    return values


def _fields(model: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, field in model.model_fields.items():
        default = (
            "(required)" if field.is_required() else _plain(field.get_default(call_default_factory=True))
        )
        kind = getattr(field.annotation, "__name__", None) if field.annotation else None
        if kind is None or "[" in str(field.annotation) or "|" in str(field.annotation):
            kind = str(field.annotation).replace("typing.", "")
        bounds = [
            f"{sign}{getattr(m, attribute)}"
            for m in field.metadata
            for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if getattr(m, attribute, None) is not None
        ]
        rows.append((name, default, " ".join([kind, *bounds]), field.description or ""))
    return rows


def _plain(value: object) -> str:
    """A default as it would be written on the command line."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        value = dump(mode="json")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "") -> None:
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print((indent + "  ".join(cells)).rstrip())

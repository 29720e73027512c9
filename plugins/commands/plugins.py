"""``servelab plugins``: what there is, where it comes from, what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from servelab.core.errors import PluginError, nearest
from servelab.core.families import KINDS
from servelab.core.registry import Registry
from servelab.core.spec import Paper
from servelab.plugins.tables import aligned


def main(argv: Sequence[str]) -> None:
    """Print all plugins, or those of one kind, and packages that could not be loaded.

    Raises:
        PluginError: an unknown kind.
    """
    chosen = arguments().parse_args(argv)
    if chosen.kind is not None and chosen.kind not in KINDS:
        raise PluginError(f"unknown kind of plugin {chosen.kind!r}", do=nearest(chosen.kind, KINDS))
    registry = Registry.load()
    found = [
        {"kind": kind, **summary(registry, kind, name)}
        for kind in KINDS
        if chosen.kind in (None, kind)
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
    if chosen.json:
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
    head = ("kind", "name", "runs", "tier", "source", "state", "provider")
    for line in aligned([head, *rows]):
        print(line)
    if broken:
        print("\nNot loaded:")
        for b in registry.broken:
            print(f"  {b}")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab plugins", description="All plugins, and packages that could not be loaded."
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def summary(registry: Registry, kind: str, name: str) -> dict[str, Any]:
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

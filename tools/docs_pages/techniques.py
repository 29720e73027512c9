"""The table of techniques, and what every technique's page says in the same words."""

from __future__ import annotations

import os
from pathlib import Path

from docs_pages.configuration import heading
from docs_pages.markdown import DOCS, anchor, fill, page, table
from docs_pages.plugins import IN_TREE, golden_tests, page_of, source_file, stated_deviations
from servelab.core.families import KINDS
from servelab.core.registry import selection
from servelab.core.spec import Paper, PluginSpec

INTRO = """Every technique this repository has, from its own declaration (`plugins/*/__init__.py`).
*Source* is the paper it is held to, or baseline; *runs* says whether it works on a real model (`torch`)
and in simulation (`sim`); an *oracle* reads true output lengths, which no real server knows, and stamps
the run. *Deviations* counts how it knowingly differs from its source: they are on its page. `servelab
plugins` shows the same with the packages you have installed."""


def index() -> str:
    """docs/techniques/index.md."""
    parts = [INTRO]
    for kind in KINDS.values():
        rows = [
            (
                f"[`{name}`]({os.path.relpath(page_of(kind_, name), DOCS / 'techniques')})",
                spec.summary,
                _source(spec),
                spec.tier,
                ", ".join(spec.runs),
                "yes" if spec.oracle else "",
                len(spec.deviations) or "none",
            )
            for (kind_, name), spec in IN_TREE.items()
            if kind_ == kind.name
        ]
        if rows:
            head = ("plugin", "what it does", "source", "tier", "runs", "oracle", "deviations")
            parts += [f"## {kind.name}", f"Decides: {kind.decides}.", table(head, rows)]
    empty = [f"`{kind}`" for kind in KINDS if not any(kind == k for k, _ in IN_TREE)]
    if empty:
        parts += [
            "## Kinds without a plugin here",
            f"{', '.join(empty)}: contracts only, in `core/families/`.",
        ]
    return page("Techniques", *parts)


def readme() -> str:
    """The table of the README."""
    rows = []
    for kind in KINDS.values():
        names = [
            f"[`{name}`](docs/{page_of(k, name).relative_to(DOCS)})" for k, name in IN_TREE if k == kind.name
        ]
        if names:
            rows.append((f"`{kind.name}`", kind.decides, ", ".join(names)))
    return table(("kind", "decides", "plugins"), rows)


def pages() -> dict[Path, str]:
    """Every technique's page, with its facts and its deviations as the code has them."""
    found: dict[Path, str] = {}
    for (kind, name), spec in IN_TREE.items():
        path = page_of(kind, name)
        text = found.get(path) or path.read_text(encoding="utf-8")
        where = str(path.relative_to(DOCS))
        text = fill(text, f"facts of {kind} {name}", _facts(kind, name, spec), where)
        text = fill(text, f"deviations of {kind} {name}", _deviations(spec), where)
        found[path] = fill(text, f"tests of {kind} {name}", _tests(kind, name), where)
    return found


def _source(spec: PluginSpec) -> str:
    return (
        f"{spec.paper.title}, {spec.paper.year}, {spec.paper.id}"
        if isinstance(spec.paper, Paper)
        else "baseline"
    )


def _code(names: object) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))  # type: ignore[call-overload]


def _facts(kind: str, name: str, spec: PluginSpec) -> str:
    settings = "none"
    if spec.config:
        target = f"../reference/configuration.md#{anchor(heading(kind, name))}"
        settings = f"[`{spec.config.partition(':')[2]}`]({target})"
    rows = {
        "does": spec.summary,
        "select with": f"`{selection(kind, name)}`",
        "source": _source(spec),
        "tier, runs": f"{spec.tier}; {', '.join(spec.runs)}",
        "code": f"`{source_file(spec)}`",
        "settings": settings,
        "provides": _code(spec.provides),
        "requires": _code(spec.requires),
        "conflicts": _code(spec.conflicts),
        "oracle": "reads true output lengths; every report of such a run is stamped" if spec.oracle else "",
    }
    return table((f"{kind} `{name}`", ""), [row for row in rows.items() if row[1]])


def _deviations(spec: PluginSpec) -> str:
    items = [item.replace("``", "`") for item in stated_deviations(spec)]
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)) or "None."


def _tests(kind: str, name: str) -> str:
    return "\n".join(["Held to its source by:", "", *(f"- `{test}`" for test in golden_tests(kind, name))])

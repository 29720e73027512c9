"""The plugins of this repository, whatever else is installed, and where their page and tests are."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import cast

from pydantic import BaseModel

from docs_pages.markdown import DOCS, ROOT
from servelab.core.families import KINDS
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec


def _in_tree() -> dict[tuple[str, str], PluginSpec]:
    registry = Registry.load()
    return {
        (kind, name): registry.spec(kind, name)
        for kind in KINDS
        for name in registry.names(kind)
        if registry.spec(kind, name).factory.startswith("servelab.plugins.")
    }


IN_TREE = _in_tree()
"""``(kind, name)`` -> spec, in the order of kinds, then names."""

GOLDEN: dict[str, dict[str, list[str]]] = tomllib.loads(
    (ROOT / "tests" / "meta" / "golden.toml").read_text(encoding="utf-8")
)
"""Kind -> plugin -> tests that hold it to its source, as ``path::name``."""


def settings_model(spec: PluginSpec) -> type[BaseModel] | None:
    """The settings of a plugin; None: it has none."""
    if spec.config is None:
        return None
    module, _, name = spec.config.partition(":")
    return cast(type[BaseModel], getattr(import_module(module), name))


def source_file(spec: PluginSpec) -> Path:
    """The module a plugin is written in, from the repository's root."""
    parts = spec.factory.partition(":")[0].removeprefix("servelab.").split(".")
    return Path(*parts).with_suffix(".py")


def docstring(spec: PluginSpec) -> str:
    """The docstring of that module, read without importing it."""
    tree = ast.parse((ROOT / source_file(spec)).read_text(encoding="utf-8"))
    return inspect.cleandoc(ast.get_docstring(tree) or "")


def stated_deviations(spec: PluginSpec) -> list[str]:
    """What the module's docstring lists under "Deviations", in full."""
    found = re.search(
        r"^Deviations\b[^:]*:(.*?)(?=^\s*$\n?|Faithful when|^Tier|\Z)", docstring(spec), re.S | re.M
    )
    if found is None:
        return []
    text = " ".join(found[1].split())
    return [item.strip() for item in re.split(r"(?:^|(?<= ))\d+\. ", text)[1:]]


def page_of(kind: str, name: str) -> Path:
    """The page of a plugin; of a task that reproduces a paper's figures, in ``docs/experiments``.

    Raises:
        FileNotFoundError: it has none.
    """
    for folder, stem in (("techniques", f"{kind}_{name}"), ("techniques", name), ("experiments", name)):
        path = DOCS / folder / f"{stem}.md"
        if path.exists() and (folder == "techniques" or kind == "task"):
            return path
    raise FileNotFoundError(f"docs/techniques has no page for {kind} {name!r}: {kind}_{name}.md or {name}.md")


def golden_tests(kind: str, name: str) -> list[str]:
    """Tests that hold a plugin to its source."""
    return GOLDEN.get(kind, {}).get(name, [])

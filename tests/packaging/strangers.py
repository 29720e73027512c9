"""Strangers' packages on a path: whole ones from ``servelab new``, and one broken in each way."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from servelab.plugins.commands.new.command import main

HEAD = "from servelab.core.api import PluginSpec, hookimpl\n"
SCHEDULERS = HEAD + "@hookimpl\ndef servelab_schedulers():\n    "

BROKEN: dict[str, tuple[str, str]] = {
    "missing_import": ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
    "syntax_error": ("def (:\n", "SyntaxError"),
    "misspelt_hook": (HEAD + "@hookimpl\ndef servelab_scheduler():\n    return []", "'servelab_scheduler'"),
    "unknown_argument": (HEAD + "@hookimpl\ndef servelab_schedulers(wish):\n    return []", "wish"),
    "raising_hook": (SCHEDULERS + "raise OSError('disk')", "OSError: disk"),
    "unknown_kind": (HEAD + "@hookimpl\ndef servelab_teleports():\n    return []", "'servelab_teleports'"),
    "plugin_taken": (
        SCHEDULERS + "return [PluginSpec(name='vllm_v1', factory='evil:Mine')]",
        "the name is already provided by servelab",
    ),
    "exits": ("import sys; sys.exit(3)", "it called sys.exit(3)"),
    "absent_factory": (
        SCHEDULERS + "return [PluginSpec(name='absent_factory', factory='broken_absent_factory:Nothing')]",
        "has no attribute 'Nothing'",
    ),
    "raising_probe": (
        SCHEDULERS
        + "return [PluginSpec(name='raising_probe', factory='a:b', probe='broken_raising_probe:probe')]\n"
        + "def probe():\n    raise RuntimeError('no driver')",
        "RuntimeError: no driver",
    ),
}
"""Way of being broken -> code of the module, and what is said about it."""
BROKEN_CONFIGS = ("absent_configs", "no_such_package.conf", "No module named 'no_such_package'")
TAKEN = "misc"
"""A name that two packages have: the second is not loaded."""
WHEN_SELECTED = frozenset({"absent_factory", "raising_probe"})
"""These load; something of them fails when it is wanted."""


def install(site: Path, distribution: str, entries: Mapping[str, Mapping[str, str]], version: str) -> None:
    """The metadata of an installed distribution: group -> name -> module."""
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")
    lines = [
        f"[{group}]\n" + "".join(f"{n} = {m}\n" for n, m in each.items()) for group, each in entries.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines), encoding="utf-8")


def install_good(site: Path, kind: str, name: str) -> None:
    """What ``servelab new`` makes, as it would be installed."""
    source = site.parent / f"{name}-source"
    with redirect_stdout(StringIO()):
        main([kind, name, "--dir", str(source)])
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(source / "src", site, dirs_exist_ok=True)
    install(site, project["name"], project["entry-points"], project["version"])


def install_broken(site: Path, way: str, *, entry: str = "", code: str | None = None) -> None:
    """One of ``BROKEN``."""
    module = f"broken_{way}"
    (site / f"{module}.py").write_text(BROKEN[way][0] if code is None else code, encoding="utf-8")
    install(site, f"broken-{way.replace('_', '-')}", {"servelab": {entry or way: module}}, "0.9")

"""YAML of packages: whether it can be read, names plugins that exist, and is not hidden by other YAML."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

import yaml

from servelab.core.config import ModelConfig
from servelab.core.errors import nearest
from servelab.core.families import KINDS
from servelab.core.findings import Finding
from servelab.core.registry import ConfigPackage, Registry, selection

OURS = "servelab.configs"
LISTED = frozenset({"observer"})
"""Kinds chosen by a list: they need no YAML."""


def config_findings(registry: Registry) -> Iterator[Finding]:
    """Every package of YAML, and every plugin that lacks its own."""
    holder = dict.fromkeys(yaml_files(files(OURS)), "ServeLab itself")
    named: set[tuple[str, str]] = set()
    for package in registry.config_packages:
        if package.problem is not None:
            continue  # among the packages that are not loaded
        found = yaml_files(files(package.package))
        problems = list(_package(package, found, holder, registry, named))
        yield from problems
        if not problems:
            yield Finding(f"YAML of {package.name}", "ok", f"{', '.join(found)}")
        for path in found:
            holder.setdefault(path, f"package {package.name}")
    yield from _without_yaml(registry, named)


def _package(
    package: ConfigPackage,
    found: dict[str, Traversable],
    holder: dict[str, str],
    registry: Registry,
    named: set[tuple[str, str]],
) -> Iterator[Finding]:
    check = f"YAML of {package.name}"
    if not found:
        yield Finding(
            check,
            "fail",
            f"{package.package} holds no YAML",
            "include it in the package's data: conf/KIND/NAME.yaml, and conf/**/*.yaml in package-data",
        )
    for path, file in found.items():
        kind, _, rest = path.partition("/")
        if path in holder:
            yield Finding(
                check,
                "warn",
                f"{path} is never read: {holder[path]} has a file of that name, which comes first",
                "rename it",
            )
            continue
        if kind == "hydra":
            yield Finding(
                check, "warn", f"{path} is in a group of Hydra's own", "choose another group for it"
            )
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
            first = " ".join(str(exc).split())
            yield Finding(check, "fail", f"{path} cannot be read: {first}", "correct the file")
            continue
        if not rest or kind not in KINDS:
            continue  # a model, an experiment, a group of its own
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str):
            yield Finding(
                check, "fail", f"{path} names no plugin", f"write: name: {PurePosixPath(path).stem}"
            )
        elif name not in registry.names(kind):
            yield Finding(
                check,
                "fail",
                f"{path} names {kind} {name!r}, which nobody provides",
                nearest(name, registry.names(kind)),
            )
        else:
            named.add((kind, name))


def _without_yaml(registry: Registry, named: set[tuple[str, str]]) -> Iterator[Finding]:
    """Plugins of strangers that the command line does not know, because they have one entry point only."""
    for kind, name in registry.specs:
        provider = registry.provider(kind, name)
        if provider.distribution == "servelab" or kind in LISTED or (kind, name) in named:
            continue
        twin = any(package.name == provider.package for package in registry.config_packages)
        yield Finding(
            f"{kind} {name}",
            "fail",
            f"no YAML names it: {selection(kind, name)} is not understood",
            f"write {kind}/{name}.yaml with 'name: {name}' into the package's folder of YAML"
            + ("" if twin else f", and declare that as entry point {provider.package!r} of servelab.configs"),
        )


def yaml_files(folder: Traversable, prefix: str = "") -> dict[str, Traversable]:
    """All YAML below a folder, by path within it, in a fixed order."""
    found: dict[str, Traversable] = {}
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if entry.is_dir():
            found |= yaml_files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            found[prefix + entry.name] = entry
    return found


def default_model() -> ModelConfig:
    """The model of a run that names none."""
    ours = files(OURS)
    defaults = yaml.safe_load((ours / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    (name,) = (entry["model"] for entry in defaults if isinstance(entry, dict) and "model" in entry)
    return ModelConfig(**yaml.safe_load((ours / "model" / f"{name}.yaml").read_text(encoding="utf-8")))

"""Templates to files: rendered in a folder beside the target, moved in place when all of them are there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from servelab.core.errors import PluginError
from servelab.core.families import KINDS
from servelab.core.spec import HOOK_API
from servelab.plugins.commands.new.kinds import OFFERS
from servelab.plugins.commands.new.names import Names

_SUFFIX = ".tmpl"


def write_package(names: Names, target: Path) -> list[str]:
    """Make the package in a new folder; the paths written, relative to it.

    Raises:
        PluginError: the folder exists, or cannot be written. Nothing is left behind.
    """
    if target.exists() or target.is_symlink():
        raise PluginError(
            f"{target} exists already",
            where="command line: --dir",
            why="servelab new makes a folder and never writes into one that is there",
            do="name another folder with --dir, or move that one away",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target: on one file system a rename puts everything in place at once
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as exc:
        raise _unwritable(target, exc) from exc
    try:
        written = _fill(draft, names)
        draft.chmod(0o777 & ~_umask())  # mkdtemp's own is for one user alone
        os.rename(draft, target)
    except OSError as exc:
        raise _unwritable(target, exc) from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def _fill(folder: Path, names: Names) -> list[str]:
    words = _words(names)
    written = []
    for path, template in sorted(_templates(names)):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        text = Template(template.read_text(encoding="utf-8")).substitute(words)
        file.write_text(text.rstrip() + "\n", encoding="utf-8")
        written.append(path)
    return written


def _templates(names: Names) -> Iterator[tuple[str, Traversable]]:
    """Where each file goes, and what it is made from."""
    root = files(__package__) / "templates"
    common, own = root / "common", root / names.kind
    source, offer = f"src/{names.package}", OFFERS[names.kind]
    yield "README.md", common / f"README.md{_SUFFIX}"
    yield ".gitignore", common / f"gitignore{_SUFFIX}"
    yield "pyproject.toml", common / f"pyproject.toml{_SUFFIX}"
    yield f"{source}/__init__.py", common / f"init.py{_SUFFIX}"
    if offer.configs:
        yield f"{source}/conf/{names.kind}/{names.name}.yaml", common / f"conf.yaml{_SUFFIX}"
    for template in own.iterdir():
        name = template.name.removesuffix(_SUFFIX)
        if name == "test.py":
            yield f"tests/test_{names.name}.py", template
        elif name.endswith(".py"):
            yield f"{source}/{name}", template


def _words(names: Names) -> Mapping[str, str]:
    """What ``$word`` stands for in a template."""
    offer = OFFERS[names.kind]
    run = offer.run.format(name=names.name)
    configs = (
        '\n[project.entry-points."servelab.configs"] # the package of YAML; only its name is read\n'
        f'{names.entry} = "{names.package}.conf"\n'
        if offer.configs
        else ""
    )
    data = (
        f'\n[tool.setuptools.package-data]\n"{names.package}" = ["conf/**/*.yaml"]\n' if offer.configs else ""
    )
    return {
        "kind": names.kind,
        "name": names.name,
        "package": names.package,
        "distribution": names.distribution,
        "entry": names.entry,
        "cls": names.cls,
        "api": str(HOOK_API[0]),
        "suite": offer.suite,
        "starts_as": offer.starts_as,
        "decides": KINDS[names.kind].decides,
        "run": f"servelab {run}",
        "about_run": f" ({offer.about_run})" if offer.about_run else "",
        "depends": '"servelab", "torch"' if offer.torch else '"servelab"',
        "configs": configs,
        "package_data": data,
        "conf_row": f"| `src/{names.package}/conf/` | the YAML that makes the name known |\n"
        if offer.configs
        else "",
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(target: Path, exc: OSError) -> PluginError:
    return PluginError(
        f"{target} could not be written",
        where=str(exc.filename or target),
        why=exc.strerror or str(exc),
        do="name another folder with --dir",
    )

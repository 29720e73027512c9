"""Python and the libraries, against what this servelab asks for and what it was tested with."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import servelab.core
from servelab.core import __version__
from servelab.core.errors import INSTALL
from servelab.core.findings import Finding

FEATURES = {
    "run": "running models, and plots of tasks",
    "sweep": "sweeps in parallel (hydra/launcher=joblib)",
    "test": "the tests of this repository; suites for plugins of your own need pytest and hypothesis",
}
"""What is off without an optional extra."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What servelab asks for."""

    python: str
    base: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]]
    tested: Mapping[str, str]
    """Library -> the version that releases are tested with; empty outside a checkout."""

    @property
    def checkout(self) -> bool:
        return bool(self.tested)


def library_findings(wanted: Wanted | None = None) -> Iterator[Finding]:
    """Versions of everything that is imported, and what is off."""
    wanted = wanted or read_wanted()
    yield Finding("servelab", "ok", f"{__version__}, {'in a checkout' if wanted.checkout else 'installed'}")
    mine = platform.python_version()
    if SpecifierSet(wanted.python).contains(mine, prereleases=True):
        yield Finding("Python", "ok", f"{mine}, within {wanted.python}")
    else:
        yield Finding("Python", "fail", f"{mine}, not within {wanted.python}", "use another Python")
    yield _group("libraries", wanted.base, _install(wanted, ""), needed=True)
    for extra, requirements in wanted.extras.items():
        if requirements:
            off = FEATURES.get(extra, f"what extra {extra} is for")
            yield _group(f"extra {extra}", requirements, _install(wanted, extra), off=off)
    if wanted.tested:
        yield _tested(wanted.tested)


def _group(
    check: str, requirements: Iterable[Requirement], do: str, *, off: str = "", needed: bool = False
) -> Finding:
    """One line for libraries that are installed together."""
    missing, wrong, fine = [], [], []
    for requirement in requirements:
        found = _installed(requirement.name)
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
        else:
            fine.append(f"{requirement.name} {found}")
    if missing and not needed:
        return Finding(check, "warn", f"not installed: {', '.join([*missing, *wrong])}. Off: {off}", do)
    if missing or wrong:
        problems = [f"{name} is not installed" for name in missing] + wrong
        return Finding(check, "fail", "; ".join(problems), do)
    return Finding(check, "ok", ", ".join(fine))


def _tested(tested: Mapping[str, str]) -> Finding:
    others = [
        f"{name} {found} instead of {pin}"
        for name, pin in tested.items()
        if (found := _installed(name)) is not None and found.partition("+")[0] != pin
    ]
    if not others:
        return Finding("constraints", "ok", "every library is of the version that releases are tested with")
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return Finding(
        "constraints",
        "warn",
        f"not tested with: {shown}",
        f"nothing, unless something else fails; then: {INSTALL}",
    )


def read_wanted() -> Wanted:
    """From the checkout this servelab runs from, or else from its installed metadata."""
    root = Path(servelab.core.__file__).resolve().parents[1]
    project = root / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = stated["optional-dependencies"]
        pins = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        return Wanted(
            stated["requires-python"],
            _requirements(stated["dependencies"]),
            {extra: _requirements(lines) for extra, lines in extras.items()},
            dict(line.split("==", 1) for line in pins if "==" in line and not line.startswith("#")),
        )
    about = metadata("servelab")
    lines = about.get_all("Requires-Dist") or []
    every = [Requirement(line) for line in lines]
    names = about.get_all("Provides-Extra") or []
    return Wanted(
        (about.get_all("Requires-Python") or [""])[0],
        tuple(r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})),
        {
            name: tuple(
                r
                for r in every
                if r.name != "servelab"
                and r.marker is not None
                and r.marker.evaluate({"extra": name})
                and not r.marker.evaluate({"extra": ""})
            )
            for name in names
        },
        {},
    )


def _requirements(lines: Sequence[str]) -> tuple[Requirement, ...]:
    """Without references to other extras of our own."""
    every = (Requirement(line) for line in lines)
    return tuple(r for r in every if r.name != "servelab")


def _install(wanted: Wanted, extra: str) -> str:
    if not wanted.checkout:
        return f'pip install "servelab[{extra}]"' if extra else "pip install --force-reinstall servelab"
    return f"in the checkout: {INSTALL.replace('[run]', f'[{extra}]' if extra else '')}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

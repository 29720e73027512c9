"""What suites of plugins with two halves share: torch where it is installed, describing without it."""

from __future__ import annotations

import builtins
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest

from servelab.core.testing.suite import PluginSuite

HEAVY = ("torch", "numpy", "triton", "transformers")
"""What a half that describes must not import."""


def torch_or_skip() -> Any:
    """The module torch; the check is skipped where it is not installed."""
    try:
        return import_module("torch")
    except ImportError as exc:
        pytest.skip(f"the half with tensors needs torch: {exc}")


def decibels(signal: Any, noise: Any) -> float:
    """Ratio of two energies; infinity without noise."""
    below, above = float(noise.double().square().sum()), float(signal.double().square().sum())
    if math.isnan(below) or math.isnan(above):
        return -math.inf
    return 10 * math.log10(above / below) if below and above else math.inf * (1 if above or not below else -1)


def modules_of(suite: PluginSuite) -> list[str]:
    """What is imported to build its plugin."""
    registry, spec, _ = suite._selected
    factory = registry.resolve(suite.kind, spec.name, "factory")
    return [m for m in (getattr(factory, "__module__", ""), (spec.config or "").partition(":")[0]) if m]


def check_describes_without_tensors(
    suite: PluginSuite, modules: Sequence[str], describe: Callable[[], object]
) -> None:
    """Fail unless a plugin's first half does without tensor libraries.

    Args:
        suite: whose plugin.
        modules: what is imported to build it, each tried in a process of its own.
        describe: builds the plugin and asks everything that a simulator asks.
    """
    rule = "the half that describes is free of tensor libraries; load() imports the other"
    do = "import them inside load(), or in the module that load() imports"
    for module in dict.fromkeys(modules):
        code = (
            "import sys, importlib\n"
            "try: importlib.import_module(sys.argv[1])\n"
            "except ModuleNotFoundError: pass\n"  # of a test: not for everybody to import
            f"print(*(m for m in {HEAVY!r} if m in sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, module],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if found := done.stdout.split():
            suite.fail(f"{suite.name}: importing {module} imports {', '.join(found)}", rule=rule, do=do)
    try:
        with _refusing(HEAVY):
            describe()
    except _Heavy as exc:
        suite.fail(f"{suite.name} imports {exc.module} while it describes itself", rule=rule, do=do)


class _Heavy(BaseException):
    """Not an exception that a plugin would handle as a missing module."""

    def __init__(self, module: str) -> None:
        super().__init__(module)
        self.module = module


@contextmanager
def _refusing(modules: Sequence[str]) -> Iterator[None]:
    """Import statements for these modules raise ``_Heavy``, loaded or not."""
    plain = builtins.__import__

    def guarded(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] in modules:
            raise _Heavy(name.partition(".")[0])
        return plain(name, *args, **more)

    builtins.__import__ = guarded
    try:
        yield
    finally:
        builtins.__import__ = plain

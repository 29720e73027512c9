"""Every kind has a contract that imports lightly and names its capabilities."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from servelab.core.families import KINDS
from servelab.core.vocabulary import CAPABILITIES

SRC = Path(__file__).resolve().parents[2] / "src"
NAME = re.compile(rf"``((?:{'|'.join(KINDS)})\.[a-z_]+)``")


def module(kind: str) -> Any:
    return import_module(KINDS[kind].protocol.partition(":")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_protocol_path_resolves_to_a_protocol(kind: str) -> None:
    path, _, name = KINDS[kind].protocol.partition(":")
    protocol = getattr(import_module(path), name)
    assert getattr(protocol, "_is_protocol", False)
    assert path == f"servelab.core.families.{kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_docstring_states_intent_and_capabilities(kind: str) -> None:
    doc = module(kind).__doc__
    assert "\n\nIntent: " in doc
    assert "\n\nCapabilities: " in doc


def test_docstrings_name_exactly_the_vocabulary() -> None:
    named = {name for kind in KINDS for name in NAME.findall(module(kind).__doc__)}
    assert named - CAPABILITIES.keys() == set(), "named in a docstring, not in the vocabulary"
    own = {
        name for kind in KINDS for name in NAME.findall(module(kind).__doc__) if name.startswith(f"{kind}.")
    }
    assert CAPABILITIES.keys() - own == set(), "in the vocabulary, not in its family's docstring"


WIDE = ("prefix", "semantic", "quant", "kvquant", "kernel", "spec", "grammar", "router", "app")
"""Kinds whose contracts came before their first plugin, so that only words can say what they mean."""


@pytest.mark.parametrize("kind", WIDE)
def test_every_method_is_documented(kind: str) -> None:
    """Protocols that others implement say what each method means, unless its name and types say it all."""
    said_by_name = {"pack", "linear", "format", "loaded", "resident_bits", "row", "kv_bytes", "latency_ns"}
    for cls in vars(module(kind)).values():
        if not (isinstance(cls, type) and getattr(cls, "_is_protocol", False)):
            continue
        if cls.__module__ != module(kind).__name__:
            continue
        assert cls.__doc__ or cls.__bases__ != (object,), cls
        for name, member in vars(cls).items():
            if callable(member) and not name.startswith("_") and name not in said_by_name:
                assert member.__doc__, f"{cls.__name__}.{name} has no docstring"


@pytest.mark.parametrize("kind", WIDE)
def test_annotations_resolve(kind: str) -> None:
    """Names used only in annotations exist: checkers and editors can follow them."""
    names: dict[str, Any] = {}
    for other in ("facts", "layout", "request", "plan", "records", "spec", *(f"families.{k}" for k in KINDS)):
        names.update(vars(import_module(f"servelab.core.{other}")))
    for cls in list(vars(module(kind)).values()):
        if not isinstance(cls, type) or cls.__module__ != module(kind).__name__:
            continue
        scope = {**names, **vars(module(kind))}
        get_type_hints(cls, scope)
        for member in vars(cls).values():
            if callable(member) and hasattr(member, "__annotations__"):
                get_type_hints(member, scope)


def test_families_import_nothing_heavy() -> None:
    code = "import sys\n"
    code += "".join(f"import servelab.core.families.{kind}\n" for kind in KINDS)
    code += "import servelab.core.vocabulary\n"
    code += "print([m for m in ('torch', 'numpy', 'pydantic', 'hydra', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

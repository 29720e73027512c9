"""Every hook does what its page says: registration hooks register, event hooks fire for their record only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from servelab.core import registry as loading
from servelab.core.bus import Bus
from servelab.core.families import KINDS
from servelab.core.hookspecs import EVENT_OF_RECORD, hookimpl
from servelab.core.records import RECORDS, Record
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An installed package of one module; a test gives it hooks."""
    module = ModuleType("servelab_meta_package")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = EntryPoint(name="meta", value=module.__name__, group=loading.GROUP)
    monkeypatch.setattr(loading, "_entry_points", lambda group: [entry] if group == loading.GROUP else [])
    yield module


def _hook(name: str, answer: Any) -> Any:
    def implementation() -> Any:
        return answer

    implementation.__name__ = implementation.__qualname__ = name
    return hookimpl(implementation)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.hook)
def test_a_registration_hook_registers_its_kind(kind: Any, package: ModuleType) -> None:
    spec = PluginSpec(name="of_a_package", factory="elsewhere:Made", summary="declared and never imported")
    setattr(package, kind.hook, _hook(kind.hook, (spec,)))
    found = Registry.load()
    assert not found.broken, found.broken
    assert found.spec(kind.name, "of_a_package") is spec
    assert found.provider(kind.name, "of_a_package").package == "meta"
    assert [k for k in KINDS if "of_a_package" in found.names(k)] == [kind.name]


def test_the_hook_of_commands_declares_commands(package: ModuleType) -> None:
    table = {"greet": ("elsewhere:main", "says hello")}
    package.servelab_commands = _hook("servelab_commands", table)  # type: ignore[attr-defined]
    assert Registry.load().commands["greet"].target == "elsewhere:main"


def _any(hint: Any) -> Any:
    """Some value of a type."""
    origin = get_origin(hint)
    if origin is not None and get_args(hint) and str(origin) == "typing.Literal":
        return get_args(hint)[0]
    if origin in (list, tuple):
        return origin()
    plain: dict[Any, Any] = {int: 1, float: 1.0, str: "x", bool: False}
    return plain.get(hint, {})


def _record(ev: str) -> Record:
    cls = RECORDS[ev]
    hints = get_type_hints(cls)
    needed = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return cls(**{f.name: _any(hints[f.name]) for f in needed})


@pytest.mark.parametrize(("ev", "hook"), EVENT_OF_RECORD.items(), ids=EVENT_OF_RECORD.values())
def test_an_event_hook_fires_for_its_record_and_for_no_other(ev: str, hook: str) -> None:
    heard: list[Record] = []

    def implementation(self: object, record: Record) -> None:
        heard.append(record)

    implementation.__name__ = implementation.__qualname__ = hook
    observer = type("Observer", (), {hook: hookimpl(implementation)})()
    bus = Bus([observer])
    sent = {other: _record(other) for other in RECORDS}
    for record in sent.values():
        bus.emit(record)
    assert heard == [sent[ev]] and heard[0] is sent[ev]

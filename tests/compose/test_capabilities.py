"""Capabilities are checked as data, all problems at once, before any factory is imported."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.capabilities import Selected, check_capabilities
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.errors import CapabilityError
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec


def never(*args: object) -> None:
    raise AssertionError("a factory was called although the parts do not fit")


def add(registry: Registry, kind: str, name: str, **fields: Any) -> None:
    sets = {key: frozenset(fields.pop(key, ())) for key in ("provides", "requires", "conflicts")}
    registry.add(kind, PluginSpec(name=name, factory="nowhere:Never", **sets, **fields), factory=never)


def problems(raw: dict[str, Any], registry: Registry) -> list[str]:
    config = validate(raw, registry)
    with pytest.raises(CapabilityError) as error:
        compose(config, registry)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_missing_capability_names_who_lacks_it_and_who_has_it(
    raw: dict[str, Any], registry: Registry
) -> None:
    add(registry, "scheduler", "pinner", requires={"kvcache.pin"})
    add(registry, "kvcache", "pinning", provides={"kvcache.pin"})
    found = problems({**raw, "scheduler": "pinner"}, registry)
    assert found == [
        "scheduler 'pinner' requires 'kvcache.pin', which kvcache 'paged' does not provide; "
        "choose +kvcache=pinning"
    ]


def test_missing_capability_that_nothing_installed_brings(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "scheduler", "s", requires={"kvcache.remote_spans"})
    (found,) = problems({**raw, "scheduler": "s"}, registry)
    assert found.endswith("choose other parts: no installed plugin brings it")


def test_a_plugin_cannot_bring_what_it_requires_itself(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "scheduler", "s", requires={"x_mine.thing"}, provides={"x_mine.thing"})
    (found,) = problems({**raw, "scheduler": "s"}, registry)
    assert "'x_mine.thing', which no selected plugin provides" in found


def test_conflict_names_both_plugins(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "scheduler", "s", conflicts={"kvcache.fork"})
    assert problems({**raw, "scheduler": "s"}, registry) == [
        "scheduler 's' conflicts with 'kvcache.fork', which kvcache 'paged' provides; "
        "choose another scheduler or another kvcache"
    ]


def test_a_plugin_that_cannot_run_on_the_executor(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "scheduler", "real_only", runs=("torch",))
    add(registry, "executor", "real", provides={"executor.torch"}, runs=("torch",))
    (found,) = problems({**raw, "scheduler": "real_only"}, registry)
    assert found.startswith(
        "scheduler 'real_only' runs on torch only, but executor 'scripted' provides 'executor.sim'; "
        "choose executor=real or executor=torch or +scheduler="
    )
    assert found.endswith(" or one of the others that `servelab plugins` lists")


@pytest.mark.parametrize("provides", [(), ("executor.torch", "executor.sim")])
def test_executor_has_exactly_one_class(
    raw: dict[str, Any], registry: Registry, provides: tuple[str, ...]
) -> None:
    add(registry, "executor", "odd", provides=provides)
    (found,) = problems({**raw, "executor": "odd"}, registry)
    assert "must provide exactly one of" in found


def test_parts_that_nothing_would_use_are_refused(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "grammar", "json")
    (found,) = problems({**raw, "grammar": "json"}, registry)
    assert found.startswith("grammar 'json' is selected, but no part")
    assert found.endswith("leave it out: grammar=null")


def test_a_quantizer_needs_an_executor_that_heeds_it(raw: dict[str, Any], registry: Registry) -> None:
    """Also one whose spec forgets to say so: its run would otherwise be an unquantized one."""
    add(registry, "quant", "w4")
    (found,) = problems({**raw, "quant": "w4"}, registry)
    start = "quant 'w4' requires 'executor.quant', which executor 'scripted' does not provide"
    assert found.startswith(start)


def test_conflicts_of_the_vocabulary_are_checked(raw: dict[str, Any], registry: Registry) -> None:
    selected = [
        Selected(kind, registry.spec(kind, choice.name)) for kind, choice in validate(raw, registry).choices()
    ]
    check_capabilities(selected, registry)
    both = [
        Selected(
            "kvquant", PluginSpec(name="k", factory="a:b", provides=frozenset({"kvquant.representation"}))
        ),
        Selected(
            "kernel", PluginSpec(name="a", factory="a:b", provides=frozenset({"kvquant.representation"}))
        ),
    ]
    with pytest.raises(
        CapabilityError, match=r"kvquant 'k' \(kvquant.representation\) cannot run with kernel 'a'"
    ):
        check_capabilities([*selected, *both], registry)


def test_all_problems_at_once(raw: dict[str, Any], registry: Registry) -> None:
    add(registry, "scheduler", "s", requires={"kvcache.pin"}, conflicts={"kvcache.fork"}, runs=("torch",))
    add(registry, "workload", "w")  # gives no lengths, which the scripted executor needs
    found = problems({**raw, "scheduler": "s", "workload": "w"}, registry)
    assert len(found) == 4
    assert any(
        "executor 'scripted' requires 'workload.truth', which workload 'w' does not" in p for p in found
    )

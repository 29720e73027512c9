"""Runs with a prefix store: composed from its name, refused where its pages could not be trusted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.errors import CapabilityError
from servelab.core.facts import ModelFacts
from servelab.core.layout import KVLayout
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.plugins.kvcache.paged import Paged, PagedConfig


def refused(raw: dict[str, Any], registry: Registry) -> str:
    with pytest.raises(CapabilityError) as error:
        compose(validate(raw, registry), registry)
    return str(error.value)


def test_hash_is_chosen_by_its_name_and_off_by_default(raw: dict[str, Any], registry: Registry) -> None:
    assert compose(validate(raw, registry), registry).engine.reuse is None
    run = compose(validate({**raw, "prefix": "hash"}, registry), registry)
    assert run.engine.reuse is not None and run.engine.reuse.name == "hash"
    assert run.engine.ledger.reuse is run.engine.reuse
    assert run.info["plugins"]["prefix"]["name"] == "hash"


def test_pools_with_a_window_are_refused(raw: dict[str, Any], registry: Registry) -> None:
    raw["model"] = {**raw["model"], "windows": [8, None]}
    said = refused({**raw, "prefix": "hash"}, registry)
    assert "prefix 'hash' cannot reuse the pages" in said and "old tokens: window_8" in said


def test_pools_whose_pages_differ_in_size_are_refused(raw: dict[str, Any], registry: Registry) -> None:
    class Two(Paged):
        def layout(self, model: ModelFacts) -> KVLayout:
            (whole,) = super().layout(model).pools
            half = replace(whole, id="half", page_tokens=8, layers=whole.layers[:1])
            rest = replace(whole, id="rest", layers=whole.layers[1:])
            return KVLayout(addressing="block_table", pools=(rest, half))

    spec = replace(registry.spec("kvcache", "paged"), name="two", config=None)
    registry.add("kvcache", spec, factory=lambda config, ctx: Two(PagedConfig(), ctx))
    said = refused({**raw, "kvcache": "two", "prefix": "hash"}, registry)
    assert "pages of 8, 16 tokens" in said


def test_stores_that_need_more_than_the_engine_does_are_refused(
    raw: dict[str, Any], registry: Registry
) -> None:
    provides = frozenset({"prefix.tiers", "prefix.exact"})
    registry.add(
        "prefix", PluginSpec(name="deep", factory="t:d", provides=provides), factory=lambda c, x: None
    )
    said = refused({**raw, "prefix": "deep"}, registry)
    assert "provides 'prefix.tiers', which this version's engine does not serve" in said


def test_a_contiguous_kvcache_is_refused(raw: dict[str, Any], registry: Registry) -> None:
    provides = frozenset({"kvcache.contiguous_slot"})
    registry.add(
        "kvcache", PluginSpec(name="flat", factory="t:f", provides=provides), factory=lambda c, x: None
    )
    said = refused({**raw, "kvcache": "flat", "prefix": "hash"}, registry)
    assert "requires 'kvcache.block_table'" in said and "contiguous range belongs to one request" in said

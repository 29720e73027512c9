"""Settings of the engine that ask something of plugins, and ends of runs in which several things fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.context import Context
from servelab.core.errors import CapabilityError, PluginCallError, PluginError
from servelab.core.facts import ModelFacts
from servelab.core.layout import KVLayout, Pool
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig
from servelab.plugins.kvcache.paged import Paged, PagedConfig


def composed(raw: dict[str, Any], registry: Registry) -> Any:
    return compose(validate(raw, registry), registry)


@pytest.mark.parametrize(
    ("setting", "capability"), [("max_in_flight", "scheduler.ahead"), ("lanes", "scheduler.lanes")]
)
def test_settings_that_need_a_scheduler_that_can(
    raw: dict[str, Any], registry: Registry, setting: str, capability: str
) -> None:
    from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

    raw["engine"] = {**raw.get("engine", {}), setting: 2}
    composed(raw, registry)
    registry.add(
        "scheduler",
        PluginSpec(name="simple", factory="a:b", config="a:c"),
        factory=VllmV1,
        config=VllmV1Config,
    )
    raw["scheduler"] = {"name": "simple"}
    with pytest.raises(CapabilityError, match=f"scheduler 'simple' does not provide '{capability}'"):
        composed(raw, registry)


def test_lanes_that_are_priced_apart_are_stamped(raw: dict[str, Any], registry: Registry) -> None:
    assert composed(raw, registry).info["stamps"] == []
    raw["engine"] = {**raw.get("engine", {}), "lanes": 2}
    assert composed(raw, registry).info["stamps"] == ["lanes: each priced as if alone on the device"]


def test_windows_that_no_pool_honours_are_refused(raw: dict[str, Any], registry: Registry) -> None:
    raw["model"] = {**raw["model"], "windows": [8, None]}
    composed(raw, registry)
    pools: tuple[Pool, ...] = ()

    class Other(Paged):
        def layout(self, model: ModelFacts) -> KVLayout:
            return KVLayout(addressing="block_table", pools=pools)

    spec = PluginSpec(name="other", factory="a:b", config="a:c", provides=frozenset({"kvcache.block_table"}))
    registry.add("kvcache", spec, factory=Other, config=PagedConfig)
    raw["kvcache"] = "other"
    whole = Pool(id="all", layers=(0, 1), page_tokens=4, bytes_per_page=4)
    pools = (whole,)
    with pytest.raises(CapabilityError, match="sliding window"):
        composed(raw, registry)
    for window, seen in ((9, "all tokens"), (7, "8 tokens")):
        pools = (replace(whole, retention="window", window_tokens=window),)
        with pytest.raises(PluginError) as error:
            composed(raw, registry)
        assert error.value.what == f"pool 'all' keeps {window} tokens of layer {int(window == 9)}"
        assert error.value.why == f"the layer sees {seen}"
    pools = (
        replace(whole, layers=(1,)),
        replace(whole, id="w", layers=(0,), retention="window", window_tokens=8),
    )
    assert [pool["window_tokens"] for pool in composed(raw, registry).info["kv"]["pools"]] == [None, 8]


def test_a_pool_with_a_window_must_hold_the_window_and_a_step(
    raw: dict[str, Any], registry: Registry
) -> None:
    """512 tokens in all, of which 7 before a step, 64 in it, and 15 beside them in pages of 16."""
    raw["model"] = {**raw["model"], "windows": [8, None]}
    raw["scheduler"] = {"name": "vllm_v1", "max_num_batched_tokens": 64, "max_num_seqs": 4}
    raw["engine"] = {"max_batch_tokens": 64, "max_batch_requests": 4}
    raw["executor"] = {"name": "scripted", "num_kv_pages": {"kv": 32, "window_8": 6}}
    assert composed(raw, registry).engine.capacity.device_pages == (32, 6)
    raw["executor"]["num_kv_pages"] = {"kv": 32, "window_8": 5}
    with pytest.raises(CapabilityError) as error:
        composed(raw, registry)
    assert error.value.where == "pool 'window_8' of kvcache 'paged' on executor 'scripted'"
    assert error.value.why == (
        "a window of 8 and a step of 64, 86 tokens need 6 pages of 16 tokens, the pool has 5"
    )
    assert "lower engine.max_batch_tokens, or lower engine.max_model_len to at most 80" in error.value.do
    run = compose(validate(raw, registry), registry, fit_length=True)
    assert run.config.engine.max_model_len == 80
    raw["executor"]["num_kv_pages"] = {"kv": 20, "window_8": 6}
    run = compose(validate(raw, registry), registry, fit_length=True)
    assert run.config.engine.max_model_len == 320


def _executor(**failing: str) -> type:
    """A scripted executor whose methods raise what they are told."""

    def method(name: str, text: str) -> Any:
        def fail(self: Any, *args: Any) -> Any:
            raise OSError(text)

        return fail

    return type("Failing", (ScriptedExecutor,), {name: method(name, text) for name, text in failing.items()})


def use(raw: dict[str, Any], registry: Registry, factory: type) -> None:
    registry.add(
        "executor",
        PluginSpec(name="failing", factory="a:b", config="a:c", provides=frozenset({"executor.sim"})),
        factory=factory,
        config=ScriptedExecutorConfig,
    )
    raw["executor"] = {"name": "failing"}


def test_the_first_error_stands_when_closing_fails_too(raw: dict[str, Any], registry: Registry) -> None:
    use(raw, registry, _executor(launch="first", close="second"))
    run = composed(raw, registry)
    with pytest.raises(PluginCallError, match="OSError: first") as info:
        run.task.run(run)
    assert any("second" in note for note in info.value.__notes__)


def test_a_failing_close_is_an_error_of_its_own_and_in_the_log(
    raw: dict[str, Any], registry: Registry
) -> None:
    use(raw, registry, _executor(close="second"))
    run = composed(raw, registry)
    with pytest.raises(PluginCallError, match="closing the executor raised OSError: second"):
        run.task.run(run)
    assert run.engine.ended["completed"] == run.engine.arrived > 0


def test_what_fails_while_composing_is_named_and_closing_does_not_hide_it(
    raw: dict[str, Any], registry: Registry
) -> None:
    use(raw, registry, _executor(capacity="first", close="second"))
    with pytest.raises(PluginError, match="executor 'failing' raised OSError: first") as info:
        composed(raw, registry)
    assert any("second" in note for note in info.value.__notes__)


def test_instances_have_one_layout(raw: dict[str, Any], registry: Registry) -> None:
    """What a kvcache proposes follows from model and settings, not from who asks."""

    class Capricious(Paged):
        def __init__(self, config: PagedConfig, ctx: Context) -> None:
            super().__init__(PagedConfig(page_tokens=16 + ctx.instance), ctx)

    spec = replace(registry.spec("kvcache", "paged"), name="capricious")
    registry.add("kvcache", spec, factory=Capricious, config=PagedConfig)
    raw |= {"kvcache": "capricious", "router": "round_robin", "cluster": {"instances": 2}}
    with pytest.raises(PluginError, match="'capricious' proposed another layout for instance 1"):
        composed(raw, registry)

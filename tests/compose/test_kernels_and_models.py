"""Before an executor is built: the model's shape is known, and the kernel has accepted the KV layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from servelab.core.compose import Run, compose
from servelab.core.config import SHAPE, ModelConfig, validate
from servelab.core.context import Context
from servelab.core.errors import CapabilityError, ConfigError, PluginError, ServeLabError
from servelab.core.facts import HardwareFacts, ModelFacts
from servelab.core.layout import Capacity, KVLayout
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig

Raw = dict[str, Any]


class Words:
    """A tokenizer of one id per character."""

    vocab_size = 128
    stop_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return [i for m in messages for i in self.encode(m["content"])]


class Fake(ScriptedExecutor):
    """Remembers what it was given; has a tokenizer and a description of its weights."""

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(ScriptedExecutorConfig(), context)
        self.context, self.tokenizer, self.layout = context, Words(), None

    def capacity(self, layout: KVLayout) -> Capacity:
        self.layout = layout
        return super().capacity(layout)

    def describe(self) -> dict[str, Any]:
        return {"origin": "a fake", "tensors": 3}


class Kernel:
    """A backend that does what it is told."""

    caps = None

    def __init__(
        self,
        refused: Sequence[str] = (),
        adapt: Callable[[KVLayout], KVLayout] = lambda layout: layout,
    ) -> None:
        self.refused, self.wish = refused, adapt
        self.asked: list[tuple[KVLayout, ModelFacts, HardwareFacts | None]] = []

    def adapt(self, layout: KVLayout, model: ModelFacts) -> KVLayout:
        return self.wish(layout)

    def refuses(self, layout: KVLayout, model: ModelFacts, hardware: HardwareFacts | None) -> Sequence[str]:
        self.asked.append((layout, model, hardware))
        return self.refused

    def cost(self, *args: object) -> None: ...

    def load(self, *args: object) -> None: ...


def never(*args: object) -> None:
    raise AssertionError("it was built although the kernel refuses the layout, or the shape is not known")


def add(
    registry: Registry, kind: str, factory: Any, name: str = "fake", *, shape: Any = None, **sets: Any
) -> None:
    """A plugin from Python; ``shape`` is its ``describe_model``."""
    spec = PluginSpec(
        name=name,
        factory="nowhere:Fake",
        describe_model="nowhere:describe" if shape is not None else None,
        **{key: frozenset(value) for key, value in sets.items()},
    )
    registry.add(kind, spec, factory=factory)
    if shape is not None:
        registry._objects[kind, name, "describe_model"] = shape


def executor(registry: Registry, factory: Any = Fake, *, shape: Any = None) -> None:
    add(registry, "executor", factory, shape=shape, provides={"executor.sim", "executor.tokenizer"})


def run(raw: Raw, registry: Registry) -> Run:
    return compose(validate(raw, registry), registry)


# ------------------------------------------------------------------------- kernels


def test_a_layout_the_kernel_refuses_ends_it_before_the_executor_is_built(
    raw: Raw, registry: Registry
) -> None:
    executor(registry, never)
    add(registry, "kernel", lambda config, context: Kernel(["it reads no pages", "pool 'kv' is too wide"]))
    with pytest.raises(CapabilityError, match="kernel 'fake' cannot read the KV layout") as error:
        run({**raw, "kernel": "fake", "executor": "fake"}, registry)
    assert error.value.where == "layout of kvcache 'paged'"
    assert error.value.why == "it reads no pages; pool 'kv' is too wide"
    assert error.value.do == "choose another kernel or another kvcache"


def test_the_real_kernel_says_what_it_cannot_read(raw: Raw, registry: Registry) -> None:
    from servelab.plugins.kvcache.paged import Paged, PagedConfig

    class Odd(Paged):
        def __init__(self, config: None, context: Context) -> None:
            super().__init__(PagedConfig(), context)

        def layout(self, model: ModelFacts) -> KVLayout:
            made = super().layout(model)
            (pool,) = made.pools
            return KVLayout(addressing="segments", pools=(replace(pool, key_space="latent", layers=(0,)),))

    executor(registry, never)
    add(registry, "kvcache", Odd)
    with pytest.raises(CapabilityError) as error:
        run({**raw, "kernel": "sdpa", "executor": "fake", "kvcache": "fake"}, registry)
    for reason in ("segments addressing", "stores keys as latent", "layer 1 is in 0 pools"):
        assert reason in error.value.why


def test_the_kernel_is_asked_with_the_facts_of_the_run(raw: Raw, registry: Registry) -> None:
    kernel = Kernel()
    executor(registry)
    add(registry, "kernel", lambda config, context: kernel)
    made = run(
        {**raw, "kernel": "fake", "executor": "fake", "hardware": {"name": "box", "flops": 1e12}}, registry
    )
    ((layout, model, hardware),) = kernel.asked
    assert (model.name, model.layers) == ("tiny", 2)
    assert hardware is not None
    assert (hardware.name, hardware.flops) == ("box", 1e12)
    assert isinstance(made.executor, Fake)
    assert made.executor.context.kernel is kernel
    assert made.executor.layout is layout


def test_what_the_kernel_would_like_is_the_layout_of_the_run(raw: Raw, registry: Registry) -> None:
    def wider(layout: KVLayout) -> KVLayout:
        (pool,) = layout.pools
        return replace(layout, pools=(replace(pool, bytes_per_page=pool.bytes_per_page + 64),))

    plain = run({**raw, "kernel": None}, registry)
    kernel = Kernel(adapt=wider)
    executor(registry)
    add(registry, "kernel", lambda config, context: kernel)
    made = run({**raw, "kernel": "fake", "executor": "fake"}, registry)
    wanted = wider(plain.engine.ledger.layout)
    assert kernel.asked[0][0] == wanted  # it accepts what it asked for, not what it was offered
    assert made.engine.ledger.layout == wanted
    assert isinstance(made.executor, Fake)
    assert made.executor.layout == wanted
    assert made.info["kv"]["pools"][0]["bytes_per_page"] == wanted.pools[0].bytes_per_page


@pytest.mark.parametrize("value", [None, "none", {"name": None}])
def test_no_kernel(raw: Raw, registry: Registry, value: Any) -> None:
    executor(registry)
    made = run({**raw, "kernel": value, "executor": "fake"}, registry)
    assert isinstance(made.executor, Fake)
    assert made.executor.context.kernel is None
    assert "kernel" not in made.info["plugins"]
    assert made.config.kernel is None


@pytest.mark.parametrize("method", ["adapt", "refuses"])
def test_a_kernel_that_raises_is_named(raw: Raw, registry: Registry, method: str) -> None:
    kernel = Kernel()

    def boom(*args: object) -> None:
        raise ZeroDivisionError("oh")

    setattr(kernel, method, boom)
    executor(registry, never)
    add(registry, "kernel", lambda config, context: kernel)
    with pytest.raises(PluginError, match="kernel 'fake' raised ZeroDivisionError: oh"):
        run({**raw, "kernel": "fake", "executor": "fake"}, registry)


# ------------------------------------------------------------------- what parts are given


def test_the_tokenizer_reaches_what_is_built_after_the_executor(raw: Raw, registry: Registry) -> None:
    seen: dict[str, Context] = {}

    def watched(kind: str) -> None:
        real = registry.resolve(kind, raw[kind]["name"], "factory")
        config = registry.resolve(kind, raw[kind]["name"], "config")

        def factory(settings: Any, context: Context) -> Any:
            seen[kind] = context
            return real(settings, context)

        spec = replace(registry.spec(kind, raw[kind]["name"]), name="watched")
        registry.add(kind, spec, factory=factory, config=config)
        raw[kind] = {**raw[kind], "name": "watched"}

    for kind in ("kvcache", "workload", "cost", "scheduler", "task"):
        watched(kind)
    kernel = Kernel()

    def make(settings: None, context: Context) -> Kernel:
        seen["kernel"] = context
        return kernel

    executor(registry)
    add(registry, "kernel", make)
    add(registry, "observer", lambda config, context: seen.update(observer=context))
    made = run({**raw, "kernel": "fake", "executor": "fake", "observers": ["fake"]}, registry)
    assert isinstance(made.executor, Fake)
    tokenizer = made.executor.tokenizer
    after = {"workload", "cost", "scheduler", "observer", "task"}
    assert {kind for kind, context in seen.items() if context.tokenizer is tokenizer} == after
    assert {kind for kind, context in seen.items() if context.tokenizer is None} == {"kvcache", "kernel"}
    own = made.executor.context
    assert (own.tokenizer, own.seed) == (None, 7)
    assert own.checkpoint is made.config.model
    assert {context.seed for context in seen.values()} == {7}
    # where the weights are is the executor's alone; what computes with them is priced too
    assert {context.checkpoint for context in seen.values()} == {None}
    assert {kind for kind, context in seen.items() if context.kernel is not None} == {"cost"}
    assert {kind for kind, context in seen.items() if context.layout is None} == {"kvcache", "kernel"}


def test_an_executor_without_a_tokenizer(raw: Raw, registry: Registry) -> None:
    seen: list[Context] = []
    add(registry, "observer", lambda config, context: seen.append(context))
    made = run({**raw, "observers": ["fake"]}, registry)
    assert seen[0].tokenizer is None
    assert "weights" not in made.info  # nor a description


def test_what_the_executor_says_of_its_weights_is_on_the_card(raw: Raw, registry: Registry) -> None:
    executor(registry)
    made = run({**raw, "executor": "fake"}, registry)
    assert made.info["weights"] == {"origin": "a fake", "tensors": 3}
    assert json.loads(json.dumps(made.info, allow_nan=False)) == made.info


# --------------------------------------------------------------------- shapes from files


@pytest.fixture
def shape(raw: Raw) -> Raw:
    """The model's shape, taken out of the configuration, which now names a file."""
    taken = {name: raw["model"].pop(name) for name in SHAPE}
    raw["model"] |= {"source": "path", "path": "/models/tiny"}
    raw["executor"] = {"name": "fake"}
    return taken


def test_an_open_shape_is_read_from_the_files(raw: Raw, registry: Registry, shape: Raw) -> None:
    asked: list[ModelConfig] = []

    def describe(model: ModelConfig) -> Raw:
        asked.append(model)
        return shape

    executor(registry, shape=describe)
    raw["engine"] = {"max_model_len": 512}
    made = run(raw, registry)
    (model,) = asked
    assert (model.source, model.path, model.unstated()) == ("path", "/models/tiny", list(SHAPE))
    assert {name: getattr(made.engine.model, name) for name in SHAPE} == shape
    assert made.info["settings"]["model"].items() >= {**shape, "path": "/models/tiny"}.items()
    assert isinstance(made.executor, Fake)
    assert made.executor.context.checkpoint == made.config.model
    assert made.config.model.unstated() == []


def test_a_stated_shape_is_not_read(raw: Raw, registry: Registry) -> None:
    executor(registry, shape=never)
    assert run({**raw, "executor": "fake"}, registry).engine.model.layers == 2


def test_one_open_field_is_enough(raw: Raw, registry: Registry) -> None:
    del raw["model"]["ffn"]
    raw["model"] |= {"source": "hub", "repo": "someone/tiny"}
    executor(registry, shape=lambda model: {"ffn": 77})
    assert run({**raw, "executor": "fake"}, registry).engine.model.ffn == 77


def test_an_executor_that_reads_no_shape(raw: Raw, registry: Registry, shape: Raw) -> None:
    executor(registry, never)
    with pytest.raises(ConfigError, match="the shape of model 'tiny' is not stated") as error:
        run(raw, registry)
    assert error.value.where == f"model: {', '.join(SHAPE)}"
    assert "executor 'fake' does not read it" in error.value.why
    assert "state these fields" in error.value.do


def test_an_executor_that_leaves_fields_open(raw: Raw, registry: Registry, shape: Raw) -> None:
    part = {name: value for name, value in shape.items() if name not in ("ffn", "vocab")}
    executor(registry, never, shape=lambda model: part)
    with pytest.raises(PluginError, match="left parts of the model's shape open: ffn, vocab") as error:
        run(raw, registry)
    assert error.value.where == "describe_model()"


def test_an_executor_that_fails_to_read(raw: Raw, registry: Registry, shape: Raw) -> None:
    def boom(model: ModelConfig) -> Raw:
        raise ZeroDivisionError("oh")

    executor(registry, never, shape=boom)
    with pytest.raises(PluginError, match="executor 'fake' raised ZeroDivisionError: oh") as error:
        run(raw, registry)
    assert "describe_model()" in error.value.where
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_its_own_error_passes_through(raw: Raw, registry: Registry, shape: Raw) -> None:
    def boom(model: ModelConfig) -> Raw:
        raise ConfigError("there is no such folder", do="mend model.path")

    executor(registry, never, shape=boom)
    with pytest.raises(ConfigError, match="there is no such folder"):
        run(raw, registry)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"engine": {"max_model_len": 513}},
            "engine.max_model_len: must be at most model.max_position, 512 (got 513)",
        ),
        ({"windows": [4]}, "model.windows: must have one entry per layer, 2 (got 1)"),
        ({"kv_heads": 3}, "model.kv_heads: must divide model.heads, 4 (got 3)"),
    ],
)
def test_rules_between_sections_hold_for_a_shape_that_was_read(
    raw: Raw, registry: Registry, shape: Raw, section: Raw, problem: str
) -> None:
    executor(registry, never, shape=lambda model: {**shape, "kv_heads": model.kv_heads or shape["kv_heads"]})
    if "engine" not in section:
        section = {"model": {**raw["model"], **section}}
    config = validate({**raw, **section}, registry)  # nothing is known yet
    with pytest.raises(ConfigError) as error:
        compose(config, registry)
    assert f"  - {problem}" in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({"source": "path"}, "model: source=path needs model.path"),
        ({"source": "wheel"}, "model: source=wheel needs model.wheel"),
        ({"source": "hub"}, "model: source=hub needs model.repo"),
        ({"source": "disk"}, "model.source: Input should be 'none', 'path', 'wheel' or 'hub' (got 'disk')"),
        ({}, f"model: without model.source the shape must be stated; missing: {', '.join(SHAPE)}"),
        (
            dict.fromkeys(SHAPE, 8) | {"vocab": None},
            "model: without model.source the shape must be stated; missing: vocab",
        ),
    ],
)
def test_where_a_model_is_must_be_stated_whole(
    raw: Raw, registry: Registry, model: Raw, problem: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validate({**raw, "model": {"name": "tiny", **model}}, registry)
    assert problem in str(error.value)


def test_only_executors_read_shapes() -> None:
    registry = Registry.load()
    reading = [key for key, spec in registry.specs.items() if spec.describe_model]
    assert reading
    assert {kind for kind, _ in reading} == {"executor"}


def test_the_kernel_is_asked_before_the_executor_even_if_both_would_fail(
    raw: Raw, registry: Registry
) -> None:
    def boom(*args: object) -> None:
        raise ConfigError("the weights are not there")

    executor(registry, boom)
    add(registry, "kernel", lambda config, context: Kernel(["no"]))
    with pytest.raises(ServeLabError, match="cannot read the KV layout"):
        run({**raw, "kernel": "fake", "executor": "fake"}, registry)
    with pytest.raises(ConfigError, match="the weights are not there"):
        run({**raw, "kernel": None, "executor": "fake"}, registry)

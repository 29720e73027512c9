"""The configuration of a run: sections, defaults, and one message that names every mistake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, to_jsonable_python

from servelab.core.errors import ConfigError, PluginError, nearest
from servelab.core.facts import HardwareFacts
from servelab.core.families import KINDS
from servelab.core.registry import Registry
from servelab.core.request import SLO


class Section(BaseModel):
    """Base of our own sections. Plugins' models are plain pydantic models of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(Section):
    """One selected plugin with its validated settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(description="Name of the plugin within its kind.")
    config: Any = Field(default=None, description="Its settings; None if it takes none.")

    def settings(self) -> dict[str, Any]:
        """Every effective setting, defaults included, in JSON types."""
        return _plain(self.config) if isinstance(self.config, BaseModel) else {}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, in JSON types."""
        return _plain(self.config, exclude_defaults=True) if isinstance(self.config, BaseModel) else {}

    def parts(self) -> list[Part]:
        """The plugins chosen within its settings, in their order; not those within these."""
        return list(_parts(self.config))


class Part(Choice):
    """A plugin chosen within the settings of another, which builds it by ``Context.part``."""

    kind: str = Field(description="Kind of the plugin.")


_PLACE = "*"
"""Stands in problems of a part for where it was stated, which only pydantic knows."""


@dataclass(frozen=True)
class PartOf:
    """Marks a setting that chooses another plugin::

        inner: Annotated[Choice, PartOf("scheduler")]

    In a configuration it is a name, or a mapping with the name and settings, checked as a section is. Also
    within tuples, mappings and models of the settings. Validated on its own, a model asks what is installed.

    Args:
        kind: of the plugins to choose from.
    """

    kind: str

    @property
    def title(self) -> str:
        """The type, as ``servelab show`` tells it."""
        return f"a {self.kind}: its name, or a mapping with its name and settings"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(_part_settings, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"title": self.title, "part_of": self.kind, "anyOf": [{"type": "string"}, {"type": "object"}]}

    def _read(self, value: Any, info: core_schema.ValidationInfo) -> Part:
        if isinstance(value, Part) and value.kind == self.kind:
            return value
        registry = (info.context or {}).get("registry") or _installed()
        problems: list[str] = []
        choice = _choice(_PLACE, self.kind, value, registry, problems)
        if choice is None:
            problems = problems or [f"{_PLACE}.name: must name a {self.kind} (got {value!r})"]
            raise PydanticCustomError("part", "not a usable part", {"problems": problems})
        return Part(kind=self.kind, name=choice.name, config=choice.config)


def _part_settings(part: Part, info: core_schema.SerializationInfo) -> dict[str, Any]:
    """A part as it is stated in a configuration."""
    return {"name": part.name, **(part.changed() if info.exclude_defaults else part.settings())}


@cache
def _installed() -> Registry:
    return Registry.load()


def _parts(value: Any) -> Iterator[Part]:
    if isinstance(value, Part):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _parts(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)


SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_position")
MODEL_KINDS: dict[str, Any] = {
    "windows": (),
    "experts": 0,
    "experts_per_token": 0,
    "dense_layers": (),
    "dense_ffn": 0,
}
"""Further fields of a shape, and what they are in a plain model."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class ModelConfig(Section):
    """Where the model is, and its shape. What a shape field leaves at null is read from the model's files;
    without files, windows and experts left at null are none.
    """

    name: str = Field(description="Name shown in reports.")
    source: Literal["none", "path", "wheel", "hub"] = Field(
        default="none",
        description="Where the weights are: in model.path; in a wheel of the package index, by model.wheel; "
        "on the Hugging Face hub, by model.repo; none: a shape only, for executors that run no model.",
    )
    path: str | None = Field(
        default=None,
        description="With source path: a folder in Hugging Face format, or a GGUF file; cache:NAME is below "
        "ServeLab's cache folder.",
    )
    made_by: str | None = Field(
        default=None, description="With source path: the command that makes it, named where it is missing."
    )
    repo: str | None = Field(default=None, description="With source hub: the repository, OWNER/NAME.")
    revision: str | None = Field(
        default=None, description="With source hub: branch, tag or commit; null: its main branch."
    )
    wheel: str | None = Field(
        default=None, description="With source wheel: the requirement that pins it, NAME==VERSION."
    )
    wheel_sha256: str | None = Field(default=None, description="With source wheel: SHA-256 of the file.")
    wheel_member: str | None = Field(
        default=None, description="With source wheel: path of the GGUF file in it."
    )
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = Field(
        default="bfloat16", description="Of weights, activations and KV, before any quantization."
    )
    layers: int | None = Field(default=None, ge=1, description="Decoder layers.")
    hidden: int | None = Field(default=None, ge=1, description="Width of the residual stream, in elements.")
    heads: int | None = Field(default=None, ge=1, description="Query heads per layer.")
    kv_heads: int | None = Field(
        default=None, ge=1, description="Key and value heads per layer; divides heads."
    )
    head_dim: int | None = Field(default=None, ge=1, description="Width of one head, in elements.")
    ffn: int | None = Field(
        default=None,
        ge=1,
        description="Inner width of the feed-forward network (of one expert), in elements.",
    )
    vocab: int | None = Field(default=None, ge=1, description="Size of the vocabulary, in tokens.")
    max_position: int | None = Field(default=None, ge=1, description="Longest context, in tokens.")
    windows: tuple[int | None, ...] | None = Field(
        default=None,
        description="Per layer, the sliding window in tokens or null for full attention; empty: all full. "
        "Stated with the rest of a shape, or read from the files with it.",
    )
    experts: int | None = Field(default=None, ge=0, description="Experts per layer; 0: a dense model.")
    experts_per_token: int | None = Field(default=None, ge=0, description="Experts each token runs through.")
    dense_layers: tuple[int, ...] | None = Field(
        default=None, description="Layers without experts in a model of experts, counted from 0."
    )
    dense_ffn: int | None = Field(
        default=None,
        ge=0,
        description="Inner width of the feed-forward network of these layers, in elements.",
    )
    shared_experts: int | None = Field(
        default=None, ge=0, description="Further experts of the same width that every token runs through."
    )
    gated: bool | None = Field(
        default=None, description="Feed-forward networks have a gate (three matrices); false: two matrices."
    )
    tied_embeddings: bool | None = Field(
        default=None, description="The output head is the embedding, stored once."
    )
    kv_latent: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: elements of the latent that a token keeps instead of K and V.",
    )
    q_latent: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: latent that queries come from; 0: none.",
    )
    rope_dim: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: rotated elements of a key, kept beside the latent; part of head_dim.",
    )
    v_dim: int | None = Field(
        default=None, ge=0, description="Width of a value head where it is not head_dim; 0: it is."
    )
    origin: str | None = Field(default=None, description="Where the figures of the shape are from.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needs = {"path": "path", "wheel": "wheel", "hub": "repo"}.get(self.source)
        if needs and getattr(self, needs) is None:
            raise ValueError(f"source={self.source} needs model.{needs}")
        if self.source == "none" and (missing := self.unstated()):
            raise ValueError(f"without model.source the shape must be stated; missing: {', '.join(missing)}")
        return self

    def unstated(self) -> list[str]:
        """Shape fields still to be read from the model's files."""
        return [name for name in SHAPE if getattr(self, name) is None]


class AllReduce(Section):
    """A measured all-reduce: ``latency + 2 (n - 1) / n * bytes / bandwidth``."""

    devices: int = Field(ge=2, description="Devices taking part, n.")
    latency_ns: float = Field(ge=0, description="Latency, in nanoseconds.")
    bytes_per_s: float = Field(gt=0, description="Bandwidth, in bytes per second.")


class HardwareConfig(Section):
    """Figures of one device; null where a profile does not state the figure."""

    name: str = Field(description="Name shown in reports.")
    tp: int = Field(
        default=1, ge=1, description="Devices that share every layer of the model (tensor parallelism)."
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        description="Dense matrix FLOP/s of one device at 16-bit floats (on a CPU: at the model's dtype).",
    )
    flops_int8: float | None = Field(
        default=None, gt=0, description="The same at 8-bit integers, both operands."
    )
    flops_fp8: float | None = Field(
        default=None, gt=0, description="The same at 8-bit floats, both operands."
    )
    memory_bytes: int | None = Field(default=None, gt=0, description="Memory of one device, in bytes.")
    memory_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Memory bandwidth of one device, in bytes per second."
    )
    host_link_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Bandwidth between device and host, one way, in bytes per second."
    )
    link_bytes_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth between devices of one instance, one way, in bytes per second.",
    )
    network_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Bandwidth between instances, one way, in bytes per second."
    )
    idle_watts: float | None = Field(default=None, ge=0, description="Power of an idle device, in watts.")
    peak_watts: float | None = Field(
        default=None, gt=0, description="Power of a device at its limit, in watts."
    )
    price_per_hour: float | None = Field(default=None, ge=0, description="Of one device, in dollars.")
    mfu: float | None = Field(
        default=None, gt=0, le=1, description="Share of the peak FLOP/s that large matrix products reach."
    )
    mbu: float | None = Field(
        default=None, gt=0, le=1, description="Share of the memory bandwidth that large reads reach."
    )
    smoothness: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=True,
        description="Exponent of the smooth maximum of compute and memory time; inf: the greater of the two.",
    )
    op_ns: int | None = Field(default=None, ge=0, description="Time of an operation besides these, in ns.")
    layer_ns: int | None = Field(
        default=None,
        ge=0,
        description="Time of a layer besides its operations, in ns (an eager host).",
    )
    step_ns: int | None = Field(
        default=None,
        ge=0,
        description="Time of a step besides its layers, in ns (scheduling, sampling).",
    )
    request_ns: int | None = Field(
        default=None, ge=0, description="Time per request of a step besides its tokens, in ns."
    )
    all_reduce: tuple[AllReduce, ...] = Field(
        default=(), description="Measured all-reduces, one entry per number of devices."
    )
    sources: dict[str, str] = Field(default={}, description="Where each figure is from, by its name.")

    def facts(self) -> HardwareFacts:
        """What policies and cost models are given."""
        figures = self.model_dump(exclude={"sources", "all_reduce"})
        reduces = tuple((one.devices, one.latency_ns, one.bytes_per_s) for one in self.all_reduce)
        return HardwareFacts(**figures, all_reduce=reduces)


class EngineConfig(Section):
    """Limits of the device and how closely the engine checks its plugins."""

    max_batch_tokens: int = Field(
        default=8192, ge=1, description="Tokens one launch may run per step, drafts included."
    )
    max_batch_requests: int = Field(default=1024, ge=1, description="Requests one launch may name.")
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Prompt plus output tokens of one request; null: the model's max_position.",
    )
    lanes: int = Field(default=1, ge=1, description="Batches the device runs side by side.")
    max_in_flight: int = Field(
        default=1, ge=1, description="Launches queued per lane; 2 lets the scheduler plan one step ahead."
    )
    checks: Literal["basic", "full"] = Field(
        default="basic",
        description="full also checks the KV ledger's integrity and the lifetime of views; slower.",
    )


class SLOBounds(Section):
    """Bounds on one request, inclusive; null: not bounded."""

    ttft_ms: float | None = Field(default=None, gt=0, description="Time to first token, in milliseconds.")
    tpot_ms: float | None = Field(
        default=None, gt=0, description="Mean time per output token after the first, in milliseconds."
    )
    e2el_ms: float | None = Field(default=None, gt=0, description="End-to-end latency, in milliseconds.")
    tbt_ms: float | None = Field(
        default=None,
        gt=0,
        description="Longest time between two tokens of the request: every gap, in milliseconds.",
    )

    def bounds(self) -> SLO | None:
        """In nanoseconds; None if nothing is bounded."""
        ms = (self.ttft_ms, self.tpot_ms, self.e2el_ms, self.tbt_ms)
        ttft, tpot, e2el, tbt = (None if one is None else round(one * 1e6) for one in ms)
        slo = SLO(ttft_ns=ttft, tpot_ns=tpot, e2el_ns=e2el, tbt_ns=tbt)
        return None if slo == SLO() else slo


class SLOConfig(SLOBounds):
    """Bounds that goodput counts, for requests that state none of their own; null: not bounded."""

    classes: dict[str, SLOBounds] = Field(
        default={},
        description="Bounds by request class, such as {online: {ttft_ms: 250}, offline: {}}. They stand "
        "instead of the ones above, which hold for classes that are not named here.",
    )


class ClockConfig(Section):
    """Who owns time."""

    name: Literal["virtual", "wall"] = Field(
        default="virtual",
        description="virtual: the cost model prices every launch, runs repeat bit by bit; wall: time passes.",
    )


class ClusterConfig(Section):
    """Instances behind a router: each has its own engine, KV memory, and state of its policies."""

    instances: int = Field(default=1, ge=1, le=4096, description="Instances there are at the start.")
    max_instances: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Instances there may be at a time; null: as many as at the start.",
    )
    report_interval_ms: float = Field(
        default=0.0,
        ge=0,
        description="Time between the reports that the router sees of each instance, in milliseconds; 0: an "
        "instance reports at once whatever happens to it.",
    )
    network_gb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth of each instance's network link, one way, in 1e9 bytes per second; null: "
        "hardware.network_bytes_per_s.",
    )
    network_latency_us: float = Field(
        default=10.0,
        ge=0,
        description="Time of a transfer between instances besides its bytes, in microseconds. The default is "
        "a round figure of ours.",
    )
    start_s: float | None = Field(
        default=None,
        ge=0,
        description="Time until a new instance is ready, in seconds; null: what the cost model says it takes "
        "to load the weights.",
    )

    @model_validator(mode="after")
    def _at_most(self) -> Self:
        if self.max_instances is not None and self.max_instances < self.instances:
            raise ValueError(f"max_instances must be at least instances, {self.instances}")
        return self


class QualityConfig(Section):
    """How quantized models are compared with the unquantized one."""

    max_tokens: int = Field(
        default=8192,
        ge=0,
        description="Tokens of held-out text that a quantized run reads through both models after serving, "
        "at most; 0: quality is not measured.",
    )
    window: int = Field(
        default=1024,
        ge=16,
        description="Tokens read at a time, none before them in sight; the model's context if that is less.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.max_tokens == 1:
            raise ValueError(
                "max_tokens is 0 (measure nothing) or at least 2: the first token is not predicted"
            )
        return self


class RunConfig(Section):
    """Everything that decides a run. One section per kind of plugin; null: none of that kind."""

    seed: int = Field(default=0, ge=0, description="Every generator of the run derives from it.")
    scheduler: Choice = Field(description="What each request does next.")
    kvcache: Choice = Field(description="Which pages a request gets.")
    prefix: Choice | None = Field(default=None, description="Reuse of computed KV.")
    semantic: Choice | None = Field(default=None, description="Answers before the engine.")
    quant: Choice | None = Field(default=None, description="Weight and activation formats.")
    kvquant: Choice | None = Field(default=None, description="KV codec.")
    kernel: Choice | None = Field(default=None, description="Attention and linear kernels.")
    spec: Choice | None = Field(default=None, description="Speculation: drafts and their length.")
    grammar: Choice | None = Field(default=None, description="Token masks.")
    router: Choice | None = Field(default=None, description="Dispatch over several engines.")
    app: Choice | None = Field(default=None, description="Graphs of calls and tools.")
    cost: Choice = Field(description="Price of a batch.")
    observers: tuple[Choice, ...] = Field(default=(), description="Who watches, in order of notification.")
    workload: Choice = Field(description="The traffic.")
    executor: Choice = Field(description="Where it runs.")
    task: Choice = Field(description="What is done with the run.")
    model: ModelConfig = Field(description="Shape of the model.")
    hardware: HardwareConfig | None = Field(default=None, description="The device; null: unknown.")
    engine: EngineConfig = Field(default=EngineConfig(), description="Limits and checks.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="Instances behind a router.")
    slo: SLOConfig = Field(default=SLOConfig(), description="Default bounds of requests.")
    clock: ClockConfig = Field(default=ClockConfig(), description="Who owns time.")
    quality: QualityConfig = Field(
        default=QualityConfig(), description="Measurement of quality in quantized runs."
    )

    def choices(self) -> list[tuple[str, Choice]]:
        """Every selected plugin as ``(kind, choice)``, in the order of ``KINDS``; observers in their own.
        ``Choice.parts`` has those chosen within their settings.
        """
        found: list[tuple[str, Choice]] = []
        for kind in KINDS:
            value = self.observers if kind == "observer" else getattr(self, kind)
            found += [(kind, c) for c in (value if isinstance(value, tuple) else (value,)) if c is not None]
        return found

    def settings(self) -> dict[str, Any]:
        """Every effective setting of the run, defaults included, in JSON types."""
        out: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Choice):
                out[name] = {"name": value.name, **value.settings()}
            elif name == "observers":
                out[name] = [{"name": choice.name, **choice.settings()} for choice in self.observers]
            else:
                out[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        return out


PLUGIN_SECTIONS: dict[str, str] = {("observers" if kind == "observer" else kind): kind for kind in KINDS}
"""Section name -> kind of the plugins it selects."""


_UNKNOWN = Choice(name="unknown")


def validate(raw: Mapping[str, Any], registry: Registry) -> RunConfig:
    """Check a whole configuration at once.

    Raises:
        ConfigError: one error that names every problem by its dotted path.
    """
    problems: list[str] = []
    # null is "not stated" for our own sections; an unknown key stays, to be refused by its name
    data = {str(k): v for k, v in raw.items() if v is not None or k not in RunConfig.model_fields}
    if isinstance(data.get("hardware"), Mapping) and data["hardware"].get("name", "") in (None, "none"):
        del data["hardware"]  # `hardware=null` over a file that chose one
    for section, kind in PLUGIN_SECTIONS.items():
        known_problems = len(problems)
        if section == "observers":
            data[section] = _observers(data.get(section, ()), registry, problems)
            continue
        choice = _choice(section, kind, data[section], registry, problems) if section in data else None
        if choice is None and RunConfig.model_fields[section].is_required():
            if len(problems) == known_problems:
                problems.append(f"{section}: missing; {nearest('', registry.names(kind))}")
            choice = _UNKNOWN  # its problem is told: the model below must not tell it again
        data[section] = choice
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as exc:
        problems += describe(exc, RunConfig)
    else:
        problems += across(config)
    if problems or config is None:
        raise refusal(problems)
    return config


def refusal(problems: list[str]) -> ConfigError:
    """All problems of a configuration as one error."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError(
        "\n".join([f"{count} in the configuration:", *(f"  - {p}" for p in problems)]),
        do="`servelab plugins` lists all plugins, `servelab show KIND NAME` the settings of one",
    )


def choice_of(kind: str, value: Any, registry: Registry, where: str) -> Choice:
    """A plugin chosen by a name, or by a mapping with its name and settings, at a place of the configuration.

    Raises:
        ConfigError: every problem of it.
    """
    problems: list[str] = []
    choice = _choice(where, kind, value, registry, problems)
    if choice is None:
        raise refusal(problems or [f"{where}.name: must name a plugin (got {value!r})"])
    return choice


def _observers(value: Any, registry: Registry, problems: list[str]) -> tuple[Choice, ...]:
    if not isinstance(value, (list, tuple)):
        problems.append(f"observers: must be a list of names or of mappings with a name (got {value!r})")
        return ()
    found: list[Choice] = []
    for index, item in enumerate(value):
        choice = _choice(f"observers.{index}", "observer", item, registry, problems)
        if choice is None:
            continue
        if any(choice.name == other.name for other in found):
            problems.append(
                f"observers.{index}: {choice.name!r} is listed twice; both would write the same files: "
                "list it once, with all its settings"
            )
        found.append(choice)
    return tuple(found)


def _choice(path: str, kind: str, value: Any, registry: Registry, problems: list[str]) -> Choice | None:
    """One plugin section, or None with the problem noted (or when it says that there is none)."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        problems.append(f"{path}: must be a mapping with a name (got {value!r})")
        return None
    fields = {str(key): item for key, item in value.items()}
    if "name" not in fields:
        problems.append(f"{path}.name: missing; {nearest('', registry.names(kind))}")
        return None
    name = fields.pop("name")
    if name is None or name == "none":
        return None  # whatever else the section holds was for the plugin it replaces
    if not isinstance(name, str):
        problems.append(f"{path}.name: must be a name (got {name!r})")
        return None
    try:
        model = registry.resolve(kind, name, "config")
    except PluginError as exc:
        problems.append(f"{path}.name: {_indented(exc)}")
        return None
    if model is None:
        problems += [
            f"{path}.{key}: {kind} {name!r} takes no settings (got {fields[key]!r})" for key in fields
        ]
        return Choice(name=name)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        problems.append(f"{path}.name: the config of {kind} {name!r} is {model!r}, not a pydantic model")
        return None
    try:
        return Choice(name=name, config=model.model_validate(fields, context={"registry": registry}))
    except ValidationError as exc:
        problems += describe(exc, model, path)
        return None


def across(config: RunConfig) -> list[str]:
    """Rules between sections and between fields."""
    model, length = config.model, config.engine.max_model_len
    if model.unstated():
        return []  # compose() reads them and comes back here
    assert model.max_position and model.heads and model.kv_heads
    problems: list[str] = []
    if length is not None and length > model.max_position:
        problems.append(
            f"engine.max_model_len: must be at most model.max_position, {model.max_position} (got {length})"
        )
    if model.heads % model.kv_heads:
        problems.append(f"model.kv_heads: must divide model.heads, {model.heads} (got {model.kv_heads})")
    if model.windows and len(model.windows) != model.layers:
        problems.append(
            f"model.windows: must have one entry per layer, {model.layers} (got {len(model.windows)})"
        )
    experts, per_token = model.experts or 0, model.experts_per_token or 0
    if per_token > experts:
        problems.append(
            f"model.experts_per_token: must be at most model.experts, {experts} (got {per_token})"
        )
    if dense := model.dense_layers:
        if not experts or not model.dense_ffn:
            problems.append("model.dense_layers: needs model.experts and model.dense_ffn")
        if not all(0 <= layer < (model.layers or 0) for layer in dense):
            problems.append(
                f"model.dense_layers: must be layers 0 to {(model.layers or 0) - 1} (got {dense})"
            )
    return problems


def describe(exc: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """A pydantic error as lines ``path: message (got value)``; the nearest names follow an unknown field."""
    lines: list[str] = []
    for error in exc.errors(include_url=False):
        loc = error["loc"]
        path = ".".join([*([prefix] if prefix else []), *map(str, loc)]) or "(root)"
        if error["type"] == "part":
            lines += [path + problem.removeprefix(_PLACE) for problem in error["ctx"]["problems"]]
        elif error["type"] == "extra_forbidden":
            known = nearest(str(loc[-1]), _fields_at(model, loc[:-1]))
            lines.append(f"{path}: unknown field (got {error['input']!r}); {known}")
        elif error["type"] == "missing":
            lines.append(f"{path}: missing")
        elif error["type"] == "value_error":  # a validator's own sentence
            lines.append(f"{path}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})")
        else:
            lines.append(f"{path}: {error['msg']} (got {error['input']!r})")
    return lines


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the model found by following an error's location; empty where it cannot be followed."""
    parts = iter(loc)
    for part in parts:
        field = model.model_fields.get(str(part))
        if field is not None and get_origin(field.annotation) is dict:
            next(parts, None)  # a key of the mapping
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)] if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _plain(model: BaseModel, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """A model in JSON types; infinities as words, for which JSON has no number and which pydantic reads."""
    # in one go, mode="json" would make infinities null below a serializer of the plugin's own
    dumped = to_jsonable_python(model.model_dump(exclude_defaults=exclude_defaults))
    return {key: _finite(value) for key, value in dumped.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _indented(exc: Exception) -> str:
    return str(exc).replace("\n", "\n    ")

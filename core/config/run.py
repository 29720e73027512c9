"""The configuration of a run: its sections, their defaults, and one message that names every mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from servelab.core.config.choice import Choice, read_choice, refusal
from servelab.core.config.hardware import HardwareConfig
from servelab.core.config.model import ModelConfig
from servelab.core.config.section import Section, describe
from servelab.core.config.serving import (
    ClockConfig,
    ClusterConfig,
    EngineConfig,
    QualityConfig,
    SLOConfig,
)
from servelab.core.errors import nearest
from servelab.core.families import KINDS
from servelab.core.registry import Registry


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
        choice = read_choice(section, kind, data[section], registry, problems) if section in data else None
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


def _observers(value: Any, registry: Registry, problems: list[str]) -> tuple[Choice, ...]:
    if not isinstance(value, (list, tuple)):
        problems.append(f"observers: must be a list of names or of mappings with a name (got {value!r})")
        return ()
    found: list[Choice] = []
    for index, item in enumerate(value):
        choice = read_choice(f"observers.{index}", "observer", item, registry, problems)
        if choice is None:
            continue
        if any(choice.name == other.name for other in found):
            problems.append(
                f"observers.{index}: {choice.name!r} is listed twice; both would write the same files: "
                "list it once, with all its settings"
            )
        found.append(choice)
    return tuple(found)


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
    if experts and not per_token:
        problems.append(f"model.experts_per_token: must be stated, for there are {experts} experts (got 0)")
    if model.shared_experts and not experts:
        problems.append("model.shared_experts: needs model.experts")
    if (model.q_latent or model.rope_dim) and not model.kv_latent:
        problems.append("model.q_latent and model.rope_dim: need model.kv_latent")
    if (model.rope_dim or 0) > (model.head_dim or 0):
        problems.append(f"model.rope_dim: is part of model.head_dim, {model.head_dim} (got {model.rope_dim})")
    if dense := model.dense_layers:
        if not experts or not model.dense_ffn:
            problems.append("model.dense_layers: needs model.experts and model.dense_ffn")
        if not all(0 <= layer < (model.layers or 0) for layer in dense):
            problems.append(
                f"model.dense_layers: must be layers 0 to {(model.layers or 0) - 1} (got {dense})"
            )
    return problems

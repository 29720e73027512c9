"""Every mistake is found, named by its path, and told in one message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from servelab.core.config import Choice, validate
from servelab.core.errors import ConfigError
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    depth: int = Field(1, description="how deep")


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    share: float = Field(0.5, ge=0, le=1, description="a share")
    inner: Inner | None = Field(None, description="something nested")


def problems(raw: dict[str, Any], registry: Registry) -> list[str]:
    with pytest.raises(ConfigError) as error:
        validate(raw, registry)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines() if line.startswith("  - ")]


def test_defaults_are_filled_in(raw: dict[str, Any], registry: Registry) -> None:
    config = validate(raw, registry)
    assert config.scheduler.config.max_num_seqs == 256
    assert config.engine.checks == "basic"
    assert (config.observers, config.quant, config.hardware) == ((), None, None)
    settings = config.settings()
    assert settings["kvcache"] == {"name": "paged", "page_tokens": 16, "watermark": 0.0}
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings


def test_settings_without_end_are_words(raw: dict[str, Any], registry: Registry) -> None:
    raw["workload"] |= {"request_rate": float("inf")}
    config = validate(raw, registry)
    assert config.settings()["workload"]["request_rate"] == "inf"
    assert config.workload.changed()["request_rate"] == "inf"
    assert validate({**raw, "workload": config.settings()["workload"]}, registry) == config


class Own(BaseModel):
    """Settings that are written by a serializer of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    patience: float = Field(1.0, description="seconds; may be inf")
    where: tuple[int, ...] = Field((1, 2), description="a tuple")

    @model_serializer(mode="wrap")
    def _own(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return dict(dump(self))


def test_endless_settings_below_a_serializer_are_words_too() -> None:
    own = Choice(name="own", config=Own(patience=float("inf")))
    assert own.settings() == {"patience": "inf", "where": [1, 2]}
    assert own.changed() == {"patience": "inf"}


def test_all_problems_at_once(raw: dict[str, Any], registry: Registry) -> None:
    raw["scheduler"] = {"name": "vllm_v1", "max_num_seq": 3, "hold_steps": "many"}
    raw["kvcache"] = {"name": "pagd"}
    raw["task"] = {"name": "bench", "speed": 2}
    raw["engine"] = {"lanez": 2, "checks": "fast", "max_in_flight": 0}
    raw["observers"] = ["jsonl", {"name": "jsnol"}, 3, {"plans": False}]
    raw["model"]["layers"] = "x"
    raw["slo"] = {"ttft": 3}
    raw["slo"] |= {"classes": {"online": {"ttf_ms": 1}, "offline": {"tpot_ms": -1}, "deadline": 7}}
    raw["enigne"] = None
    del raw["cost"]
    found = problems(raw, registry)
    expected = [
        ("scheduler.max_num_seq: unknown field (got 3); did you mean 'max_num_seqs'?",),
        ("scheduler.hold_steps: ", "(got 'many')"),
        ("kvcache.name: unknown kvcache 'pagd'",),
        ("task.speed: task 'bench' takes no settings (got 2)",),
        ("engine.lanez: unknown field (got 2); did you mean 'lanes'?",),
        ("engine.checks: ", "(got 'fast')"),
        ("engine.max_in_flight: ", "(got 0)"),
        ("observers.1.name: unknown observer 'jsnol'",),
        ("observers.2: must be a mapping with a name (got 3)",),
        ("observers.3.name: missing; known: jsonl",),
        ("model.layers: ", "(got 'x')"),
        ("slo.ttft: unknown field (got 3); did you mean 'ttft_ms'?",),
        ("slo.classes.online.ttf_ms: unknown field (got 1); did you mean 'ttft_ms'?",),
        ("slo.classes.offline.tpot_ms: ", "greater than 0 (got -1)"),
        ("slo.classes.deadline: ", "(got 7)"),
        ("enigne: unknown field (got None); did you mean 'engine'?",),
        ("cost: missing; ", "scripted"),
    ]
    for start, *rest in expected:
        (line,) = (line for line in found if line.startswith(start))
        assert all(part in line for part in rest)
    assert len(found) == len(expected)


BOUNDS = sorted((Path(__file__).parents[2] / "configs" / "slo").glob("*.yaml"))


@pytest.mark.parametrize("path", BOUNDS, ids=lambda path: path.stem)
def test_bounds_in_files_are_valid_and_have_their_source(
    path: Path, raw: dict[str, Any], registry: Registry
) -> None:
    text = path.read_text(encoding="utf-8")
    slo = validate({**raw, "slo": yaml.safe_load(text)}, registry).slo
    stated = slo.bounds() is not None or any(one.bounds() for one in slo.classes.values())
    assert stated == (path.stem != "none")
    assert not stated or re.search(r"\((OSDI|NSDI|ASPLOS) 20\d\d", text)


def test_unknown_plugin_comes_with_the_nearest(raw: dict[str, Any], registry: Registry) -> None:
    raw["kvcache"] = {"name": "pagd"}
    with pytest.raises(ConfigError, match="did you mean 'paged'"):
        validate(raw, registry)


@pytest.mark.parametrize("absent", [None, {"name": None}, {"name": "none", "bits": 4}, "none"])
def test_none_means_no_plugin(raw: dict[str, Any], registry: Registry, absent: object) -> None:
    assert validate({**raw, "quant": absent}, registry).quant is None
    (found,) = problems({**raw, "scheduler": absent}, registry)
    assert found.startswith("scheduler: missing; known: ") and "vllm_v1" in found


def test_name_alone_is_enough(raw: dict[str, Any], registry: Registry) -> None:
    assert validate({**raw, "scheduler": "vllm_v1"}, registry) == validate(raw, registry)


@pytest.mark.parametrize(
    ("section", "value", "problem"),
    [
        ("engine", {"max_model_len": 513}, "engine.max_model_len: must be at most model.max_position, 512"),
        ("model", {"kv_heads": 3}, "model.kv_heads: must divide model.heads, 4 (got 3)"),
        ("model", {"windows": [None]}, "model.windows: must have one entry per layer, 2 (got 1)"),
        ("model", {"experts_per_token": 1}, "model.experts_per_token: must be at most model.experts, 0"),
        ("model", {"experts": 4}, "model.experts_per_token: must be stated, for there are 4 experts (got 0)"),
        ("model", {"shared_experts": 1}, "model.shared_experts: needs model.experts"),
        ("model", {"q_latent": 8}, "model.q_latent and model.rope_dim: need model.kv_latent"),
        ("model", {"kv_latent": 8, "rope_dim": 99}, "model.rope_dim: is part of model.head_dim, "),
        (
            "hardware",
            {"name": "h", "idle_watts": 9, "peak_watts": 8},
            "hardware.peak_watts: must be at least idle_watts, 9",
        ),
        (
            "hardware",
            {"name": "h", "all_reduce": [{"devices": 2, "latency_ns": 1, "bytes_per_s": n} for n in (1, 2)]},
            "hardware.all_reduce: two entries for 2 devices",
        ),
        ("model", {"dense_layers": [0]}, "model.dense_layers: needs model.experts and model.dense_ffn"),
        (
            "model",
            {"dense_layers": [2], "experts": 4, "experts_per_token": 1, "dense_ffn": 8},
            "model.dense_layers: must be layers 0 to 1 (got (2,))",
        ),
        ("hardware", {"name": "h", "flops": float("inf")}, "hardware.flops: "),
        (
            "hardware",
            {"name": "h", "flops": 312},
            "hardware.flops: must be at least 1e+06; it is in FLOP/s: 312",
        ),
        (
            "hardware",
            {"name": "h", "memory_bytes_per_s": 2039},
            "hardware.memory_bytes_per_s: must be at least 1e+06; it is in bytes/s",
        ),
        ("clock", {"name": "wal"}, "clock.name: "),
        ("observers", "jsonl", "observers: must be a list"),
        ("observers", ["jsonl", {"name": "jsonl"}], "observers.1: 'jsonl' is listed twice"),
        ("observers", ["jsonl", {"name": "jsonl", "plans": False}], "observers.1: 'jsonl' is listed twice"),
        ("executor", {"name": "scripted", "num_kv_pages": 10**9}, "executor.num_kv_pages: "),
        ("executor", {"name": "scripted", "num_host_pages": 10**9}, "executor.num_host_pages: "),
        ("scheduler", 5, "scheduler: must be a mapping with a name (got 5)"),
        ("scheduler", {"name": 5}, "scheduler.name: must be a name (got 5)"),
        ("scheduler", {}, "scheduler.name: missing; known: aggressive"),
    ],
)
def test_one_problem(raw: dict[str, Any], registry: Registry, section: str, value: Any, problem: str) -> None:
    raw[section] = {**raw["model"], **value} if section == "model" else value
    (found,) = problems(raw, registry)
    assert found.startswith(problem)


def test_plugins_models_and_names(raw: dict[str, Any], registry: Registry) -> None:
    registry.add("prefix", PluginSpec(name="p", factory="a:b"), factory=dict, config=Settings)
    config = validate({**raw, "prefix": {"name": "p", "inner": {"depth": 3}}}, registry)
    assert config.prefix == Choice(name="p", config=Settings(inner=Inner(depth=3)))
    assert ("prefix", config.prefix) in config.choices()
    (found,) = problems({**raw, "prefix": {"name": "p", "inner": {"dept": 3}}}, registry)
    assert found == "prefix.inner.dept: unknown field (got 3); did you mean 'depth'? known: depth"


def test_a_config_that_is_no_model_is_the_packages_fault(raw: dict[str, Any], registry: Registry) -> None:
    registry.add("prefix", PluginSpec(name="p", factory="a:b"), factory=dict, config=dict)
    (found,) = problems({**raw, "prefix": "p"}, registry)
    assert "not a pydantic model" in found


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"prompt_length": {"law": "empirical", "values": [1], "path": "x"}},
            "prompt_length.empirical.path: unknown field (got 'x'); known: law, max, min, values",
        ),
        (
            {"classes": [{"name": "a", "ttft": 5}]},
            "classes.0.ttft: unknown field (got 5); did you mean 'ttft_ms'?",
        ),
        (
            {"output_length": {"law": "mixture", "parts": [{"length": {"law": "zipf", "alpa": 1}}]}},
            "output_length.mixture.parts.0.length.zipf.alpa: unknown field (got 1); did you mean 'alpha'?",
        ),
    ],
)
def test_fields_are_known_inside_lists_and_laws(
    raw: dict[str, Any], registry: Registry, settings: dict[str, Any], problem: str
) -> None:
    raw["workload"] = {"name": "synthetic", **settings}
    assert any(found.startswith(f"workload.{problem}") for found in problems(raw, registry)), problems(
        raw, registry
    )


def test_a_file_of_settings_is_no_plugin_within_another(raw: dict[str, Any], registry: Registry) -> None:
    for name, told in (("sharegpt_like", True), ("sharegtp_like", False)):
        raw["workload"] = {"name": "transform", "of": name, "steps": []}
        with pytest.raises(ConfigError, match=f"workload.of.name: unknown workload {name!r}") as error:
            validate(raw, registry)
        assert ("is a file of settings" in str(error.value)) == told
        assert ("python run.py workload=sharegpt_like --cfg job" in str(error.value)) == told

"""docs/reference/catalog.md: the models and devices of ``configs/model`` and ``configs/hardware``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import yaml

from docs_pages.markdown import ROOT, page, table
from servelab.core.config import DTYPE_BYTES, HardwareConfig, ModelConfig
from servelab.core.facts import ModelFacts
from servelab.core.sites import parameters, weight_bytes

INTRO = """What `model=NAME` and `hardware=NAME` choose from, by the files in `configs/model` and
`configs/hardware`. Any figure can be overridden (`hardware.mfu=0.5`, `model.max_position=131072`); your own
files work in the same way. How to [choose](../howto/choose_a_model_and_a_device.md) and how to
[add a device](../howto/add_a_device.md)."""
MODELS = """Parameters are counted from the shape, without biases; they are held to the totals that
transformers counts in its own classes of these shapes, which are the published ones, within 0.01 %
(OPT, whose learned positions are left out: 0.1 %; `tests/catalog`). Active: those one token runs
through. Weights and KV per token are unquantized, at the dtype; the KV of latent attention is the
latent and the rotated key."""
DEVICES = """Peaks are dense. Memory is what the driver leaves, not what the box says. Efficiency factors
(`mfu`, `mbu`, `smoothness`, `op_ns`) are fits on measurements where the source says so, and taken from a
relative where it says that; a report prints those in force."""
_BIG = {"flops", "flops_int8", "flops_fp8"}
_RATE = {"memory_bytes_per_s", "host_link_bytes_per_s", "link_bytes_per_s", "network_bytes_per_s"}


def models() -> Iterator[tuple[ModelConfig, ModelFacts]]:
    """The models with a stated shape, by name."""
    for path in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        one = ModelConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        if not one.unstated():
            shape = one.model_dump(include={f.name for f in fields(ModelFacts)}, exclude_none=True)
            yield one, ModelFacts(**shape, dtype_bytes=DTYPE_BYTES[one.dtype])


def devices() -> Iterator[HardwareConfig]:
    """The devices, by name."""
    for path in sorted((ROOT / "configs" / "hardware").glob("*.yaml")):
        yield HardwareConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def _model(one: ModelConfig, shape: ModelFacts) -> tuple[str, ...]:
    total, active = parameters(shape), parameters(shape, active=True)
    kv = shape.kv_bytes_per_token_layer * shape.layers / 1024
    attention = "latent" if shape.kv_latent else f"{shape.heads}/{shape.kv_heads} x {shape.head_dim}"
    ffn = f"{shape.ffn}"
    if shape.experts:
        shared = f" + {shape.shared_experts}" if shape.shared_experts else ""
        ffn = f"{shape.experts_per_token} of {shape.experts}{shared} x {ffn}"
    return (
        f"`{one.name}`",
        f"{total / 1e9:,.3f}" + (f" ({active / 1e9:,.2f} active)" if active != total else ""),
        f"{weight_bytes(shape, None) / 2**30:,.2f}",
        f"{kv:,.4g}",
        f"{shape.layers} x {shape.hidden}",
        attention,
        ffn,
        f"{shape.max_position:,}",
        one.origin or "see the file",
    )


def _value(name: str, value: Any) -> str:
    if name in _BIG:
        return f"{value / 1e12:,.4g} TFLOP/s"
    if name in _RATE:
        return f"{value / 1e9:,.4g} GB/s"
    if name == "memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    if name == "all_reduce":
        return "; ".join(
            f"{one.devices}: {one.latency_ns / 1e3:g} us, {one.bytes_per_s / 1e9:g} GB/s" for one in value
        )
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _device(one: HardwareConfig) -> str:
    rows = [
        (f"`{name}`", _value(name, getattr(one, name)), one.sources.get(name, "not stated"))
        for name in HardwareConfig.model_fields
        if name not in ("name", "tp", "sources") and getattr(one, name) not in (None, ())
    ]
    return table(("figure", "value", "source"), rows)


def render() -> str:
    """The whole page."""
    head = (
        *("`model=`", "parameters, billions", "weights, GiB", "KV per token, KiB", "layers x width"),
        *("heads/KV heads x width", "feed-forward", "context", "source"),
    )
    parts = [INTRO, "## Models", MODELS, table(head, [_model(*one) for one in models()])]
    parts += ["## Devices", DEVICES]
    for one in devices():
        parts += [f"### {one.name}", _device(one)]
    return page("Catalog of models and devices", *parts)

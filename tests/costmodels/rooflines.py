"""Devices, models and rooflines for the tests of the roofline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from servelab.core.config import DTYPE_BYTES, HardwareConfig, ModelConfig
from servelab.core.context import Context
from servelab.core.facts import HardwareFacts, ModelFacts
from servelab.core.testing.fakes import toy_limits
from servelab.plugins.costmodels.roofline.cost import RooflineCost
from servelab.plugins.costmodels.roofline.factors import RooflineConfig

CONFIGS = Path(__file__).parents[2] / "configs"
IDEAL = yaml.safe_load((CONFIGS / "cost" / "roofline_ideal.yaml").read_text())


def model(name: str, **changes: Any) -> ModelFacts:
    """A model of the catalog."""
    stated = ModelConfig(**yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))
    known = set(ModelFacts.__dataclass_fields__)
    shape = stated.model_dump(include=known, exclude_none=True)
    return replace(ModelFacts(**shape, dtype_bytes=DTYPE_BYTES[stated.dtype]), **changes)


def device(name: str, **changes: Any) -> HardwareFacts:
    """A device of the catalog."""
    stated = yaml.safe_load((CONFIGS / "hardware" / f"{name}.yaml").read_text())
    return replace(HardwareConfig(**stated).facts(), **changes)


def roofline(
    of: ModelFacts, on: HardwareFacts | None, *, quant: Any = None, layout: Any = None, **settings: Any
) -> RooflineCost:
    context = Context(
        kind="cost",
        name="roofline",
        rng=Random(0),
        model=of,
        hardware=on,
        limits=toy_limits(tokens=8192, requests=512),
        quant=quant,
        layout=layout,
    )
    return RooflineCost(RooflineConfig(**settings), context)


def ideal(of: ModelFacts, on: HardwareFacts, **more: Any) -> RooflineCost:
    """At the datasheet's bound."""
    settings = {key: value for key, value in IDEAL.items() if key != "name"}
    return roofline(of, on, **settings | more)

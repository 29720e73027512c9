"""The catalog of devices: every figure stated has its source, and no source is without its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from servelab.core.config import HardwareConfig

FOLDER = Path(__file__).parents[2] / "configs" / "hardware"
DEVICES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GIB = 2**30

DATASHEET = {
    # bf16 TFLOP/s, GB, GB/s
    "a100_40g": (312, 40, 1555),
    "a100_80g": (312, 80, 2039),
    "h100": (989, 80, 3350),
    "h200": (989, 141, 4800),
    "l4": (121, 24, 300),
    "a10g": (70, 24, 600),
    "l40s": (362, 48, 864),
    "a40": (149.7, 48, 696),
    "rtx4090": (165.2, 24, 1008),
}
"""Dense products of 16-bit floats, without sparsity."""


def raw(name: str) -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source_and_every_source_a_figure(name: str) -> None:
    stated = raw(name)
    HardwareConfig.model_validate(stated)
    figures = {key for key, value in stated.items() if key not in ("name", "sources") and value is not None}
    assert figures == set(stated["sources"])
    assert all(len(text) > 3 for text in stated["sources"].values())
    assert stated["name"] == name


@pytest.mark.parametrize("name", DATASHEET)
def test_what_cost_models_need_is_stated(name: str) -> None:
    needed = ("flops", "flops_int8", "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s", "peak_watts")
    factors = ("mfu", "mbu", "smoothness", "op_ns", "layer_ns", "step_ns", "request_ns")
    one = HardwareConfig.model_validate(raw(name)).facts()
    assert [key for key in (*needed, *factors) if getattr(one, key) is None] == []


@pytest.mark.parametrize("name", DATASHEET)
def test_the_datasheet(name: str) -> None:
    teraflops, gigabytes, bandwidth = DATASHEET[name]
    one = HardwareConfig.model_validate(raw(name))
    assert one.flops == teraflops * 1e12
    assert one.memory_bytes_per_s == bandwidth * 1e9
    assert one.memory_bytes is not None
    assert 0.9 * gigabytes < one.memory_bytes / GIB < gigabytes  # makers count GiB, and the driver keeps some


def test_the_datasheet_above_names_every_accelerator() -> None:
    assert set(DATASHEET) == {name for name in DEVICES if raw(name).get("peak_watts")}


@pytest.mark.parametrize(("name", "tokens"), [("a100_80g", 153), ("h100", 295), ("h200", 206)])
def test_ridge(name: str, tokens: int) -> None:
    """Tokens from which a 16-bit matrix product is bound by compute."""
    one = HardwareConfig.model_validate(raw(name))
    assert one.flops and one.memory_bytes_per_s
    assert one.flops / one.memory_bytes_per_s == pytest.approx(tokens, abs=0.5)


def test_efficiency_factors_are_the_fits() -> None:
    fits = {
        name: (one["mfu"], one["mbu"], one["op_ns"], one["smoothness"])
        for name in ("a100_80g", "h100", "a40")
        for one in [raw(name)]
    }
    assert fits == {
        "a100_80g": (0.741, 0.812, 4600, 1.5),
        "h100": (0.732, 0.941, 5700, 1.7),
        "a40": (0.787, 0.799, 3400, 1.6),
    }

"""A context small enough to read, and one call that builds the workload from plain settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servelab.core.api import Context, Limits, ModelFacts
from servelab.core.context import seeded
from servelab.plugins.workloads.synthetic import Synthetic, SyntheticConfig

TOY = ModelFacts(
    name="toy",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=259,
    max_position=4096,
)


@pytest.fixture
def context() -> Callable[..., Context]:
    def make(seed: int = 0, max_model_len: int = 4096) -> Context:
        return Context(
            kind="workload",
            name="synthetic",
            rng=seeded(seed, "workload", "synthetic"),
            model=TOY,
            hardware=None,
            limits=Limits(max_batch_tokens=512, max_batch_requests=32, max_model_len=max_model_len),
        )

    return make


@pytest.fixture
def build(context: Callable[..., Context]) -> Callable[..., Synthetic]:
    """``build(seed=1, num_requests=8, ...)``: settings as a configuration file has them."""

    def make(*, seed: int = 0, max_model_len: int = 4096, **settings: Any) -> Synthetic:
        return Synthetic(SyntheticConfig.model_validate(settings), context(seed, max_model_len))

    return make

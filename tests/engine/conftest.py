"""Hypothesis profiles: short by default, long for tests marked ``slow``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servelab.core.context import Context, seeded
from servelab.core.facts import Limits
from servelab.core.testing.fakes import TOY_MODEL
from servelab.plugins.kvcache.paged import Paged, PagedConfig
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config


def _context(kind: str, name: str, limits: Limits, seed: int = 0) -> Context:
    rng = seeded(seed, kind, name)
    return Context(kind=kind, name=name, rng=rng, model=TOY_MODEL, hardware=None, limits=limits)


@pytest.fixture
def vllm() -> Callable[..., VllmV1]:
    """``vllm(limits, hold_steps=8, ...)``: the scheduler under test; budgets default to the device's."""

    def make(limits: Limits, **settings: Any) -> VllmV1:
        settings.setdefault("max_num_batched_tokens", limits.max_batch_tokens)
        settings.setdefault("max_num_seqs", limits.max_batch_requests)
        return VllmV1(VllmV1Config(**settings), _context("scheduler", "vllm_v1", limits))

    return make


@pytest.fixture
def paged() -> Callable[..., Paged]:
    """``paged(limits, page_tokens=4)``."""

    def make(limits: Limits, page_tokens: int = 4) -> Paged:
        return Paged(PagedConfig(page_tokens=page_tokens), _context("kvcache", "paged", limits))

    return make

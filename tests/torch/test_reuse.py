"""Prefix reuse on real models: the same tokens with and without it, and the same plans as without a model."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.torch.test_executor import (  # noqa: F401 - fixtures
    PROMPTS,
    SHAPE,
    Compose,
    Given,
    Keep,
    Restless,
    composed,
    folder,
    serve,
)

from servelab.core.records import PagesEvicted, RequestAdmitted, RequestPreempted
from servelab.core.sampling import SamplingParams

SCHEDULES: dict[str, Mapping[str, Any]] = {
    "all at once": {},
    "one by one": {"scheduler": {"name": "vllm_v1", "max_num_seqs": 1}},
    "two by two": {"scheduler": {"name": "vllm_v1", "max_num_seqs": 2}},
    "chunks of 7": {"scheduler": {"name": "vllm_v1", "max_num_batched_tokens": 7, "max_num_seqs": 7}},
    "pages of 1": {"kvcache": {"name": "paged", "page_tokens": 1}, "executor": {"num_kv_pages": 100}},
    "few pages": {"executor": {"num_kv_pages": 26}},
    "wall clock": {"clock": {"name": "wall"}, "scheduler": {"name": "vllm_v1", "max_num_seqs": 1}},
}


@pytest.fixture
def prompts() -> list[tuple[int, ...]]:
    """Most begin alike; one is wholly different."""
    rng = Random(7)
    stem, other = ([rng.randrange(96) for _ in range(44)] for _ in "ab")
    return [(*(other if i == 4 else stem)[: n - 1], i) for i, n in enumerate(PROMPTS)]


def hits(keep: Keep) -> int:
    return sum(x.cached_tokens for x in keep.records if isinstance(x, RequestAdmitted))


@pytest.mark.parametrize("name", SCHEDULES)
def test_greedy_tokens_are_equal_with_and_without_reuse(composed: Compose, name: str) -> None:  # noqa: F811
    plain = serve(composed())
    keep = serve(composed(prefix="hash", **SCHEDULES[name]))
    assert keep.outputs() == plain.outputs()
    assert hits(plain) == 0
    if name == "few pages":
        assert keep.count(RequestPreempted) and keep.count(PagesEvicted)
    if name != "all at once":
        assert hits(keep) > 20


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(26, 60))
def test_greedy_tokens_do_not_depend_on_random_plans(
    composed: Compose,  # noqa: F811
    seed: int,
    pages: int,
) -> None:
    plain = serve(composed())
    plans = Restless(Random(seed), {"recompute", "pause", "resume", "hold", "wake", "barrier"})
    keep = serve(composed(policy=plans, prefix="hash", executor={"num_kv_pages": pages}))
    assert keep.outputs() == plain.outputs()


def test_draws_are_equal_too(composed: Compose, prompts: list[tuple[int, ...]]) -> None:  # noqa: F811
    params = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.1)
    plain = serve(composed(Given(prompts, params)))
    keep = serve(composed(Given(prompts, params), prefix="hash", **SCHEDULES["few pages"]))
    assert keep.outputs() == plain.outputs() and hits(keep)


def test_the_scripted_executor_gets_the_same_plans(composed: Compose) -> None:  # noqa: F811
    real = serve(composed(prefix="hash", executor={"num_kv_pages": 30}))
    scripted = serve(
        composed(
            prefix="hash",
            executor={"name": "scripted", "num_kv_pages": 30, "foresight": False},
            model=SHAPE,
        )
    )
    assert real.plans() == scripted.plans()
    assert hits(real) == hits(scripted) > 0 and real.count(RequestPreempted)

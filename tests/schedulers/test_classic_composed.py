"""The classic schedulers as the command line builds them; with a real model, tokens are everybody's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.schedulers.classic import CLASSICS
from tests.schedulers.test_composed import LENGTHS, Keep, composed, run

from servelab.core.errors import CapabilityError
from servelab.core.records import Planned, RequestPreempted, TransferEnded

SETTINGS: dict[str, dict[str, Any]] = {
    "vllm_v0": {"max_num_batched_tokens": 96},
    "vllm_v0 chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True},
    "vllm_v0 swap": {"max_num_batched_tokens": 96, "preemption_mode": "swap"},
    "sarathi": {"chunk_size": 10},
    "orca": {},
    "static_batch": {"max_num_seqs": 3},
    "splitfuse": {"max_ragged_batch_size": 16},
}


def named(case: str) -> dict[str, Any]:
    seats = {} if case == "splitfuse" else {"max_num_seqs": 64}
    return {"name": case.split()[0], **seats, **SETTINGS[case]}


@pytest.mark.parametrize("case", SETTINGS)
def test_greedy_tokens_do_not_depend_on_who_schedules(case: str, real: Callable[..., Keep]) -> None:
    """Every card's last property, also with requests recomputed and swapped."""
    expected = real("vllm_v1", num_kv_pages=400)
    assert [len(expected.tokens[f"r{i}"]) for i in range(len(LENGTHS))] == [n for _, n in LENGTHS]
    keep = real(named(case), num_host_pages=60 if case == "vllm_v0 swap" else 0)
    assert keep.tokens == expected.tokens
    modes = {x.mode for x in keep.of(RequestPreempted)}
    expected_modes: dict[str, set[str]] = {"orca": set(), "static_batch": set(), "vllm_v0 swap": {"swap"}}
    assert modes == expected_modes.get(case, {"recompute"})
    assert bool(keep.of(TransferEnded)) == (case == "vllm_v0 swap")


@pytest.mark.parametrize("name", CLASSICS)
def test_settings_of_the_yaml_file_run_on_the_scripted_executor(repository: Path, name: str) -> None:
    settings = yaml.safe_load((repository / "configs/scheduler" / f"{name}.yaml").read_text(encoding="utf-8"))
    first, again = (run(scheduler=settings) for _ in "ab")
    assert first.of(Planned) and first.records[1:-1] == again.records[1:-1]
    assert sum(map(len, first.tokens.values())) == sum(output for _, output in LENGTHS)


def test_swapping_takes_one_setting_of_the_executor() -> None:
    scheduler = {"name": "vllm_v0", "preemption_mode": "swap"}
    keep = run(scheduler=scheduler, executor={"name": "scripted", "num_kv_pages": 26, "num_host_pages": 40})
    assert {x.mode for x in keep.of(RequestPreempted)} == {"swap"}
    keep = run(scheduler=scheduler)
    assert {x.mode for x in keep.of(RequestPreempted)} == {"recompute"}
    assert all("no host pages" in x.reason for x in keep.of(RequestPreempted))


def test_a_cache_that_cannot_swap_is_refused() -> None:
    with pytest.raises(CapabilityError, match="vllm_v0"):
        composed(scheduler="vllm_v0", kvcache="contiguous")


@pytest.mark.parametrize("name", CLASSICS)
def test_lanes_are_refused(name: str) -> None:
    """What other lanes run would be missing from their accounts."""
    with pytest.raises(CapabilityError, match=name):
        composed(scheduler=name, engine={"max_model_len": 96, "lanes": 2})


@pytest.mark.parametrize("name", ["orca", "sarathi", "static_batch", "splitfuse"])
def test_planned_a_step_ahead(name: str) -> None:
    """Same tokens for everybody; only vllm_v0, which swaps, waits for results."""
    keep = run(scheduler=name, engine={"max_model_len": 96, "checks": "full", "max_in_flight": 2})
    assert sum(map(len, keep.tokens.values())) == sum(output for _, output in LENGTHS)
    with pytest.raises(CapabilityError, match="vllm_v0"):
        composed(scheduler="vllm_v0", engine={"max_model_len": 96, "max_in_flight": 2})


@pytest.mark.parametrize("cache", ["contiguous", "contiguous_pow2", "contiguous_oracle"])
def test_orca_over_the_caches_that_reserve(cache: str) -> None:
    """The reservations of the vLLM paper: Max, Pow2, Oracle. Nobody is preempted."""
    keep = run(
        scheduler={"name": "orca", "reserve": "kvcache"},
        kvcache={"name": cache, "page_tokens": 4},
        executor={"name": "scripted", "num_kv_pages": 60},
    )
    assert not keep.of(RequestPreempted)


def test_more_fits_the_less_is_reserved() -> None:
    most = []
    for cache in ("contiguous", "contiguous_pow2", "contiguous_oracle"):
        keep = run(
            scheduler={"name": "orca", "reserve": "kvcache"},
            kvcache={"name": cache, "page_tokens": 4},
            executor={"name": "scripted", "num_kv_pages": 60},
        )
        most.append(max(len(x.work) for x in keep.of(Planned)))
    assert most == sorted(most) and most[0] == 60 // 24 < most[2]

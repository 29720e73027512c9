"""Suites of plugins under settings other than their defaults, and of the plugins the how-to pages show."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from servelab.core.testing import (
    CostSuite,
    ExecutorSuite,
    KVCacheSuite,
    ObserverSuite,
    PrefixSuite,
    QuantSuite,
    SchedulerSuite,
    WorkloadSuite,
    failures,
    suite_of,
)

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class TestW4A16Symmetric(QuantSuite):
    plugin = "w4a16"
    config: ClassVar = {"symmetric": True, "group_size": 32}


class TestW4A16WithItsHead(QuantSuite):
    plugin = "w4a16"
    config: ClassVar = {"head": True, "group_size": [64, 2]}


class TestW4A8InSmallGroups(QuantSuite):
    plugin = "w4a8"
    config: ClassVar = {"group_size": 16, "skip": ["o", "down"]}


class TestW8A8InHalf(QuantSuite):
    plugin = "w8a8"
    config: ClassVar = {"head": True}
    dtypes: ClassVar = ("float16", "bfloat16")


class TestVllmV1InShortChunks(SchedulerSuite):
    plugin = "vllm_v1"
    config: ClassVar = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "long_prefill_token_threshold": 5,
        "hold_steps": 3,
    }


class TestAggressiveOneByOne(SchedulerSuite):
    plugin = "aggressive"
    config: ClassVar = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        "max_new_per_pass": 1,
        "mixed": True,
    }


class TestPagedWithoutPages(KVCacheSuite):
    plugin = "paged"
    config: ClassVar = {"page_tokens": 1}


class TestPagedWithAWatermark(KVCacheSuite):
    plugin = "paged"
    config: ClassVar = {"page_tokens": 7, "watermark": 0.2}


class TestContiguousInBuddies(KVCacheSuite):
    plugin = "contiguous"
    config: ClassVar = {"placement": "buddy"}


class TestContiguousOracleInBestFit(KVCacheSuite):
    plugin = "contiguous_oracle"
    config: ClassVar = {"placement": "best_fit", "page_tokens": 2}


class TestHashForAllTenants(PrefixSuite):
    plugin = "hash"
    config: ClassVar = {"share_tenants": True}


class TestScriptedPrices(CostSuite):
    plugin = "scripted"
    config: ClassVar = {"script_ns": (5, 3, 9)}
    exempt: ClassVar = {"test_drafts_are_tokens": "stated prices go by the step, whatever runs in it"}


class TestScriptedWithoutForesight(ExecutorSuite):
    plugin = "scripted"
    config: ClassVar = {"acceptance": 0.5, "foresight": False}


class TestSyntheticOfEverything(WorkloadSuite):
    plugin = "synthetic"
    config: ClassVar = {
        "num_requests": 60,
        "process": "gamma",
        "burstiness": 0.3,
        "samples": 3,
        "prefix_tokens": 20,
        "cancel_fraction": 0.5,
        "patience_ms": {"law": "uniform", "min": 1, "max": 4000},
        "max_new_tokens": {"law": "uniform", "min": 5, "max": 500},
        "classes": [
            {"name": "online", "ttft_ms": 200, "priority": 2},
            {"name": "offline", "weight": 2, "tenant": "b"},
        ],
    }


class TestSyntheticAllAtOnce(WorkloadSuite):
    plugin = "synthetic"
    config: ClassVar = {"num_requests": 20, "request_rate": "inf", "max_new_tokens": 7}


class TestSyntheticWithoutIds(WorkloadSuite):
    plugin = "synthetic"
    config: ClassVar = {"num_requests": 20, "with_prompt_ids": False}
    exempt: ClassVar = {"test_prompt_ids": "the capability is declared whatever the settings are"}


class TestChatInSamples(WorkloadSuite):
    plugin = "chat"
    config: ClassVar = {
        "num_requests": 24,
        "samples": 2,
        "sampling": {"temperature": 1.0},
        "system": "Be brief.",
    }


class TestChatAsLongAsItLikes(WorkloadSuite):
    plugin = "chat"
    config: ClassVar = {"num_requests": 24, "enforce_lengths": False}
    exempt: ClassVar = {"test_truths": "the capability is declared whatever the settings are"}


class TestReportInDetail(ObserverSuite):
    plugin = "report"
    config: ClassVar = {"percentiles": [0, 99.9, 100], "itl_mode": "spread", "tbt_ms": 1}


class TestEventsOnly(ObserverSuite):
    plugin = "jsonl"
    config: ClassVar = {"plans": False}


class TestSilence(ObserverSuite):
    plugin = "progress"
    config: ClassVar = {"mode": "off"}
    bounded: ClassVar = True


class TestProgressIsBounded(ObserverSuite):
    plugin = "progress"
    config: ClassVar = {"mode": "on"}
    bounded: ClassVar = True


@pytest.mark.slow
class TestALongLog(ObserverSuite):
    plugin = "jsonl"
    bounded: ClassVar = True
    long_run: ClassVar = 100_000


@pytest.mark.slow
class TestALongReport(ObserverSuite):
    plugin = "report"
    long_run: ClassVar = 100_000


@pytest.mark.parametrize(
    ("page", "suite", "shown", "hook"),
    [
        ("add_a_workload.md", WorkloadSuite, "Dialogue", "servelab_workloads"),
        ("add_an_observer.md", ObserverSuite, "Slowest", "servelab_observers"),
    ],
)
def test_what_the_how_to_pages_show_conforms(
    repository: Path, page: str, suite: type, shown: str, hook: str
) -> None:
    space: dict[str, Any] = {"__name__": "shown"}
    for code in BLOCK.findall((repository / "docs" / "howto" / page).read_text(encoding="utf-8")):
        exec(compile(code, page, "exec"), space)
    (spec,) = space[hook]()

    def made(config: None, context: Any) -> Any:
        return space[shown](space[f"{shown}Config"](), context)

    made.spec = replace(spec, config=None)  # type: ignore[attr-defined]
    assert not failures(suite_of(suite, made))

"""Every registered plugin of a kind that has a suite passes it: one class per plugin, none is forgotten."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from servelab.core.facts import Limits
from servelab.core.registry import Registry
from servelab.core.testing import SUITES, PluginSuite, suite_of


def _fitted(suite: PluginSuite, limits: Limits) -> dict[str, Any]:
    """Settings of schedulers that state their own limits: those of the engine."""
    return {name: getattr(limits, _LIMITS[name]) for name in suite.config}


_LIMITS = {
    "max_num_batched_tokens": "max_batch_tokens",
    "chunk_size": "max_batch_tokens",
    "max_num_seqs": "max_batch_requests",
    "max_ragged_batch_size": "max_batch_tokens",
    "max_ragged_sequence_count": "max_batch_requests",
}


def _fitted_inner(suite: PluginSuite, limits: Limits) -> dict[str, Any]:
    """The same of what an ordering wrapper wraps."""
    named = {name: getattr(limits, limit) for name, limit in _LIMITS.items() if name in _INNER["inner"]}
    return {"inner": {"name": "vllm_v1", **named}}


_PLACE: list[pytest.TempPathFactory] = []


@pytest.fixture(scope="session", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Checks take no fixtures: where they may write is kept here."""
    _PLACE[:] = [tmp_path_factory]


@functools.cache
def _tiny() -> str:
    """The folder of a tiny random Llama with a tokenizer of one word per id."""
    pytest.importorskip("transformers")
    import tokenizers
    from tests.torch.models import llama
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    where = _PLACE[0].mktemp("tiny")
    llama(3).save_pretrained(where)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0").save_pretrained(where)
    return str(where)


def _tiny_model(suite: PluginSuite) -> dict[str, Any]:
    return {"name": "tiny", "source": "path", "path": _tiny(), "dtype": "float64"}


MORE: dict[tuple[str, str], dict[str, Any]] = {
    ("scheduler", name): {"config": {"max_num_batched_tokens": 64, "max_num_seqs": 16}, "settings": _fitted}
    for name in ("aggressive", "conservative", "pastfuture", "pf_oracle", "vllm_v0", "vllm_v1")
} | {
    ("cost", "phase_linear"): {
        "config": {"prefill_ms": [18.1, 0.1, 7e-6], "decode_ms": [19.9, 6e-4, 0.04], "large_batch": 95}
        | {"decode_large_ms": [7.2, 5.8e-4, 0.16]}
    },
    ("cost", "table"): {
        "config": {"prompt_ms": {512: 93, 1024: 154, 8192: 1550}, "token_ms": {1: 43.0, 64: 71.6}}
    },
    ("scheduler", "sarathi"): {"config": {"chunk_size": 64, "max_num_seqs": 16}, "settings": _fitted},
    ("scheduler", "splitfuse"): {
        "config": {"max_ragged_batch_size": 64, "max_ragged_sequence_count": 16},
        "settings": _fitted,
    },
    ("scheduler", "orca"): {"config": {"max_num_seqs": 16}, "settings": _fitted},
    ("scheduler", "static_batch"): {
        "config": {"max_num_seqs": 16},
        "settings": _fitted,
        "exempt": {"test_looks_at_arrivals": "its batches are closed: that is the technique"},
    },
    ("executor", "scripted"): {
        "tight": {"num_kv_pages": 20},
        "host": {"num_kv_pages": 40, "num_host_pages": 20},
    },
    ("executor", "sim"): {
        "config": {"num_kv_pages": 64},
        "tight": {"num_kv_pages": 20},
        "host": {"num_kv_pages": 40, "num_host_pages": 20},
    },
    ("executor", "torch"): {
        "kernel": "sdpa",
        "model_section": _tiny_model,
        "config": {"num_kv_pages": 64, "threads": 1},
        "tight": {"num_kv_pages": 20},
        "host": {"num_kv_pages": 40, "num_host_pages": 20},
    },
}
"""Attributes of the suite of one plugin: settings for a toy world, exemptions with their reason."""
_INNER = {"inner": {"name": "vllm_v1", "max_num_batched_tokens": 64, "max_num_seqs": 16}}
MORE |= {
    ("scheduler", name): {"config": _INNER, "settings": _fitted_inner}
    for name in ("edf", "fcfs", "priority", "sjf", "sjf_oracle")
}
for _name in ("sjf", "sjf_oracle"):
    MORE["scheduler", _name]["exempt"] = {
        "test_no_starvation": "long jobs wait while shorter ones keep coming: the rule's known price"
    }
MORE["cost", "table"]["exempt"] = {
    "test_kinds_of_steps": "its source makes a step of prompts and decodes dearer than one of prompts alone"
}
FILES = Path(__file__).parents[1] / "workloads" / "files"
MORE["workload", "azure"] = {"config": {"path": str(FILES / "azure.csv")}}
MORE["workload", "mooncake"] = {"config": {"path": str(FILES / "mooncake.jsonl")}}
MORE["observer", "progress"] = {"config": {"mode": "on"}}  # also without a terminal

for _kind, _suite in SUITES.items():
    for _name in Registry.load().names(_kind):
        _of = suite_of(_suite, _name, **MORE.get((_kind, _name), {}))
        _of.__module__ = __name__
        globals()[_of.__name__] = _of

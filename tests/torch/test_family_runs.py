"""Whole runs of every family: greedy tokens, with room and without, and quantizers."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tests.torch.models import FAMILIES, family, widen

from servelab import LLM, SamplingParams

OUTPUTS = 12


def prompts() -> list[list[int]]:
    rng = Random(1)
    return [[rng.randrange(96) for _ in range(n)] for n in (5, 17, 30, 1)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tokenizers
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("family")
    family(request.param, 3).save_pretrained(where)
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0").save_pretrained(where)
    return where


def served(folder: Path, pages: int = 64, tokens: int = 2048, **settings: Any) -> list[tuple[int, ...]]:
    """Outputs with ``pages`` pages of 4 tokens in each pool, and at most so many tokens a step."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUTS, ignore_eos=True)
    few = [
        f"executor.num_kv_pages={pages}",
        "kvcache.page_tokens=4",
        f"engine.max_batch_tokens={tokens}",
        f"scheduler.max_num_batched_tokens={tokens}",
        "engine.checks=full",
    ]
    with LLM(folder, max_model_len=64, overrides=few, **settings) as llm:
        return [tuple(one.token_ids) for one in llm.generate(prompts(), params, progress=False)]


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model = widen(loaded.eval())
    expected = []
    with torch.inference_mode():
        for prompt in prompts():
            ids = list(prompt)
            for _ in range(OUTPUTS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            expected.append(tuple(ids[len(prompt) :]))
    assert served(folder, dtype="float64") == expected
    assert served(folder, pages=17, tokens=16, dtype="float64") == expected, "in chunks, and preempted"


@pytest.mark.parametrize("quant", ["w8a16", "w4a8"])
def test_quantizers_run_every_linear(folder: Path, quant: str) -> None:
    settings: dict[str, Any] = {"quant": {"name": quant}}
    if quant == "w4a8":
        settings["quant"]["group_size"] = [8, 4]
    tokens = served(folder, dtype="float32", **settings)
    assert all(len(out) == OUTPUTS for out in tokens)

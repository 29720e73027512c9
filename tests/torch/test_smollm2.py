"""The default model against transformers, on the same dequantized weights, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from servelab.core.errors import ServeLabError
from servelab.core.sampling import SamplingParams
from servelab.plugins.llm.llm import LLM

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain in one sentence why the sky is blue.",
    "List 3 prime numbers above 2024.",
)
OUTPUTS = 48


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    try:
        made = LLM(dtype="float32", max_model_len=512, overrides=["executor.num_kv_pages=96"])
    except ServeLabError as exc:
        if "could not be downloaded" not in exc.what and "pip is not installed" not in exc.what:
            raise
        pytest.skip(f"{exc.what}: {exc.why}")
    with made:
        yield made


@pytest.fixture(scope="module")
def reference(llm: LLM) -> Any:
    from transformers import AutoModelForCausalLM

    folder = Path(llm.info["weights"]["folder"])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_greedy_text_is_that_of_transformers(llm: LLM, reference: Any) -> None:
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(temperature=0, max_tokens=OUTPUTS)
    done = llm.chat(talks, params, progress=False)
    assert "Paris" in done[0].text
    for one in done:
        ids = torch.tensor([one.prompt_token_ids])
        with torch.inference_mode():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUTS, do_sample=False
            )
        theirs = tuple(out[0, ids.shape[1] :].tolist())
        assert one.token_ids == theirs


def test_logits_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    [one] = llm.generate(
        "The quick brown fox", SamplingParams(temperature=0, max_tokens=8, logprobs=5, ignore_eos=True)
    )
    ids = torch.tensor([one.prompt_token_ids + one.token_ids[:-1]])
    with torch.inference_mode():
        logprobs = reference(ids).logits[0, len(one.prompt_token_ids) - 1 :].log_softmax(-1)
    assert one.logprobs is not None
    for ours, row in zip(one.logprobs, logprobs, strict=True):
        for token, value in ours.items():
            assert value == pytest.approx(row[token].item(), abs=1e-3)

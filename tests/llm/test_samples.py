"""Several outputs of one prompt from Python: each is what a request of its own seed draws alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servelab import LLM, SamplingParams
from servelab.core.errors import ConfigError

PROMPT = "the quick brown fox jumps"


def drawn(n: int = 1, seed: int = 7, **more: Any) -> SamplingParams:
    fields = {"temperature": 1.2, "max_tokens": 20, "ignore_eos": True, **more}
    return SamplingParams(n=n, seed=seed, **fields)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "scheduler.max_num_batched_tokens=5",
        "executor.num_kv_pages=5",  # too few for all: some are preempted
        "kvcache.page_tokens=1",
    ],
)
def test_each_output_is_that_of_its_own_seed(make: Callable[..., LLM], overrides: str) -> None:
    lines = [overrides] if overrides else []
    if "num_kv_pages" in overrides:
        lines.append("engine.max_model_len=64")
    elif "batched" in overrides:
        lines.append("scheduler.max_num_seqs=5")
    with make(overrides=lines) as llm:
        alone = [llm.generate(PROMPT, drawn(seed=7 + k))[0] for k in range(4)]
        [first] = llm.generate(PROMPT, drawn(n=4))
    assert [one.token_ids for one in first.samples] == [one.token_ids for one in alone]
    assert [one.text for one in first.samples] == [one.text for one in alone]
    assert len({one.token_ids for one in alone}) == 4
    ids = [one.request_id for one in first.samples]
    assert ids == [first.request_id, *(f"{first.request_id}#{k}" for k in (1, 2, 3))]
    if "num_kv_pages" in overrides:
        assert sum(one.preemptions for one in first.samples) > 0


def test_unlike_plugins(make: Callable[..., LLM]) -> None:
    """Prefix store, contiguous KV (nothing is shared there), another scheduler: the same tokens."""
    expected = None
    for families in ({}, {"prefix": "hash"}, {"kvcache": "contiguous"}, {"scheduler": "pastfuture"}):
        more = {"overrides": ["engine.max_model_len=64"]} if families.get("kvcache") else {}
        with make(**families, **more) as llm:
            for _ in range(2):  # the second time the prompt is in the store
                [one] = llm.generate(PROMPT, drawn(n=3))
                found = [each.token_ids for each in one.samples]
                expected = expected or found
                assert found == expected, families


def test_without_a_seed_outputs_differ(llm: LLM) -> None:
    [one] = llm.generate(PROMPT, SamplingParams(n=4, max_tokens=12, temperature=1.5))
    assert len({each.token_ids for each in one.samples}) == 4
    assert one.siblings == one.samples[1:] and not one.siblings[0].siblings


def test_ends_and_logprobs_of_their_own(llm: LLM, recorder: Any) -> None:
    params = drawn(n=6, temperature=2.0, ignore_eos=False, logprobs=2, max_tokens=60)
    [one] = llm.generate(PROMPT, params)
    for each in one.samples:
        assert each.logprobs is not None and len(each.logprobs) == len(each.token_ids)
        assert [next(iter(p)) for p in each.logprobs] == list(each.token_ids)
        assert each.timings.ttft_s == one.timings.ttft_s
    forks = [x for x in recorder.of("forked") if x.parent == one.request_id]
    assert [x.shared_tokens for x in forks] == [len(one.prompt_token_ids)] * 5


def test_a_stream_interleaves_the_outputs(llm: LLM) -> None:
    [whole] = llm.generate(PROMPT, drawn(n=3))
    texts, tokens, ends = [""] * 3, [()] * 3, []
    order = []
    for chunk in llm.stream(PROMPT, drawn(n=3)):
        texts[chunk.sample] += chunk.text
        tokens[chunk.sample] += chunk.token_ids
        order.append(chunk.sample)
        if chunk.completion is not None:
            ends.append((chunk.sample, chunk.completion.text))
    assert [one.token_ids for one in whole.samples] == tokens
    assert [one.text for one in whole.samples] == texts
    assert sorted(ends) == list(enumerate(texts))
    assert order[:6] == [0, 1, 2, 0, 1, 2]


def test_a_stream_closed_early_gives_up_all_outputs(llm: LLM, recorder: Any) -> None:
    before = len(recorder.of("finished"))
    stream = llm.stream(PROMPT, drawn(n=3, max_tokens=2000))
    next(stream)
    stream.close()
    llm.generate("z", drawn(max_tokens=1))
    assert sorted(recorder.outcomes(before)) == ["cancelled"] * 3 + ["completed"]


def test_many_prompts_with_unlike_numbers_of_outputs(llm: LLM) -> None:
    done = llm.generate(["a", "b", "c"], [drawn(), drawn(n=3), drawn(n=2)])
    assert [len(one.samples) for one in done] == [1, 3, 2]
    for prompt, one in zip("abc", done, strict=True):  # their prompts end in one launch
        alone = [llm.generate(prompt, drawn(seed=7 + k))[0].token_ids for k in range(len(one.samples))]
        assert [each.token_ids for each in one.samples] == alone


def test_greedy_outputs_would_be_equal() -> None:
    with pytest.raises(ConfigError, match=r"n must be 1 with temperature=0, whose outputs are equal, got 2"):
        SamplingParams(n=2, temperature=0)
    for n in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="n must be 1 or more"):
            SamplingParams(n=n)  # type: ignore[arg-type]

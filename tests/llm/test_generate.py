"""``generate`` and ``chat``: the tokens are the model's, the text is the tokens', the end is what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from servelab import LLM, SamplingParams
from servelab.core.api import StepPlan, StepView
from servelab.core.errors import ConfigError

PROMPTS = ["the quick brown fox", "1999 times", "z", "the lazy dog, " * 9]
Params = Callable[..., SamplingParams]


def _expected(reference: Any, ids: list[int], n: int) -> list[int]:
    out = reference.generate(
        torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return list(out[0, len(ids) :].tolist())


# ------------------------------------------------------------------ the model


def test_greedy_is_transformers(llm: LLM, reference: Any, greedy: Params) -> None:
    # transformers enforces min_new_tokens by forbidding the end; so does min_tokens
    done = llm.generate(PROMPTS, greedy(min_tokens=24))
    for prompt, one in zip(PROMPTS, done, strict=True):
        ids = llm.tokenizer.encode(prompt)
        assert (one.prompt, list(one.prompt_token_ids)) == (prompt, ids)
        assert list(one.token_ids) == _expected(reference, ids, 24)
        assert one.text == llm.tokenizer.decode(one.token_ids)
        assert (one.finish_reason, one.stop_reason, one.preemptions) == ("length", None, 0)
    assert len({one.token_ids for one in done}) == len(PROMPTS)


def test_chat_is_the_template(llm: LLM, greedy: Params) -> None:
    talk = [{"role": "user", "content": "the fox?"}]
    ids = llm.tokenizer.encode("<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n")
    [one] = llm.chat(talk, greedy())
    assert list(one.prompt_token_ids) == ids
    several = llm.chat([talk, [*talk, {"role": "assistant", "content": "dog"}]], greedy())
    assert several[0].token_ids == one.token_ids != several[1].token_ids
    assert llm.chat([]) == []


def test_logprobs_are_the_models(llm: LLM, reference: Any) -> None:
    params = SamplingParams(temperature=1.3, max_tokens=12, logprobs=3, ignore_eos=True, seed=5)
    [one] = llm.generate("the fox", params)
    ids = [*one.prompt_token_ids, *one.token_ids]
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0, len(one.prompt_token_ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert one.logprobs is not None and len(one.logprobs) == 12
    for token, row, theirs in zip(one.token_ids, one.logprobs, expected, strict=True):
        assert next(iter(row)) == token
        assert set(row) == {token, *theirs.topk(3).indices.tolist()}
        assert row == pytest.approx({i: float(theirs[i]) for i in row}, abs=1e-6)  # it norms in float32
    assert llm.generate("the fox", SamplingParams(max_tokens=1))[0].logprobs is None


# ----------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda ids: [np.int64(i) for i in ids],
        lambda ids: list(torch.tensor(ids)),
        iter,
        lambda ids: [ids],
        lambda ids: torch.tensor([ids]),
        lambda ids: np.array([ids]),
        lambda ids: (one for one in [ids]),
    ],
)
def test_ids_of_any_kind(llm: LLM, greedy: Params, form: Callable[[list[int]], Any]) -> None:
    ids = llm.tokenizer.encode("the quick")
    [one] = llm.generate(form(ids), greedy(max_tokens=4, repetition_penalty=1.2))
    [text] = llm.generate("the quick", greedy(max_tokens=4, repetition_penalty=1.2))
    assert one.prompt is None and one.prompt_token_ids == tuple(ids)
    assert all(type(i) is int for i in one.prompt_token_ids)
    assert one.token_ids == text.token_ids


def test_nothing_asked_nothing_given(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], []) == []


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", ["prompt 0: it is empty"]),
        (["the", ""], ["prompt 1: it is empty"]),
        ([[300]], ["prompt 0: 300 is no token id; they are 0 to 299"]),
        ([-1], ["-1 is no token id"]),
        ([[1, 2.0]], ["2.0 is no token id"]),
        ([[1, "a"]], ["'a' is no token id"]),
        (["the", None], ["prompt 1: it must be a text or token ids, got None"]),
        (["", [999], "the"], ["prompt 0: it is empty", "prompt 1: 999"]),
        ([[5] * 4096], ["its 4096 tokens leave no room", "is 4096 (max_model_len)", "kv_memory_mib"]),
        (b"the", ["prompts are b'the'", "give a text"]),
        (7, ["prompts are 7"]),
        ({"prompt": "the"}, ["prompts are {'prompt'"]),
    ],
)
def test_prompts_that_cannot_be_served(llm: LLM, recorder: Any, prompts: Any, words: list[str]) -> None:
    before = len(recorder.of("arrived"))
    with pytest.raises(ConfigError) as caught:
        llm.generate(prompts)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    llm.generate("z", SamplingParams(max_tokens=1))
    assert len(recorder.of("arrived")) == before + 1


def test_parameters_for_each(llm: LLM, greedy: Params) -> None:
    done = llm.generate(["the", "the"], (greedy(max_tokens=n) for n in (2, 5)))
    assert [len(one.token_ids) for one in done] == [2, 5]
    with pytest.raises(ConfigError, match="2 prompts have 1 sampling parameters"):
        llm.generate(["the", "fox"], [greedy()])
    wrong: Any = {"temperature": 0}
    with pytest.raises(ConfigError, match="prompt 0: params must be SamplingParams, got"):
        llm.generate(["the"], [wrong])


def test_as_many_tokens_as_there_is_room(make: Callable[..., LLM], greedy: Params) -> None:
    with make(max_model_len=64) as llm:
        [one] = llm.generate([[5] * 50], greedy(max_tokens=None))
        [more] = llm.generate([[5] * 50], greedy(max_tokens=100))
    assert llm.max_model_len == 64
    assert len(one.token_ids) == 14 and one.token_ids == more.token_ids
    assert one.finish_reason == "length"


# --------------------------------------------------------------------- ends


def test_stop_token(llm: LLM, greedy: Params) -> None:
    [whole] = llm.generate("the fox", greedy())
    ids = whole.token_ids
    first = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    [one] = llm.generate("the fox", greedy(stop_token_ids=[ids[first]]))
    assert one.token_ids == ids[: first + 1]
    assert one.text == llm.tokenizer.decode(ids[:first])
    assert (one.finish_reason, one.stop_reason) == ("stop", ids[first])
    later = llm.generate("the fox", greedy(stop_token_ids=[ids[first]], min_tokens=first + 1))[0]
    assert later.token_ids[:first] == ids[:first] and ids[first] not in later.token_ids[: first + 1]


def test_stop_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, seed=3, ignore_eos=True)
    [whole] = llm.generate("the fox", params)
    at = next(
        i for i in range(40, len(whole.text)) if whole.text[i : i + 3].isascii() and whole.text[i].isalpha()
    )
    stop = whole.text[at : at + 3]
    [one] = llm.generate("the fox", SamplingParams(max_tokens=200, seed=3, ignore_eos=True, stop=stop))
    assert one.text == whole.text[: whole.text.index(stop)]
    assert one.token_ids == whole.token_ids[: len(one.token_ids)] != whole.token_ids
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)


def test_the_models_own_end(
    make: Callable[..., LLM], llm: LLM, ending_with: Callable[[int], Path], greedy: Params
) -> None:
    [whole] = llm.generate("the fox", greedy())
    ids = whole.token_ids
    first = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    with make(model=ending_with(ids[first])) as other:
        [one] = other.generate("the fox", greedy(ignore_eos=False))
        [on] = other.generate("the fox", greedy())
    assert one.token_ids == ids[: first + 1]
    assert one.text == llm.tokenizer.decode(ids[:first])
    assert (one.finish_reason, one.stop_reason) == ("stop", ids[first])
    assert on.token_ids == ids and on.finish_reason == "length"


def test_what_a_policy_ends(make: Callable[..., LLM], greedy: Params) -> None:
    class Moody:
        """Ends requests after five tokens and refuses prompts of one."""

        def plan(self, view: StepView) -> StepPlan:
            plan, pages = StepPlan(), view.kv.budget()
            for request in view.running:
                if request.generated_tokens >= 5:
                    plan.abort(request, "five are enough")
                elif pages.take(request, 1):
                    plan.run(request, 1)
            for request in view.waiting:
                if request.prompt_tokens == 1:
                    plan.reject(request, "too short")
                elif pages.take(request, request.pending_tokens):
                    plan.run(request, request.pending_tokens)
            return plan

    with make(scheduler=Moody()) as llm:
        ended, refused = llm.generate(["the quick brown fox", [5]], greedy())
    assert (ended.finish_reason, ended.reason, len(ended.token_ids)) == ("abort", "five are enough", 5)
    assert ended.text == llm.tokenizer.decode(ended.token_ids)
    assert (refused.finish_reason, refused.reason, refused.token_ids) == ("rejected", "too short", ())
    assert refused.text == "" and refused.timings.ttft_s is None and refused.timings.queue_s is None


# ----------------------------------------------------------- chance and schedule


def test_seeds(make: Callable[..., LLM]) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    own = SamplingParams(max_tokens=16, ignore_eos=True, seed=7)

    def tokens(seed: int, prompts: list[str], each: Any) -> list[tuple[int, ...]]:
        with make(seed=seed) as llm:
            return [one.token_ids for one in llm.generate(prompts, each)]

    alone = tokens(1, ["the fox"], params)
    crowd = tokens(1, ["the fox", *PROMPTS, "the fox"], params)
    assert crowd[0] == alone[0]
    assert crowd[-1] != crowd[0], "two requests with one prompt draw on their own"
    assert tokens(2, ["the fox"], params) != alone
    assert tokens(1, ["z", "the fox"], [params, own])[1] == tokens(2, ["the fox"], own)[0] != alone[0]


def test_preempted_requests_lose_nothing(make: Callable[..., LLM], llm: LLM, greedy: Params) -> None:
    prompts = [f"the lazy dog, {i} times, " * 2 for i in range(6)]
    with make(overrides=["executor.num_kv_pages=14"]) as small:
        tight = small.generate(prompts, greedy(max_tokens=60))
    assert sum(one.preemptions for one in tight) > 0
    wide = llm.generate(prompts, greedy(max_tokens=60))
    assert [one.token_ids for one in tight] == [one.token_ids for one in wide]
    assert sum(one.preemptions for one in wide) == 0


def test_timings(llm: LLM, greedy: Params) -> None:
    for one in llm.generate(PROMPTS, greedy()):
        t = one.timings
        assert t.queue_s is not None and t.ttft_s is not None and t.tpot_s is not None
        assert 0 <= t.queue_s < t.ttft_s < t.e2e_s < 60
        assert len(t.token_times_s) == 24 and list(t.token_times_s) == sorted(set(t.token_times_s))
        assert t.ttft_s == t.token_times_s[0] and t.e2e_s >= t.token_times_s[-1]
        assert t.tpot_s == pytest.approx((t.token_times_s[-1] - t.ttft_s) / 23)
    [single] = llm.generate("z", greedy(max_tokens=1))
    assert single.timings.tpot_s is None


def test_the_bar(llm: LLM, greedy: Params, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, greedy(), progress=True)
    assert "4/4" in capsys.readouterr().err
    llm.generate(PROMPTS, greedy())
    assert capsys.readouterr().err == "", "no terminal, no bar"

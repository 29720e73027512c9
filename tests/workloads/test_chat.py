"""The chat workload as a run sees it, through a tokenizer of words."""

from __future__ import annotations

import json
import math
import random
import string
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from servelab.core.api import Arrival, ConfigError, Context, Limits, ModelFacts, WorkloadError
from servelab.core.context import seeded
from servelab.core.corpus import Topic, digest, paragraphs, part
from servelab.core.records import RequestFinished
from servelab.core.sampling import SamplingParams
from servelab.core.testing.words import ASSISTANT, BOS, SYSTEM, USER, Words
from servelab.plugins.workloads import chat as module
from servelab.plugins.workloads._passages import Passages, units
from servelab.plugins.workloads.chat import TEMPLATES, Chat, ChatConfig

NS = 1_000_000_000
WORDS = Words()
"""One for all tests, so that equal words have equal ids in all."""

FACTS = ModelFacts(
    name="toy",
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=Words.vocab_size,
    max_position=8192,
)


def context(seed: int = 0, max_model_len: int = 8192, tokenizer: Words | None = WORDS) -> Context:
    return Context(
        kind="workload",
        name="chat",
        rng=seeded(seed, "workload", "chat"),
        model=FACTS,
        hardware=None,
        limits=Limits(max_batch_tokens=512, max_batch_requests=32, max_model_len=max_model_len),
        tokenizer=tokenizer,
    )


def build(*, seed: int = 0, max_model_len: int = 8192, **settings: Any) -> Chat:
    return Chat(ChatConfig.model_validate(settings), context(seed, max_model_len))


def requests(chat: Chat) -> list[Arrival]:
    items = list(chat.arrivals())
    assert all(isinstance(item, Arrival) for item in items)
    return [item for item in items if isinstance(item, Arrival)]


def prompts(chat: Chat) -> list[tuple[int, ...]]:
    return [tuple(arrival.spec.prompt_ids or ()) for arrival in requests(chat)]


# --- what arrives ------------------------------------------------------------------------------------------


def test_defaults() -> None:
    arrivals = requests(build())
    assert [a.spec.id for a in arrivals] == [f"r{i}" for i in range(64)]
    assert arrivals[-1].time_ns == 16 * NS
    assert all(a.time_ns < b.time_ns for a, b in pairwise(arrivals))
    for a in arrivals:
        assert a.spec.prompt_ids is not None
        assert a.spec.prompt_tokens == len(a.spec.prompt_ids)
        assert a.truth is not None and 4 <= a.truth.output_tokens <= 768
        assert a.spec.max_new_tokens == 1024
        assert a.spec.sampling == SamplingParams(temperature=0, max_tokens=1024, ignore_eos=True)


def test_the_preset_is_long_tailed() -> None:
    described = build(num_requests=1000, request_rate="inf").describe()
    for quantity, median in (("passage_tokens", 120), ("output_tokens", 150)):
        figures = described[quantity]
        assert figures["p50"] == pytest.approx(median, rel=0.15)
        assert figures["mean"] > 1.1 * figures["p50"]
        assert figures["p99"] > 3.5 * figures["p50"]


def test_a_prompt_is_a_question_about_a_passage_of_its_part() -> None:
    texts = {topic.name: topic.text for topic in part("prompt")}
    used = set()
    for ids in prompts(build()):
        assert (ids[0], ids[1], ids[-1]) == (BOS, USER, ASSISTANT)
        said = WORDS.decode(ids[2:-1])
        found = [
            (template, topic)
            for template in TEMPLATES
            for topic in texts
            if (passage := inside(template, topic, said)) and passage in texts[topic]
        ]
        assert found, said
        used.update(template for template, _ in found)
    assert len(used) > 8


def inside(template: str, topic: str, said: str) -> str | None:
    """The passage that makes the template this text, if there is one."""
    before, _, after = template.replace("{topic}", topic).partition("{passage}")
    if not (said.startswith(before) and said.endswith(after)):
        return None
    return said[len(before) : len(said) - len(after)]


def test_every_template_takes_a_passage_once() -> None:
    for template in TEMPLATES:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
        assert fields.count("passage") == 1
        assert set(fields) <= {"passage", "topic"}
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 12


def test_a_system_prompt_is_shared() -> None:
    plain, told = prompts(build(num_requests=16)), build(num_requests=16, system="Answer in one word.")
    shared = WORDS.chat([{"role": "system", "content": "Answer in one word."}])[:-1]
    assert shared[1] == SYSTEM
    assert prompts(told) == [(*shared, *ids[1:]) for ids in plain]
    assert told.describe()["shared_prefix_share"] > build(num_requests=16).describe()["shared_prefix_share"]


def test_shared_prefix_share_is_that_of_a_tree() -> None:
    chat = build(num_requests=40)
    seen: set[tuple[int, ...]] = set()
    reused = total = 0
    for ids in prompts(chat):
        total += len(ids)
        reused += sum(ids[: i + 1] in seen for i in range(len(ids)))
        seen.update(ids[: i + 1] for i in range(len(ids)))
    assert chat.describe()["shared_prefix_share"] == reused / total


# --- reproducibility ---------------------------------------------------------------------------------------


def test_same_seed_same_requests_and_twice_the_same() -> None:
    first, second = build(seed=3, num_requests=16), build(seed=3, num_requests=16)
    assert requests(first) == requests(first) == requests(second)
    assert all(a == b for a, b in zip(first.arrivals(), first.arrivals(), strict=True))
    assert first.describe() == second.describe()


def test_another_seed_differs_in_everything() -> None:
    a, b = requests(build(seed=3, num_requests=16)), requests(build(seed=4, num_requests=16))
    assert [x.time_ns for x in a] != [x.time_ns for x in b]
    assert [x.truth for x in a] != [x.truth for x in b]
    assert not {x.spec.prompt_ids for x in a} & {x.spec.prompt_ids for x in b}


def test_only_the_given_generator_is_used() -> None:
    before, ctx = random.getstate(), context()
    chat = Chat(ChatConfig(num_requests=8), ctx)
    first = requests(chat)
    ctx.rng.random()
    assert requests(chat) == first
    assert random.getstate() == before


def test_no_text_is_tokenized_while_requests_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = build(num_requests=8)

    def late(*args: object) -> list[int]:
        raise AssertionError("tokenized after construction")

    for method in ("encode", "chat"):
        monkeypatch.setattr(WORDS, method, late)
    assert len(requests(chat)) == 8


UNIFORM = {"law": "uniform", "min": 20, "max": 200}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"output_length": UNIFORM}, {"truth"}),
        ({"max_new_tokens": UNIFORM}, {"cap"}),
        ({"prompt_length": UNIFORM}, {"prompt"}),
        ({"process": "gamma", "burstiness": 0.25}, {"time"}),
        ({"enforce_lengths": False}, {"truth"}),
    ],
)
def test_each_quantity_has_a_stream_of_its_own(settings: dict[str, Any], changed: set[str]) -> None:
    def columns(**more: Any) -> dict[str, list[Any]]:
        arrivals = requests(build(num_requests=40, **more))
        return {
            "time": [a.time_ns for a in arrivals],
            "prompt": [a.spec.prompt_ids for a in arrivals],
            "truth": [a.truth for a in arrivals],
            "cap": [a.spec.max_new_tokens for a in arrivals],
        }

    before, after = columns(), columns(**settings)
    assert {name for name in before if before[name] != after[name]} == changed


def test_more_requests_extend_an_unscaled_run() -> None:
    short = requests(build(num_requests=20, normalize_arrivals=False))
    assert requests(build(num_requests=30, normalize_arrivals=False))[:20] == short


# --- lengths -----------------------------------------------------------------------------------------------


def test_passages_follow_their_law_up_to_a_sentence() -> None:
    described = build(num_requests=500, request_rate="inf", prompt_length=UNIFORM).describe()
    figures = described["passage_tokens"]
    assert described["passage_off_by"] < 3
    assert figures["mean"] == pytest.approx(110, rel=0.05)
    assert figures["p10"] == pytest.approx(38, rel=0.15)
    assert figures["p90"] == pytest.approx(182, rel=0.05)


def test_the_counted_length_of_a_passage_is_its_tokens() -> None:
    chat = build(num_requests=100)
    for passage, wanted in zip(chat._passages, chat._wanted, strict=True):
        assert abs(len(WORDS.encode(passage.text)) - 1 - passage.tokens) <= 1
        assert 0.5 * wanted - 5 < passage.tokens < 1.5 * wanted + 5


def test_enforced_lengths_are_the_laws_own_and_hidden() -> None:
    marked = build(num_requests=16, output_length=499, max_new_tokens=500)
    other = build(num_requests=16, output_length=3, max_new_tokens=500)
    assert [a.truth.output_tokens for a in requests(marked) if a.truth] == [499] * 16
    assert [a.spec for a in requests(marked)] == [a.spec for a in requests(other)]


def test_without_enforcement_the_model_ends_by_itself() -> None:
    chat = build(num_requests=8, enforce_lengths=False, max_new_tokens=77)
    for a in requests(chat):
        assert a.truth is None
        assert a.spec.sampling == SamplingParams(temperature=0, max_tokens=77, ignore_eos=False)
    described = chat.describe()
    assert (described["output_tokens"], described["length_capped"]) == (None, 0)
    assert described["enforce_lengths"] is False


def test_sampling_reaches_every_request() -> None:
    chosen = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    for a in requests(build(num_requests=4, sampling={**chosen, **penalties}, max_new_tokens=9)):
        assert a.spec.sampling == SamplingParams(**chosen, **penalties, max_tokens=9, ignore_eos=True)


def test_outputs_above_their_cap_are_counted() -> None:
    chat = build(num_requests=200, output_length=UNIFORM, max_new_tokens=UNIFORM, request_rate="inf")
    capped = sum(a.truth.output_tokens > a.spec.max_new_tokens for a in requests(chat) if a.truth)
    assert 60 < capped < 140
    assert chat.describe()["length_capped"] == capped


@pytest.mark.parametrize("enforce", [True, False])
def test_no_request_is_longer_than_the_model_allows(enforce: bool) -> None:
    settings = {"num_requests": 32, "enforce_lengths": enforce, "max_new_tokens": 100}
    taken = [
        a.spec.prompt_tokens + (min(a.truth.output_tokens, 100) if a.truth else 100)
        for a in requests(build(**settings))
    ]
    build(max_model_len=max(taken), **settings)
    with pytest.raises(WorkloadError) as caught:
        build(max_model_len=max(taken) - 1, **settings)
    assert f"request r{taken.index(max(taken))} is longer" in str(caught.value)
    assert f"is {max(taken)}, limit {max(taken) - 1}" in str(caught.value)
    assert "raise engine.max_model_len (the model allows 8192)" in str(caught.value)
    assert ("output_length" in str(caught.value)) is enforce


def test_a_passage_no_text_can_give_is_refused() -> None:
    passages = Passages(part("prompt"), lambda text: len(WORDS.encode(text)) - 1)
    longest = max(len(WORDS.encode(topic.text)) - 1 for topic in part("prompt"))
    assert passages.longest == longest
    with pytest.raises(WorkloadError, match=f"lower prompt_length to at most {longest}"):
        build(num_requests=1, prompt_length=longest + 1, max_model_len=8192)


# --- distinctness ------------------------------------------------------------------------------------------


def test_no_two_prompts_are_equal() -> None:
    chat = build(num_requests=2000, request_rate="inf", prompt_length=30)
    assert len(set(prompts(chat))) == 2000
    assert chat.describe()["repeated_prompts"] == 0


def test_the_corpus_is_used_up_before_a_prompt_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sentences of the wanted length and two templates make six prompts."""
    text = "One two three. Four five six. Seven eight nine."
    monkeypatch.setattr(module, "part", lambda name: (Topic("numbers", text),))
    monkeypatch.setattr(module, "TEMPLATES", ("Explain: {passage}", "Repeat: {passage}"))
    chat = build(num_requests=9, prompt_length=3)
    assert len(set(prompts(chat))) == 6
    assert len(set(prompts(chat)[:6])) == 6
    assert chat.describe()["repeated_prompts"] == 3
    assert build(num_requests=6, prompt_length=3).describe()["repeated_prompts"] == 0


# --- passages ----------------------------------------------------------------------------------------------


def test_units_are_sentences_and_indented_paragraphs() -> None:
    text = 'First one, e.g. this.  Second\none? "Third" one!\n\n   code. Not split\n\n'
    text += "* A list. Not split\n\nLast"
    assert [text[a:b] for a, b in units(text)] == [
        "First one, e.g. this.",
        "Second\none?",
        '"Third" one!',
        "   code. Not split",
        "* A list. Not split",
        "Last",
    ]


@given(st.text("aB. \n*", max_size=120))
def test_units_lose_nothing_but_white_space(text: str) -> None:
    spans = list(units(text))
    assert "".join("".join(text[a:b] for a, b in spans).split()) == "".join(text.split())
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    for a, b in spans:
        assert len(paragraphs(text[a:b])) == 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 200), st.integers(0, 2**32))
def test_a_passage_ends_where_its_length_is_nearest(sizes: list[int], tokens: int, seed: int) -> None:
    sentences = [" ".join(["Word"] * size) + "." for size in sizes]
    passages = Passages((Topic("t", " ".join(sentences)),), lambda text: len(text.split()))
    drawn = list(passages.draw(tokens, random.Random(seed)))
    nearest: dict[str, int] = {}
    for first in range(len(sizes)):
        ways = [sum(sizes[first:last]) for last in range(first + 1, len(sizes) + 1)]
        best = min(ways, key=lambda way: abs(way - tokens))  # the shorter one of two
        nearest[" ".join(sentences[first : first + 1 + ways.index(best)])] = best
    assert {passage.text: passage.tokens for passage in drawn} == nearest
    off = [abs(passage.tokens - tokens) for passage in drawn[: -len(sizes)]]
    assert off == sorted(off)


def test_of_two_ends_equally_near_the_earlier_is_taken() -> None:
    passages = Passages((Topic("t", "One two. Three four. Five six."),), lambda text: len(text.split()))
    drawn = {passage.text: passage.tokens for passage in passages.draw(3, random.Random(0))}
    assert drawn == {"One two.": 2, "Three four.": 2, "Five six.": 2}


# --- settings ----------------------------------------------------------------------------------------------


def test_without_a_tokenizer_it_says_what_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"executor=torch") as caught:
        Chat(ChatConfig(), context(tokenizer=None))
    assert "workload 'chat'" in caught.value.where


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"burstiness": 0.5}, "set process to 'gamma'"),
        ({"max_new_tokens": 3, "output_length": 4}, "every request would be cut"),
        ({"num_requests": 0}, "greater than or equal to 1"),
        ({"num_requests": 100_001}, "less than or equal to 100000"),
        ({"request_rate": 0}, "greater than or equal to 0.001"),
        ({"system": ""}, "at least 1 character"),
        ({"sampling": {"temperature": -1}}, "greater than or equal to 0"),
        ({"sampling": {"temperature": math.inf}}, "finite"),
        ({"sampling": {"top_p": 0}}, "greater than 0"),
        ({"sampling": {"best_of": 2}}, "Extra inputs are not permitted"),
        ({"prompt_length": {"law": "lognormal", "median": 10, "sigma": 1}}, "max"),
        ({"prefix_tokens": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatConfig.model_validate(settings)
    assert message in str(caught.value)


def test_a_cap_below_every_output_is_fine_where_outputs_are_the_models_own() -> None:
    assert requests(build(num_requests=1, max_new_tokens=3, output_length=4, enforce_lengths=False))


@given(
    temperature=st.floats(0, 10),
    top_k=st.integers(-1, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
)
def test_sampling_that_is_accepted_can_be_served(**chosen: Any) -> None:
    accepted = module.Sampling(**chosen)
    assert SamplingParams(**accepted.model_dump()) == SamplingParams(**chosen)


def test_sampling_says_greedy_and_otherwise_what_vllm_says() -> None:
    assert SamplingParams(**module.Sampling().model_dump()) == SamplingParams(temperature=0)


def test_every_setting_is_documented_and_frozen() -> None:
    for model in (ChatConfig, module.Sampling):
        assert all(field.description for field in model.model_fields.values())
    with pytest.raises(ValidationError, match="frozen"):
        ChatConfig().num_requests = 3  # type: ignore[misc, unused-ignore]


def test_describe_is_json_and_says_where_the_text_is_from() -> None:
    chat = build(num_requests=12, request_rate="inf")
    described = chat.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["settings"]["request_rate"] == "inf"
    assert described["settings"]["system"] is None
    assert described["prompt_tokens"]["total"] == sum(map(len, prompts(chat)))
    assert described["templates"] == len(TEMPLATES)
    corpus = described["corpus"]
    assert corpus["part_sha256"] == digest("prompt")
    assert corpus["whole_sha256"] == digest("whole")
    assert corpus["topics_used"] == len({passage.topic for passage in chat._passages})
    assert 1 < corpus["topics_used"] <= min(12, corpus["topics"])


def test_react_is_silent() -> None:
    finished = RequestFinished(t_ns=5, request="r0", outcome="completed", reason="stop", output_tokens=3)
    assert list(build(num_requests=1).react(finished)) == []


def test_passages_far_from_their_length_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    build(num_requests=12, request_rate="inf")
    assert not caplog.records
    with pytest.raises(WorkloadError) as error:
        build(num_requests=12, prompt_length=9_000_000, max_model_len=10_000_000)
    most = int(error.value.do.rpartition("at most ")[2].split()[0])
    build(num_requests=12, prompt_length=most, max_model_len=10_000_000)
    assert "passages are much shorter than drawn" in caplog.text

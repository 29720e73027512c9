"""Chat: real English prompts through the model's own chat template.

Technique: baseline. Prompts are instructions about passages of Python's help texts (``core/corpus.py``, part
``prompt``), so a model reads what it was made to read and needs no data set. Arrivals are those of ``vllm
bench serve``, as in the ``synthetic`` workload.

Mechanism: for each request a passage length is drawn, a passage of about that many tokens is cut at the ends
of sentences or paragraphs, one of the ``TEMPLATES`` is put around it, and the model's chat template around
that. Arrival times, passage lengths, output lengths, caps and texts each have a random stream of their own.
All prompts are made at construction, so that making them delays no arrival.

With ``enforce_lengths`` every output has its drawn length: it is in ``Arrival.truth`` only, hidden from
policies, and the sampling says ``ignore_eos``. Without, there is no truth: the model ends by itself or at its
cap. The capability ``workload.truth`` is declared either way, as a spec cannot depend on settings; an
executor that lives on truths refuses requests without them.

Faithful when: no two prompts are equal as long as the corpus has another one; the lengths of outputs and caps
follow their laws exactly, those of passages up to the cut at a sentence; no prompt and output together exceed
the model's length.

Tier: stable.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.core.api import Arrival, Cancel, ConfigError, Context, RequestSpec, Truth, WorkloadError
from servelab.core.corpus import digest, part
from servelab.core.records import RequestFinished
from servelab.core.sampling import SamplingParams
from servelab.core.text import Tokenizer
from servelab.plugins.workloads._arrivals import MIN_RATE
from servelab.plugins.workloads._describe import arrival_statistics, json_settings, statistics
from servelab.plugins.workloads._laws import Constant, LengthLaw, LogNormal
from servelab.plugins.workloads._passages import Passage, Passages
from servelab.plugins.workloads._traffic import Traffic

log = logging.getLogger("servelab")

PART = "prompt"
"""Part of the corpus that prompts come from."""

TEMPLATES = (
    "Explain this passage to a beginner:\n\n{passage}",
    "Summarise the following text in three points.\n\n{passage}",
    "Here is a part of Python's help on {topic}.\n\n{passage}\n\nWrite a short example program for it.",
    "{passage}\n\nWhat does this say about {topic}? Answer in a few sentences.",
    "Rewrite this in plain words, without jargon:\n\n{passage}",
    "Read this and ask three questions that test whether a reader understood it.\n\n{passage}",
    "I am learning Python and do not understand this text:\n\n{passage}\n\nWhat is its main idea?",
    "Which mistakes could a programmer make who has not read the following?\n\n{passage}",
    "List every technical term in this text on {topic}, with a definition of each.\n\n{passage}",
    "{passage}\n\nExplain the text above with a comparison from everyday life.",
    "Turn this into a dialogue between a teacher and a student:\n\n{passage}",
    "My colleague sent me this about {topic}:\n\n{passage}\n\nWrite a friendly reply that sums it up.",
)
"""What a user asks; ``{passage}`` is the text, ``{topic}`` the name of the help topic it is from."""


class Sampling(BaseModel):
    """How tokens are drawn, the same for all requests; names and meanings are vLLM's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="0: the most likely token. Ours; vLLM's default is 1.",
    )
    top_k: int = Field(
        default=0, ge=-1, description="Only so many most likely tokens; 0 or -1: all. vLLM's default."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Only the smallest set of this probability. vLLM's default."
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Only tokens at least so likely relative to the most likely. vLLM's default.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Divides positive logits of tokens seen in prompt or output. vLLM's default.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Off logits of tokens in the output. vLLM's default."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, once per occurrence. vLLM's default."
    )


class ChatConfig(Traffic):
    """Settings of the ``chat`` workload. Defaults are ours: more than a model of 135 million weights on two
    CPU cores keeps up with, so that queue and KV pages fill; it serves them in one to two minutes."""

    num_requests: int = Field(default=64, ge=1, le=100_000, description="How many requests, n.")
    request_rate: float = Field(
        default=4.0, ge=MIN_RATE, description="R in requests/s; inf: all at time 0 (vLLM's default)."
    )

    prompt_length: LengthLaw = Field(
        default=LogNormal(median=120, sigma=0.6, min=24, max=600),
        description="Law of the passage's length in tokens, before it is cut at the nearest end of a "
        "sentence; instruction, system prompt and chat template come on top. Ours.",
    )
    output_length: LengthLaw = Field(
        default=LogNormal(median=150, sigma=0.8, min=4, max=768),
        description="Law of the true output length in tokens: enforced, and hidden from policies. Without "
        "effect unless enforce_lengths. Ours.",
    )
    max_new_tokens: LengthLaw = Field(
        default=Constant(value=1024),
        description="Law of the client's cap in tokens, independent of the true length. An output above its "
        "cap is cut there; ``describe`` counts them as ``length_capped``. Ours.",
    )
    enforce_lengths: bool = Field(
        default=True,
        description="True: every output has exactly its drawn length, whatever the model says. False: the "
        "model ends by itself or at the cap; such runs need an executor that runs a model. Ours.",
    )
    system: str | None = Field(
        default=None,
        min_length=1,
        description="System prompt of every request: a prefix that all share. None: what the model's "
        "template does without. Ours.",
    )
    sampling: Sampling = Field(
        default=Sampling(), description="How tokens are drawn; greedy unless told otherwise."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.enforce_lengths and self.max_new_tokens.highest < self.output_length.lowest:
            raise ValueError(
                f"every request would be cut: max_new_tokens is at most {self.max_new_tokens.highest}, "
                f"output_length at least {self.output_length.lowest}: raise the first or lower the second"
            )
        if self.samples > 1 and not self.sampling.temperature:
            raise ValueError(
                f"the {self.samples} samples of a prompt would be equal: set sampling.temperature above 0, "
                "or samples to 1"
            )
        return self


class Chat:
    """Requests about real text.

    State: the prompts' token ids and one list per drawn quantity, made at construction; ``arrivals()`` only
    reads them, so it may be called again. Construction tokenizes the corpus part once and each prompt twice.

    Raises:
        ConfigError: the executor has no tokenizer, or its model no chat template.
        WorkloadError: a passage would be longer than the longest text, or a request than the model allows.
    """

    def __init__(self, config: ChatConfig, ctx: Context) -> None:
        self._config, self._where = config, f"workload {ctx.name!r}"
        if ctx.tokenizer is None:
            raise ConfigError(
                "prompts in words need a tokenizer",
                where=self._where,
                why="the executor offers none",
                do="choose an executor that runs a model (executor=torch), or workload=synthetic",
            )
        self._tokenizer: Tokenizer = ctx.tokenizer
        self._around = len(ctx.tokenizer.encode(""))
        # drawn once, so that every stream below can be restarted
        self._root = ctx.rng.getrandbits(64)
        self._times = config.times_ns(self._stream("arrival"))
        self._wanted = self._column("prompt", config.prompt_length)
        self._caps = self._column("cap", config.max_new_tokens)
        self._outputs = self._column("output", config.output_length) if config.enforce_lengths else None
        others = range(1, config.samples if config.enforce_lengths else 1)
        self._further = [self._column(f"output/{k}", config.output_length) for k in others]
        """True lengths of the further samples of each prompt."""
        self._passages: list[Passage] = []
        self._prompts: list[tuple[int, ...]] = []
        self._repeated = 0
        self._write()
        self._check_lengths(ctx.limits.max_model_len, ctx.model.max_position)

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """The requests, in time order."""
        chosen = self._config.sampling.model_dump()
        for i, (time_ns, ids, cap) in enumerate(zip(self._times, self._prompts, self._caps, strict=True)):
            spec = RequestSpec(
                id=f"r{i}",
                prompt_tokens=len(ids),
                max_new_tokens=cap,
                prompt_ids=ids,
                sampling=SamplingParams(**chosen, max_tokens=cap, ignore_eos=self._config.enforce_lengths),
                n=self._config.samples,
            )
            truth = None
            if self._outputs:
                truth = Truth(self._outputs[i], tuple(each[i] for each in self._further))
            yield Arrival(time_ns, spec, truth)

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """Nothing: the loop is open."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Sample statistics, corpus and every setting, ready for JSON. See the workload's page for keys."""
        lengths = [len(ids) for ids in self._prompts]
        columns = [self._outputs, *self._further] if self._outputs else []
        off = [abs(p.tokens - wanted) for p, wanted in zip(self._passages, self._wanted, strict=True)]
        return {
            **arrival_statistics(self._times),
            "prompt_tokens": statistics(lengths),
            "passage_tokens": statistics([passage.tokens for passage in self._passages]),
            "passage_off_by": sum(off) / len(off),
            "output_tokens": statistics([o for each in columns for o in each]),
            "max_new_tokens": statistics(self._caps),
            "length_capped": sum(o > c for each in columns for o, c in zip(each, self._caps, strict=True)),
            "shared_prefix_share": _shared(self._prompts) / sum(lengths),
            "turns": 1,
            "cancellations": 0,
            "repeated_prompts": self._repeated,
            "enforce_lengths": self._config.enforce_lengths,
            "templates": len(TEMPLATES),
            "corpus": {
                "source": "pydoc_data.topics",
                "python": platform.python_version(),
                "part": PART,
                "part_sha256": digest(PART),
                "whole_sha256": digest("whole"),
                "topics": len(part(PART)),
                "topics_used": len({passage.topic for passage in self._passages}),
            },
            "settings": json_settings(self._config),
        }

    def _stream(self, quantity: str) -> Random:
        """The generator of one quantity, at its start; independent of every other quantity's."""
        return Random(f"{self._root}/{quantity}")

    def _column(self, quantity: str, law: LengthLaw) -> list[int]:
        sample, uniform = law.sampler(), self._stream(quantity).random
        return [sample(uniform()) for _ in range(self._config.num_requests)]

    def _count(self, text: str) -> int:
        """Tokens of a text, without those that the checkpoint puts around every text."""
        return len(self._tokenizer.encode(text)) - self._around

    def _write(self) -> None:
        """Choose the passages, ask the questions, make the prompts."""
        passages = Passages(part(PART), self._count)
        if (longest := max(self._wanted)) > passages.longest:
            raise WorkloadError(
                f"a passage of {longest} tokens cannot be cut",
                where=f"{self._where}, prompt_length {self._config.prompt_length}",
                why=f"passages come from one help topic, and the longest has {passages.longest} tokens",
                do=f"lower prompt_length to at most {passages.longest} (its max, or its values)",
            )
        texts, asked, dry = self._stream("text"), set[str](), set[int]()
        for wanted in self._wanted:
            passage, question = self._ask(passages, wanted, texts, asked, dry)
            self._repeated += question in asked
            asked.add(question)
            self._passages.append(passage)
            self._prompts.append(tuple(self._tokenizer.chat(self._messages(question))))
        pairs = zip(self._passages, self._wanted, strict=True)
        if short := sum(passage.tokens < 0.8 * wanted for passage, wanted in pairs):
            log.warning(
                "workload chat: %d of %d passages are much shorter than drawn: few help topics are that long "
                "(see passage_tokens in results.json)",
                short,
                len(self._passages),
            )

    def _ask(
        self, passages: Passages, wanted: int, rng: Random, asked: set[str], dry: set[int]
    ) -> tuple[Passage, str]:
        """A passage of about the wanted length and a question on it that was not asked yet, if there is one.
        ``dry`` keeps the lengths for which there is none any more.
        """
        shift = rng.randrange(len(TEMPLATES))
        templates = TEMPLATES[shift:] + TEMPLATES[:shift]
        nearest = None
        for passage in passages.draw(wanted, rng):
            for template in templates:
                question = template.format(passage=passage.text, topic=passage.topic)
                nearest = nearest or (passage, question)
                if question not in asked:
                    return passage, question
            if wanted in dry:
                break
        dry.add(wanted)
        assert nearest is not None  # every part has text
        return nearest

    def _messages(self, question: str) -> list[dict[str, str]]:
        system = self._config.system
        shared = [{"role": "system", "content": system}] if system else []
        return [*shared, {"role": "user", "content": question}]

    def _check_lengths(self, limit: int, max_position: int) -> None:
        """What a request really takes is its prompt and the output it is allowed."""
        for i, (ids, cap) in enumerate(zip(self._prompts, self._caps, strict=True)):
            columns = [self._outputs, *self._further] if self._outputs else []
            output = min(max(each[i] for each in columns), cap) if columns else cap
            if len(ids) + output <= limit:
                continue
            if limit < max_position:
                otherwise = f"raise engine.max_model_len (the model allows {max_position})"
            else:
                otherwise = "choose a model with a longer context"
            law = f"output_length {self._config.output_length}, " if self._outputs else ""
            raise WorkloadError(
                f"request r{i} is longer than the model allows",
                where=f"{self._where}, prompt_length {self._config.prompt_length}, {law}"
                f"max_new_tokens {self._config.max_new_tokens}",
                why=f"prompt of {len(ids)} tokens (passage of {self._passages[i].tokens}, instruction, "
                f"template) plus {output} of output is {len(ids) + output}, limit {limit} (max_model_len)",
                do=f"lower these laws (max, or their values), shorten system, or {otherwise}",
            )


def _shared(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that an infinite prefix cache could reuse: all but the nodes of the prompts' tree."""
    return sum(_common(a, b) for a, b in pairwise(sorted(prompts)))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))

"""A tiny random model with a tokenizer, as transformers saves it, and an ``LLM`` on it in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="an LLM runs a model with torch")
pytest.importorskip("tokenizers", reason="an LLM reads text with tokenizers")
pytest.importorskip("transformers", reason="tiny models are made with transformers")

from servelab import LLM, SamplingParams
from servelab.core.api import hookimpl
from servelab.core.records import Record

MAX_POSITION = 4096
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Recorder:
    """Keeps what an engine said."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)

    def of(self, ev: str) -> list[Any]:
        return [r for r in self.records if r.ev == ev]

    def outcomes(self, start: int = 0) -> list[str]:
        return [r.outcome for r in self.of("finished")[start:]]


@pytest.fixture(scope="session")
def recorder_class() -> type[Recorder]:
    return Recorder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, 1999 times\n"] * 8, trainer)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=made.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITION,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make(folder: Path) -> Callable[..., LLM]:
    """An ``LLM`` on the tiny model; the test closes it."""

    def llm(**settings: Any) -> LLM:
        return LLM(**{"model": folder, "dtype": "float64", **settings})

    return llm


@pytest.fixture(scope="session")
def recorder() -> Recorder:
    """What the engine of ``llm`` says."""
    return Recorder()


@pytest.fixture(scope="session")
def llm(make: Callable[..., LLM], recorder: Recorder) -> Iterator[LLM]:
    with make(observers=[recorder]) as made:
        yield made


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    """The same model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def greedy() -> Callable[..., SamplingParams]:
    """Greedy, and no end but the cap unless asked for."""

    def params(**fields: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0, "ignore_eos": True, "max_tokens": 24, **fields})

    return params


@pytest.fixture
def ending_with(folder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """The model with another end of text."""

    def copy(eos: int) -> Path:
        path = tmp_path / "ending"
        shutil.copytree(folder, path)
        for name in ("config.json", "generation_config.json"):
            fields = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps({**fields, "eos_token_id": eos}))
        return path

    return copy

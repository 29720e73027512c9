"""``tools/train_reference.py``, with a tiny recipe and a few paragraphs of each part of the corpus."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the reference model is trained with torch")
pytest.importorskip("transformers", reason="the reference model is trained with transformers")

import torch
from omegaconf import OmegaConf

from servelab import LLM, SamplingParams
from servelab.core import corpus
from servelab.core.config import ModelConfig
from servelab.core.corpus import Topic
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import find

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "steps": 3,
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv-heads": 2,
    "ffn": 48,
    "vocab": 300,
    "window": 16,
}
PARTS = {
    name: tuple(Topic(t.name, t.text[:300]) for t in corpus.part(name)[:2])
    for name in ("prompt", "calibration", "evaluation")
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = spec_from_file_location("train_reference", ROOT / "tools" / "train_reference.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Topic, ...]]:
    """The corpus of a test, which it may change."""
    small = dict(PARTS)
    monkeypatch.setattr(corpus, "part", small.__getitem__)
    return small


@pytest.fixture
def make(script: Any, tmp_path: Path) -> Make:
    """Run the script; the folder it was to make."""

    def run(name: str = "made", *args: str, status: int = 0) -> Path:
        tiny = [f"--{setting}={value}" for setting, value in TINY.items()]
        assert script.main(["--out", str(tmp_path / "models" / name), *tiny, *args]) == status
        return tmp_path / "models" / name

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def made_of(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "model.safetensors").read_bytes(), (folder / "tokenizer.json").read_bytes()


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "reference.json").read_text())
    return record


def test_logits_here_are_those_of_transformers(make: Make) -> None:
    from transformers import AutoModelForCausalLM

    folder = make()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=model.config.vocab_size)
    with LLM(folder, dtype="float32", max_model_len=256) as llm:
        [one] = llm.generate(PARTS["evaluation"][0].text[:100], params, progress=False)
    ids = torch.tensor([one.prompt_token_ids + one.token_ids[:-1]])
    with torch.inference_mode():
        theirs = model(ids).logits[0, len(one.prompt_token_ids) - 1 :].log_softmax(-1)
    assert one.logprobs is not None
    ours = torch.tensor([[row[i] for i in range(model.config.vocab_size)] for row in one.logprobs])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_text_is_read_as_transformers_reads_it(make: Make) -> None:
    from transformers import AutoTokenizer

    folder = make()
    theirs = AutoTokenizer.from_pretrained(folder)
    text = PARTS["evaluation"][1].text + " naïve 2024 \t<|endoftext|>"
    talk = [{"role": "system", "content": "Short."}, {"role": "user", "content": "What is a list?"}]
    with LLM(folder, max_model_len=256) as llm:
        ids = llm.tokenizer.encode(text)
        assert ids == theirs.encode(text)
        assert llm.tokenizer.decode(ids) + "<|endoftext|>" == text
        assert llm.tokenizer.stop_ids == {theirs.eos_token_id}
        assert (
            llm.tokenizer.chat(talk)
            == theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        )


def test_one_seed_makes_one_model(make: Make) -> None:
    assert made_of(make("one")) == made_of(make("two"))
    weights, tokenizer = made_of(make("three", "--seed", "1"))
    assert weights != made_of(make("one"))[0]
    assert tokenizer == made_of(make("one"))[1]


def test_training_ids_are_the_training_text_and_no_other(script: Any) -> None:
    texts = script.texts(*script.TRAINING)
    assert texts == [topic.text for part in ("prompt", "calibration") for topic in PARTS[part]]
    tokenizer = script.make_tokenizer(texts, 300)
    ids = script.token_ids(tokenizer, texts)
    cut = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(script.END)
    assert cut == ["", *texts, ""]


def test_held_out_text_changes_measures_only(make: Make, parts: dict[str, tuple[Topic, ...]]) -> None:
    one = make("one")
    parts["evaluation"] = (Topic("other", "Quite another text, of words that stand nowhere else."),)
    two = make("two")
    assert made_of(one) == made_of(two)
    first, second = record_of(one), record_of(two)
    assert first["perplexity"]["training"] == second["perplexity"]["training"]
    assert first["perplexity"]["held_out"] != second["perplexity"]["held_out"]
    assert first["recipe"] != second["recipe"]


def test_perplexity_is_of_every_token_but_the_first(script: Any, make: Make) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [topic.text for topic in PARTS["evaluation"]]
    ids = tokenizer(script.END + script.END.join(texts) + script.END)["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        row = torch.tensor([ids[start : start + 17]])
        total += float(model(row, labels=row).loss.detach()) * (row.shape[1] - 1)
    found = record_of(folder)["perplexity"]["held_out"]
    size = len("".join(texts).encode())
    assert found["per_token"] == pytest.approx(torch.tensor(total / (len(ids) - 1)).exp().item(), rel=1e-4)
    assert found["per_byte"] == pytest.approx(torch.tensor(total / size).exp().item(), rel=1e-4)


def test_training_makes_the_loss_smaller(make: Make) -> None:
    found = record_of(make("longer", "--steps", "60"))["perplexity"]
    assert found["training"]["per_token"] < found["held_out_before"]["per_token"] / 2
    assert found["held_out"]["per_token"] < found["held_out_before"]["per_token"]


def test_a_second_run_makes_nothing(
    make: Make, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(make())
    monkeypatch.setattr(script, "build", None)
    assert contents(make()) == before
    assert "already there" in capsys.readouterr().out


def test_force_makes_it_again(make: Make) -> None:
    folder = make()
    (folder / "model.safetensors").write_bytes(b"damaged")
    make("made", "--force", "--seed", "1")
    assert record_of(folder)["settings"]["seed"] == 1
    assert len((folder / "model.safetensors").read_bytes()) > 1000
    assert [p.name for p in folder.parent.iterdir()] == ["made"]


def test_another_recipe_is_not_overwritten_unasked(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(make())
    folder = make("made", "--seed", "1", status=2)
    assert contents(folder) == before
    assert "--force" in capsys.readouterr().err


def test_what_the_script_did_not_make_is_never_overwritten(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "models" / "made" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    make("made", "--force", status=2)
    assert mine.read_text() == "years of work"
    assert "something else" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["make_tokenizer", "train", "_save"])
def test_an_interrupt_leaves_nothing_and_keeps_what_was(
    make: Make, script: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*args: Any) -> None:
        if where == "_save":
            (args[0] / "config.json").write_text("{")
        raise KeyboardInterrupt

    kept = make("kept")
    before = contents(kept)
    monkeypatch.setattr(script, where, interrupted)
    make("made", status=130)
    make("kept", "--force", status=130)
    assert [p.name for p in kept.parent.iterdir()] == ["kept"]
    assert contents(kept) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--steps", "0"], "steps=0"),
        (["--threads", "0"], "threads=0"),
        (["--vocab", "100"], "vocab=100"),
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--heads", "3"], "hidden=32 is no even number of times heads=3"),
        (["--kv-heads", "3"], "heads=4 is no multiple of kv_heads=3"),
        (["--window", "4096"], "window=4096 is longer than max_position=2048"),
        (["--window", "2000"], "the training text has only"),
        (["--learning-rate", "1e30"], "lower --learning-rate"),
    ],
)
def test_settings_that_make_no_model(
    make: Make, capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    folder = make("made", *args, status=2)
    assert says in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").write_text("a file")
    make(status=2)
    message = capsys.readouterr().err
    assert "cannot be written" in message
    assert all(f"  {part}:" in message for part in ("where", "why", "do"))


def test_a_missing_library_is_named(
    make: Make, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(script, "import_module", absent)
    assert not make(status=2).exists()
    assert '-e ".[test]"' in capsys.readouterr().err


def test_the_configured_model_is_the_one_it_makes(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, path = script.Recipe(), ROOT / "configs" / "model" / f"{script.NAME}.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        find(ModelConfig(**config))
    assert str(tmp_path / "models" / script.NAME) in error.value.what
    assert error.value.do == "make it: python tools/train_reference.py"
    shape = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "max_position")
    assert {name: config[name] for name in shape} == {name: getattr(recipe, name) for name in shape}
    assert config["head_dim"] * recipe.heads == recipe.hidden

"""Tokenizers: the same ids as transformers for folders and for GGUF files, stops, chat templates."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from servelab.core.config import ModelConfig
from servelab.core.errors import ConfigError
from servelab.plugins.executors.checkpoint.chat import ChatTemplate
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import find
from servelab.plugins.executors.checkpoint.gguf_tokenizer import tokenizer_files

Local = Callable[..., ModelConfig]
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "  two  spaces and\ttabs\n\n\nand lines\r\n",
    "In 1999, 31415926 people; 3.14 and 1,000,000: v2.0.1",
    "١٢٣ ①②③ ½ 二十",
    " ".join(["the fox 12 1999 99 1000\n\n", "x = 3.14\n    we'll THEY'RE ...\n", "(99)! 1999!\n\n\n"]),
    "def f(x):\n    return x + 1  # comment\n",
    "it's we'll THEY'RE I'd",
    "naïve café — “quotes” …",
    "e\u0301 is é",
    "你好世界 こんにちは 🙂👩‍👩‍👧 \u200d",
    "<|im_start|>user\nHi<|im_end|> <|endoftext|>after",
    "<|im_start| >almost<|",
    "\x00\x7f\u00a0\u2028",
    "a" * 300,
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|> 12"}]


@pytest.fixture
def copy(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def _settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},  # tokenizer.json decides
        {"eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"}},
        {"pad_token": "e"},
    ],
)
def test_folders_give_the_ids_of_transformers(copy: Path, local: Local, changes: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    _settings(copy, **changes)
    ours, theirs = find(local(copy)).tokenizer(), AutoTokenizer.from_pretrained(copy)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
    assert ours.chat(MESSAGES) == chat["input_ids"]
    assert ours.vocab_size == len(theirs)


def test_special_tokens_around_texts_are_those_of_tokenizer_json(copy: Path, local: Local) -> None:
    from transformers import AutoTokenizer

    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(copy / "tokenizer.json"))
    ours, theirs = find(local(copy)).tokenizer(), AutoTokenizer.from_pretrained(copy)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text)[0] == 1
    assert ours.chat(MESSAGES).count(1) == 3  # none is added to those of the template


def test_text_comes_back(tiny_folder: Path, local: Local) -> None:
    tokenizer = find(local(tiny_folder)).tokenizer()
    for text in TEXTS:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("🙂")[:-1]).endswith("\ufffd")
    assert tokenizer.decode([1, *tokenizer.encode("fox"), 2]) == "fox"


def test_limits_stored_with_a_tokenizer_do_not_cut_texts(copy: Path, local: Local) -> None:
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(copy / "tokenizer.json"))
    assert len(find(local(copy)).tokenizer().encode("a" * 50)) > 8
    assert len(find(local(copy)).tokenizer().encode("a")) == 1


def test_stops_come_from_every_file_that_states_them(copy: Path, local: Local) -> None:
    def stops() -> frozenset[int]:
        return find(local(copy)).tokenizer().stop_ids

    assert stops() == {2}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert stops() == {0, 2}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    assert stops() == {0, 2, 5}
    (copy / "generation_config.json").unlink()
    _settings(copy, eos_token="<|endoftext|>")
    assert stops() == {0, 2, 5}  # <|im_end|>, 2, ends a turn whatever the files say


def test_a_model_without_template_cannot_chat(copy: Path, local: Local) -> None:
    (copy / "chat_template.jinja").unlink()
    _settings(copy, chat_template=None)
    tokenizer = find(local(copy)).tokenizer()
    assert tokenizer.encode("fox")
    with pytest.raises(ConfigError, match="no chat template") as caught:
        tokenizer.chat(MESSAGES)
    assert caught.value.do


def test_templates_by_name_give_the_default_one(copy: Path, local: Local) -> None:
    (copy / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "fox"}]
    _settings(copy, chat_template=named)
    tokenizer = find(local(copy)).tokenizer()
    assert tokenizer.chat(MESSAGES) == tokenizer.encode("fox")


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_broken_tokenizer_is_refused(copy: Path, local: Local, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be read"):
        find(local(copy)).tokenizer()


def test_a_folder_without_tokenizer_json_is_converted_by_transformers(copy: Path, local: Local) -> None:
    expected = [find(local(copy)).tokenizer().encode(text) for text in TEXTS if text.isascii()]
    state = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text(json.dumps(state["vocab"]))
    (copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in state["merges"]))
    _settings(copy, tokenizer_class="GPT2Tokenizer")
    found = find(local(copy)).tokenizer()
    words = [t for t in TEXTS if t.isascii()]
    same = [
        found.encode(t) == e for t, e in zip(words, expected, strict=True) if not any(c.isdigit() for c in t)
    ]
    assert all(same)
    assert len(same) > 4
    for path in (copy / "vocab.json", copy / "merges.txt"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json"):
        find(local(copy)).tokenizer()


def test_code_that_comes_with_a_tokenizer_is_refused_without_asking(
    copy: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.json").write_text("{}")
    (copy / "tok.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\nclass Tok: pass\n")
    _settings(copy, tokenizer_class="Tok", auto_map={"AutoTokenizer": ["tok.Tok", None]})
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    with pytest.raises(ModelError, match="code of a checkpoint") as caught:
        find(local(copy)).tokenizer()
    assert "with tokenizer.json" in caught.value.do
    assert not asked
    assert not (copy / "ran").exists()


def test_no_torch_and_no_transformers_is_imported(tiny_folder: Path, tiny_gguf: Path) -> None:
    code = (
        "import sys\n"
        "from servelab.core.config import ModelConfig\n"
        "from servelab.plugins.executors.checkpoint.find import find\n"
        "assert not {'numpy', 'gguf', 'tokenizers', 'jinja2', 'huggingface_hub'} & set(sys.modules)\n"
        "for path in sys.argv[1:]:\n"
        "    t = find(ModelConfig(name='m', source='path', path=path)).tokenizer()\n"
        "    t.chat([{'role': 'user', 'content': 'x'}])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    src = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder), str(tiny_gguf)],
        env={"PYTHONPATH": str(src), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- GGUF

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def _split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), _byte_level(use_regex=False)]
    return pre_tokenizers.Sequence(parts)


PRE: dict[str, Any] = {
    "gpt-2": _byte_level(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
}


@pytest.mark.parametrize("name", sorted(PRE))
def test_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from(
    tmp_path: Path,
    name: str,
    bpe: Callable[..., Any],
    gguf_metadata: Callable[..., dict[str, Any]],
    write_gguf: Callable[..., Path],
    tiny_llama: Callable[..., Any],
    local: Local,
) -> None:
    original = bpe(PRE[name])
    if name == "qwen2":
        original.normalizer = normalizers.NFC()
    metadata = gguf_metadata(original, name)
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata)
    found = find(local(path)).tokenizer()
    bos = [1] if name == "llama-bpe" else []
    for text in TEXTS:
        assert found.encode(text) == bos + original.encode(text).ids, text
    others = [other for other in PRE if other != name]
    for other in others:  # the texts tell the rules apart
        different = bpe(PRE[name])
        different.pre_tokenizer = PRE[other]
        assert any(different.encode(t).ids != original.encode(t).ids for t in TEXTS), other
    assert found.chat(MESSAGES) == original.encode(found.chat_text(MESSAGES)).ids  # type: ignore[attr-defined]
    assert found.stop_ids == {2}
    assert found.vocab_size == 320


def test_digits_stand_alone_in_smollm(tiny_gguf: Path, local: Local) -> None:
    tokenizer = find(local(tiny_gguf)).tokenizer()
    digits = [tokenizer.encode(d) for d in "0123456789"]
    assert tokenizer.encode("0123456789") == [i for ids in digits for i in ids]
    assert all(len(ids) == 1 for ids in digits)


def _metadata(**changes: Any) -> dict[str, Any]:
    base = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "c", "ab", "abc", "<s>", "</s>", "<tool>"],
        "token_type": [1, 1, 1, 1, 1, 3, 3, 4],
        "merges": ["a b"],
        "bos_token_id": 5,
        "eos_token_id": 6,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in {**base, **changes}.items()}


def _encode(text: str, **changes: Any) -> list[int]:
    backend = tokenizers.Tokenizer.from_str(tokenizer_files(_metadata(**changes), "m.gguf")[0])
    ids: list[int] = backend.encode(text).ids
    return ids


def test_flags_of_the_metadata_put_tokens_around_texts() -> None:
    assert _encode("ab") == [3]
    assert _encode("ab", add_bos_token=True) == [5, 3]
    assert _encode("ab", add_bos_token=True, add_eos_token=True) == [5, 3, 6]
    assert _encode("ab", pre="llama-bpe") == [5, 3]
    assert _encode("ab", pre="llama-bpe", add_bos_token=False) == [3]
    with pytest.raises(ModelError, match="bos_token, which it does not name"):
        tokenizer_files(_metadata(add_bos_token=True, bos_token_id=None), "m.gguf")


def test_llama3_takes_whole_words_that_no_merge_makes() -> None:
    assert _encode("abc") == [3, 2]
    assert _encode("abc", pre="llama-bpe", add_bos_token=False) == [4]


def test_user_defined_tokens_are_found_and_shown_control_tokens_are_hidden() -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer_files(_metadata(), "m.gguf")[0])
    ids = backend.encode("a<tool>b</s>").ids
    assert ids == [0, 7, 1, 6]
    assert backend.decode(ids, skip_special_tokens=True) == "a<tool>b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "of the kind 'llama'"),
        ({"model": None}, "of the kind None"),
        ({"pre": "default"}, r"'default'; .*known: gpt-2, llama-bpe, qwen2, smollm"),
        ({"pre": None}, "pre-tokenizer is None"),
        ({"tokens": []}, "0 tokens"),
        ({"tokens": ["a", "b", "a", "ab", "abc", "<s>", "</s>", "<tool>"]}, r"8 tokens \(7 different\)"),
        ({"token_type": [1]}, "1 types"),
        ({"merges": []}, "0 merges"),
        ({"merges": ["ab"]}, "'ab' is no merge"),
        ({"merges": ["a z"]}, "do not fit"),
        ({"eos_token_id": 99}, "eos_token is token 99"),
    ],
)
def test_what_cannot_be_rebuilt_exactly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        tokenizer_files(_metadata(**changes), "m.gguf")
    assert "Hugging Face folder" in caught.value.do


def test_weights_of_a_gguf_are_there_whatever_its_tokenizer(
    tmp_path: Path, write_gguf: Any, tiny_llama: Any, vocabulary: dict[str, Any], local: Local
) -> None:
    checkpoint = find(local(write_gguf(tmp_path / "m.gguf", tiny_llama(), {**vocabulary, "pre": "exotic"})))
    with pytest.raises(ModelError, match="'exotic'"):
        checkpoint.tokenizer()


# ---------------------------------------------------------------- templates


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n"
        "    {% endif %}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
        "{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ dict(a=1) | tojson }}",
    ],
)
def test_templates_render_as_in_transformers(source: str, bpe: Callable[..., Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=bpe(), bos_token="<|im_start|>", chat_template=source)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, {"bos_token": "<|im_start|>"}, "here").render(MESSAGES) == expected


def test_a_template_that_refuses_says_why() -> None:
    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "here")
    with pytest.raises(ConfigError, match=r"refuses the messages(.|\n)*roles must alternate"):
        refusing.render(MESSAGES)
    with pytest.raises(ConfigError, match="refuses the messages"):
        ChatTemplate("{{ messages[0]['content'] + 1 }}", {}, "here").render(MESSAGES)


def test_a_template_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate("{% for %}", {}, "here")


def test_templates_cannot_leave_the_sandbox() -> None:
    with pytest.raises(ConfigError, match="refuses the messages"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}, "here").render(MESSAGES)
    with pytest.raises(ConfigError, match="refuses the messages"):
        ChatTemplate("{{ messages.append(1) }}", {}, "here").render(MESSAGES)


def test_prompts_do_not_depend_on_the_day() -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "here").render(MESSAGES) == "26 Jul 2024"


def test_decoder_of_the_library_is_the_one_used() -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    text, _ = tokenizer_files(_metadata(), "m.gguf")
    assert json.loads(text)["decoder"] == json.loads(made.to_str())["decoder"]

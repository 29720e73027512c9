"""``core/text.py``'s ``Tokenizer`` on the ``tokenizers`` library.

transformers' ``AutoTokenizer`` takes seconds to import and brings torch along; it is used only where a folder
has no ``tokenizer.json``, to convert what it has. Equality with it is tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from servelab.core.errors import ConfigError
from servelab.plugins.executors.checkpoint.chat import ChatTemplate
from servelab.plugins.executors.checkpoint.errors import ModelError, library
from servelab.plugins.executors.checkpoint.folder import read_json

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SOURCES = ("vocab.json", "tokenizer.model", "*.tiktoken")
"""What transformers makes a tokenizer.json of."""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""Special tokens that end a turn wherever they are in a vocabulary."""


class CheckpointTokenizer:
    """Text in and out, by a checkpoint's own files.

    Args:
        text: of tokenizer.json.
        settings: fields of tokenizer_config.json.
        stop_ids: ids that the model's configuration says end a text.
        where: file or folder, for messages.

    Raises:
        ModelError: the text is no tokenizer.
        ConfigError: the chat template cannot be read.
    """

    def __init__(self, text: str, settings: Mapping[str, Any], stop_ids: frozenset[int], where: str) -> None:
        library_: Any = library("tokenizers", why="text is cut into tokens with it")
        try:
            self._backend: Any = library_.Tokenizer.from_str(text)
        except Exception as exc:  # the library raises plain Exception
            raise ModelError(
                "tokenizer.json cannot be read", where=where, why=str(exc), do="download it again"
            ) from exc
        self._where = where
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special = {
            role: content for role in _ROLES if (content := _content(settings.get(role))) is not None
        }
        known = [t for t in self._special.values() if self._backend.token_to_id(t) is not None]
        self._backend.add_special_tokens(
            [library_.AddedToken(t, normalized=False, special=True) for t in known]
        )
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        ends = [t for t in (self._special.get("eos_token"), *END_OF_TURN) if t in vocabulary]
        self.stop_ids = stop_ids | {vocabulary[token] for token in ends}
        template = _template(settings.get("chat_template"))
        self._template = ChatTemplate(template, self._special, where) if template else None

    def encode(self, text: str) -> list[int]:
        """See ``core/text.py``."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See ``core/text.py``."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See ``core/text.py``."""
        ids: list[int] = self._backend.encode(self.chat_text(messages), add_special_tokens=False).ids
        return ids

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What ``chat`` encodes."""
        if self._template is None:
            raise ConfigError(
                "the model has no chat template",
                where=self._where,
                why="its files hold none: it is a base model, or the file that holds it is missing",
                do="send plain text; or use the instruction-tuned model; or add chat_template.jinja to it",
            )
        return self._template.render(messages)


def from_folder(folder: Path, config: Mapping[str, Any]) -> CheckpointTokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: with tokenizer.json, or with what transformers makes one of.
        config: fields of config.json.

    Raises:
        ModelError: its files are missing or damaged.
        ConfigError: the chat template cannot be read.
    """
    settings = _settings(folder)
    stop_ids = _ids(config.get("eos_token_id"))
    if (folder / "generation_config.json").is_file():
        stop_ids |= _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else _converted(folder)
    return CheckpointTokenizer(text, settings, stop_ids, str(folder))


def from_gguf(
    text: str, settings: Mapping[str, Any], metadata: Mapping[str, Any], where: str
) -> CheckpointTokenizer:
    """The tokenizer of a GGUF file.

    Args:
        text: of tokenizer.json, see ``gguf_tokenizer.py``.
        settings: fields of tokenizer_config.json.
        metadata: of the file.
        where: the file, for messages.
    """
    keys = ("eos_token_id", "eot_token_id")
    stop_ids = frozenset().union(*(_ids(metadata.get(f"tokenizer.ggml.{key}")) for key in keys))
    return CheckpointTokenizer(text, settings, stop_ids, where)


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings


def _converted(folder: Path) -> str:
    if not any(list(folder.glob(pattern)) for pattern in _SOURCES):  # transformers would make an empty one
        raise _no_tokenizer(folder, f"nor one of {', '.join(_SOURCES)}, of which one can be made")
    transformers: Any = library("transformers", why=f"{folder} has no tokenizer.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as exc:  # transformers raises many kinds
        if isinstance(exc, ValueError) and "trust_remote_code" in str(exc):
            raise ModelError(
                "the tokenizer is code that comes with the model",
                where=str(folder),
                why="it has no tokenizer.json, and code of a checkpoint (auto_map) is never run",
                do="use a checkpoint of the model with tokenizer.json; or add that file to the folder",
            ) from exc
        first = str(exc).strip().splitlines()
        raise _no_tokenizer(folder, f"transformers: {first[0] if first else type(exc).__name__}") from exc
    return text


def _no_tokenizer(folder: Path, why: str) -> ModelError:
    return ModelError(
        "the folder has no tokenizer.json, and none can be made",
        where=str(folder),
        why=why,
        do="add the tokenizer's files of the original model: tokenizer.json and tokenizer_config.json",
    )


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _template(value: Any) -> str | None:
    """One template out of the two forms of tokenizer_config.json: a text, or several by name."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value}.get("default")
    return value if isinstance(value, str) else None

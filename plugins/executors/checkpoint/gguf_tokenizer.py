"""The ``tokenizer.json`` and ``tokenizer_config.json`` that a GGUF's metadata amount to.

Byte-level BPE only. How a text is cut before BPE is not in the file, only its name (``tokenizer.ggml.pre``);
the names below are those whose rule is known for certain, others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from servelab.core.errors import nearest
from servelab.plugins.executors.checkpoint.errors import ModelError, library

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """How a text is cut into words."""

    split: str | None = None
    """Regex whose matches are the words; None: GPT-2's own."""
    digits: bool = False
    """Each digit is a word, before anything else."""
    nfc: bool = False
    """The text is normalized to NFC first."""
    whole_words: bool = False
    """A word that is in the vocabulary is taken without merging."""
    bos: bool = False
    """Texts start with the beginning-of-sequence token unless the metadata say otherwise."""


_RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule(digits=True),
    "llama-bpe": _Rule(split=_WORDS % "{1,3}", whole_words=True, bos=True),
    "qwen2": _Rule(split=_WORDS % "", nfc=True),
}


def tokenizer_files(metadata: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The text of tokenizer.json and the fields of tokenizer_config.json.

    Raises:
        ModelError: there is no vocabulary, or it is of a kind we cannot rebuild exactly.
    """
    tokenizers = library("tokenizers", why="text is cut into tokens with it")
    kind, rule_name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise _refused(where, f"its vocabulary is of the kind {kind!r}; byte-level BPE ('gpt2') is read")
    if rule_name not in _RULES:
        raise _refused(where, f"its pre-tokenizer is {rule_name!r}; {nearest(str(rule_name), _RULES)}")
    rule = _RULES[rule_name]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    merges = [_pair(merge, where) for merge in metadata.get("tokenizer.ggml.merges") or []]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not tokens or not merges or len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise _refused(
            where,
            f"{len(tokens)} tokens ({len(vocabulary)} different), {len(types)} types and "
            f"{len(merges)} merges are no BPE vocabulary",
        )
    try:
        bpe = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words)
    except Exception as exc:  # the library raises plain Exception
        raise _refused(where, f"its merges do not fit its tokens: {exc}") from exc
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.NFC() if rule.nfc else None
    tokenizer.pre_tokenizer = _pre_tokenizer(rule, tokenizers)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()

    def of(kind: int, special: bool) -> list[Any]:
        chosen = [token for token, other in zip(tokens, types, strict=True) if other == kind]
        return [tokenizers.AddedToken(token, normalized=False, special=special) for token in chosen]

    tokenizer.add_tokens(of(_USER_DEFINED, special=False))
    tokenizer.add_special_tokens(of(_CONTROL, special=True))
    special = _special(metadata, tokens, where)
    if post := _post_processor(metadata, rule, special, tokenizers, where):
        tokenizer.post_processor = post
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, (token, _) in special.items()},
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer.to_str(pretty=False), config


def _pre_tokenizer(rule: _Rule, tokenizers: Any) -> Any:
    pre = tokenizers.pre_tokenizers
    own_words = rule.split is None
    steps = [pre.ByteLevel(add_prefix_space=False, use_regex=own_words)]
    if rule.split is not None:
        steps.insert(0, pre.Split(tokenizers.Regex(rule.split), behavior="isolated"))
    if rule.digits:
        steps.insert(0, pre.Digits(individual_digits=True))
    return pre.Sequence(steps)


def _special(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, tuple[str, int]]:
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found: dict[str, tuple[str, int]] = {}
    for name, key in named.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise _refused(where, f"its {name} is token {index}, its vocabulary has {len(tokens)}")
        found[name] = (tokens[index], index)
    return found


def _post_processor(
    metadata: Mapping[str, Any],
    rule: _Rule,
    special: Mapping[str, tuple[str, int]],
    tokenizers: Any,
    where: str,
) -> Any:
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", rule.bos),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    used = [name for name in wanted if wanted[name]]
    if missing := [name for name in used if name not in special]:
        raise _refused(where, f"texts are to carry the {missing[0]}, which it does not name")
    if not used:
        return None
    single = [special["bos_token"][0], "$A"] if wanted["bos_token"] else ["$A"]
    if wanted["eos_token"]:
        single.append(special["eos_token"][0])
    return tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[special[name] for name in used]
    )


def _pair(merge: str, where: str) -> tuple[str, str]:
    left, blank, right = merge.partition(" ")
    if not blank or not left or not right:
        raise _refused(where, f"{merge!r} is no merge of two tokens")
    return left, right


def _refused(where: str, why: str) -> ModelError:
    return ModelError(
        "the tokenizer of this GGUF cannot be rebuilt exactly",
        where=where,
        why=why,
        do="use the model's Hugging Face folder (model=local model.path=FOLDER): it brings its own tokenizer",
    )

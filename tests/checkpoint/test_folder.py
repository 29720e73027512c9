"""Folders in Hugging Face format: single, sharded, incomplete, with pickles only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from servelab.core.config import ModelConfig
from servelab.core.errors import ConfigError
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import describe, find
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.shape import DecoderConfig
from servelab.plugins.executors.torch.weights import tensors

Local = Callable[..., ModelConfig]
SHAPE = {
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


@pytest.fixture
def copy(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path / "sharded"
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_folder_gives_its_tensors_shape_and_origin(
    tiny_folder: Path, local: Local, tiny_llama: Callable[..., Any]
) -> None:
    checkpoint = find(local(tiny_folder))
    expected = tiny_llama().state_dict()
    del expected["lm_head.weight"]  # tied
    found = dict(tensors(checkpoint))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint.files == (tiny_folder / "model.safetensors",)
    assert checkpoint.provenance == {"source": "path", "path": str(tiny_folder), "quantization": "none"}
    assert describe(local(tiny_folder)) == SHAPE


def test_shards_give_every_tensor_once(sharded: Path, local: Local, tiny_llama: Callable[..., Any]) -> None:
    expected = tiny_llama(tie_word_embeddings=False).state_dict()
    found = list(tensors(find(local(sharded))))
    assert sorted(name for name, _ in found) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)


def test_a_tensor_in_two_shards_is_taken_from_the_one_the_index_names(sharded: Path, local: Local) -> None:
    from safetensors.torch import load_file, save_file

    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: torch.zeros_like(tensor)}, last)
    found = [t for n, t in tensors(find(local(sharded))) if n == name]
    assert len(found) == 1
    assert torch.equal(found[0], tensor)


def test_a_tied_output_that_was_saved_is_read_and_not_taken(copy: Path, local: Local) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old checkpoints hold it
    save_file(weights, copy / "model.safetensors")
    checkpoint = find(local(copy))
    assert dict(tensors(checkpoint)).keys() == weights.keys()
    tied = Decoder(DecoderConfig.of(checkpoint.config), torch.float32, tensors(checkpoint))
    assert tied.head(torch.ones(1, 64)).any()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    checkpoint = find(local(copy))
    untied = Decoder(DecoderConfig.of(checkpoint.config), torch.float32, tensors(checkpoint))
    assert not untied.head(torch.ones(1, 64)).any()


def test_describing_needs_no_weights(copy: Path, local: Local) -> None:
    (copy / "model.safetensors").unlink()
    assert describe(local(copy)) == SHAPE
    with pytest.raises(ModelError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        find(local(copy))


def test_a_missing_path_is_named(tmp_path: Path, local: Local) -> None:
    with pytest.raises(ModelError, match=r"there is no .*nowhere") as caught:
        find(local(tmp_path / "nowhere"))
    assert caught.value.do


def test_a_folder_without_config_lists_what_it_holds(copy: Path, local: Local) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json\n.*\n.*model.safetensors"):
        find(local(copy))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_refused(copy: Path, local: Local, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        find(local(copy))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason_and_the_way_out(copy: Path, local: Local, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    for path in (copy, copy / name):
        with pytest.raises(ModelError, match="can run") as caught:
            find(local(path))
        assert "safetensors" in caught.value.do


def test_a_missing_shard_is_named(sharded: Path, local: Local) -> None:
    victim = max(sharded.glob("model-*.safetensors"))
    victim.unlink()
    with pytest.raises(ModelError, match=f"the shard {victim.name} is missing"):
        find(local(sharded))


def test_a_shard_of_another_checkpoint_is_refused(sharded: Path, local: Local) -> None:
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    shutil.copy(first, last)
    with pytest.raises(ModelError, match="of different checkpoints"):
        find(local(sharded))


def test_an_index_cannot_lead_out_of_the_folder(sharded: Path, local: Local) -> None:
    index = sharded / "model.safetensors.index.json"
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(min(sharded.glob("model-*.safetensors")), outside)
    content = json.loads(index.read_text())
    content["weight_map"] = {name: "../outside.safetensors" for name in content["weight_map"]}
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is missing"):
        find(local(sharded))


def test_a_cut_shard_is_refused_before_loading(sharded: Path, local: Local) -> None:
    victim = max(sharded.glob("model-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{victim.name} is not a whole safetensors file"):
        find(local(sharded))


def test_integer_weights_are_refused(copy: Path, local: Local) -> None:
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.ones(2, 2, dtype=torch.int8)}, copy / "model.safetensors")
    with pytest.raises(ModelError, match="is of type I8"):
        find(local(copy))


def test_settings_that_contradict_the_files_are_named(tiny_folder: Path, local: Local) -> None:
    with pytest.raises(ConfigError, match=r"model.layers is 3, the files say 2; model.vocab is 7, .* 320"):
        find(local(tiny_folder, layers=3, vocab=7, heads=4))
    with pytest.raises(ConfigError, match=r"model.max_position is 129"):
        find(local(tiny_folder, max_position=129))
    find(local(tiny_folder, max_position=64))  # a limit, not a contradiction


def test_a_shape_without_weights_is_refused() -> None:
    shape = ModelConfig(name="toy", source="none", **SHAPE)
    for ask in (find, describe):
        with pytest.raises(ConfigError, match="has no weights"):
            ask(shape)

"""config.json in one spelling: defaults, rope in its three forms, and what is refused by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from transformers import LlamaConfig

from servelab.plugins.executors.checkpoint.architectures import checked, shape
from servelab.plugins.executors.checkpoint.errors import ModelError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
ROPES = [
    {},
    {"rope_theta": 500000.0},
    {"rope_theta": 500000.0, "rope_scaling": None},
    {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}},
    {"rope_scaling": {"type": "yarn", **YARN}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "beta_fast": 16,
            "attention_factor": 1.5,
            **YARN,
        }
    },
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
]


@pytest.mark.parametrize("fields", ROPES)
def test_rope_is_what_transformers_makes_of_it(fields: dict[str, Any]) -> None:
    theirs = dict(LlamaConfig(**BASE, **deepcopy(fields)).rope_parameters)  # it writes into what it is given
    ours = checked({**BASE, **fields}, "config.json")["rope"]
    assert ours.pop("type") == theirs.pop("rope_type")
    assert ours.pop("theta") == theirs.pop("rope_theta")
    theirs.pop("type", None)
    if "original_max_position" in ours:
        assert ours.pop("original_max_position") == theirs.pop("original_max_position_embeddings")
    for key, default in {"beta_fast": 32, "beta_slow": 1}.items():
        if key in ours:
            assert ours.pop(key) == theirs.pop(key, default)
    assert ours == theirs


def test_defaults_are_those_of_transformers() -> None:
    config, theirs = checked(BASE, "config.json"), LlamaConfig(**BASE)
    for key in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ):
        assert config[key] == getattr(theirs, key), key
    short = {key: value for key, value in BASE.items() if key != "max_position_embeddings"}
    expected = LlamaConfig(**short).max_position_embeddings
    assert checked(short, "config.json")["max_position_embeddings"] == expected


def test_shape_reads_every_field_from_its_own() -> None:
    config = checked({**BASE, "num_key_value_heads": 2, "head_dim": 32}, "config.json")
    assert shape(config) == {
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "ffn": 96,
        "vocab": 320,
        "max_position": 4096,
    }


def test_biases_are_kept_for_the_decoder() -> None:
    config = checked({**BASE, "attention_bias": True, "mlp_bias": True}, "config.json")
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            r"MambaForCausalLM is not supported(.|\n)*LlamaForCausalLM",
        ),
        ({"architectures": ["LlamaModel"]}, "LlamaModel is not supported"),
        ({"architectures": None}, "model_type 'llama' is not supported"),
        ({"hidden_act": "gelu"}, "'gelu'; supported: silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized \\(gptq\\)"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "differ between layers"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of the rope parameters is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "-1.0; a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"hidden_size": 66}, "66 is no multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "do(es)? not divide"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; true or false"),
        ({"mlp_bias": 0}, "mlp_bias is 0; true or false"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; true or false"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads is 2.0; a positive integer"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type \\['yarn'\\] is not supported"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "x"}}, "beta_fast of .* is 'x'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_slow": False}}, "beta_slow of .* is False"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": "1"}},
            "attention_factor of .* is '1'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": [1]}}, "mscale of .* is \\[1\\]"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale_all_dim": "1"}}, "mscale_all_dim of .* is '1'"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}},
            "truncate of .* is 'no'; true or false",
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": "x"}},
            "position of .* is 'x'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor of .* is nan"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        checked({**BASE, **fields}, "config.json")
    assert caught.value.where == "config.json"
    assert caught.value.do

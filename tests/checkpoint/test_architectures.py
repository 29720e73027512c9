"""config.json in one spelling: defaults, rope in its three forms, and what is refused by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tests.checkpoint import family_table
from transformers import LlamaConfig

from servelab.plugins.executors.checkpoint.architectures import ARCHITECTURES, checked, of_gguf, shape
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
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
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


# ------------------------------------------------------------------ families


def config_of(name: str, **fields: Any) -> dict[str, Any]:
    """A config.json of the family that states as little as it can."""
    model_type = ARCHITECTURES[name].model_type
    least = {k: v for k, v in BASE.items() if k != "max_position_embeddings"}
    least |= {
        "hidden_size": 512,
        "num_attention_heads": 32,
    }  # as many as the defaults of key-value heads divide
    return {**least, "architectures": [name], "model_type": model_type, **fields}


def theirs(name: str, **fields: Any) -> Any:
    import transformers

    text = "Text" if name.startswith("Gemma3") else ""
    return getattr(transformers, f"{name.removesuffix('ForCausalLM')}{text}Config")(
        **{k: v for k, v in config_of(name, **fields).items() if k not in ("architectures", "model_type")}
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fields_left_out_are_what_transformers_takes(name: str) -> None:
    ours, config = checked(config_of(name), "config.json"), theirs(name)
    for key in (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        ARCHITECTURES[name].activation[0],
    ):
        assert ours[key] == getattr(config, key), key
    assert ours["head_dim"] == (getattr(config, "head_dim", None) or 16)
    assert config.model_type == ARCHITECTURES[name].model_type
    if name.startswith("Gemma3"):
        assert ours["query_scalar"] == config.query_pre_attn_scalar
        both = [
            config.rope_parameters[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")
        ]
        assert [ours["rope"]["theta"], ours["local_rope"]["theta"]] == both
    else:
        assert ours["rope"]["theta"] == config.rope_parameters["rope_theta"]
        assert ours["local_rope"] is None
    if ARCHITECTURES[name].experts:
        assert ours["experts"] == config.num_local_experts
        assert ours["experts_per_token"] == config.num_experts_per_tok
        assert ours["norm_topk_prob"] == getattr(config, "norm_topk_prob", True)
        assert ours["expert_ffn"] == getattr(config, "moe_intermediate_size", config.intermediate_size)


SLIDES = {"sliding_window": 5, "num_hidden_layers": 7}
KINDS = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
WINDOWS: list[tuple[str, dict[str, Any], tuple[int | None, ...]]] = [
    ("LlamaForCausalLM", SLIDES, ()),
    ("MistralForCausalLM", SLIDES, (5,) * 7),
    ("MistralForCausalLM", {}, (4096,) * 2),
    ("MistralForCausalLM", {"sliding_window": None}, ()),
    ("Qwen2ForCausalLM", SLIDES, ()),
    ("Qwen2ForCausalLM", {**SLIDES, "use_sliding_window": True}, ()),
    (
        "Qwen2ForCausalLM",
        {**SLIDES, "use_sliding_window": True, "max_window_layers": 5},
        (None,) * 5 + (5, 5),
    ),
    ("Qwen2ForCausalLM", {**SLIDES, "use_sliding_window": True, "sliding_window": None}, ()),
    (
        "Qwen3ForCausalLM",
        {**SLIDES, "use_sliding_window": True, "max_window_layers": 0, "layer_types": KINDS},
        (None, 5, None, 5, None, 5, None),
    ),
    ("Qwen3ForCausalLM", {**SLIDES, "layer_types": ["full_attention"] * 7}, ()),
    ("Gemma3ForCausalLM", SLIDES, (5, 5, 5, 5, 5, None, 5)),
    ("Gemma3ForCausalLM", {**SLIDES, "sliding_window_pattern": 3}, (5, 5, None, 5, 5, None, 5)),
    ("Gemma3ForCausalLM", {**SLIDES, "layer_types": KINDS}, (None, 5, None, 5, None, 5, None)),
    ("MixtralForCausalLM", SLIDES, (5,) * 7),
    ("MixtralForCausalLM", {}, ()),
    ("Qwen3MoeForCausalLM", SLIDES, ()),
    ("Qwen3MoeForCausalLM", {**SLIDES, "use_sliding_window": True}, (5,) * 7),
]


@pytest.mark.parametrize(("name", "fields", "expected"), WINDOWS)
def test_windows_are_in_the_layers_that_have_them(
    name: str, fields: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    config = checked(config_of(name, **fields), "config.json")
    assert config["windows"] == expected
    assert shape(config).get("windows", ()) == expected
    kinds = getattr(theirs(name, **deepcopy(fields)), "layer_types", None)
    if kinds is not None:
        assert [kind == "sliding_attention" for kind in kinds] == [
            w is not None for w in expected or [None] * len(kinds)
        ]


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2, 4)),
    ],
)
def test_layers_without_experts(fields: dict[str, Any], dense: tuple[int, ...]) -> None:
    fields = {"num_hidden_layers": 5, "moe_intermediate_size": 40, "num_experts": 16, **fields}
    config = checked(config_of("Qwen3MoeForCausalLM", **fields), "config.json")
    expected = {"experts": 16, "experts_per_token": 8, "ffn": 40}
    expected |= {"dense_layers": dense, "dense_ffn": 96} if dense else {}
    assert shape(config).items() >= expected.items()
    assert ("dense_layers" in shape(config)) == bool(dense)


def test_old_gemma_files_state_their_rope_otherwise() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = checked(
        config_of("Gemma3ForCausalLM", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling), "c"
    )
    by_kind = {
        "full_attention": {**scaling, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    new = checked(config_of("Gemma3ForCausalLM", rope_parameters=by_kind), "c")
    assert old["rope"] == new["rope"] == {"type": "linear", "theta": 5e5, "factor": 8.0}
    assert old["local_rope"] == new["local_rope"] == {"type": "default", "theta": 2e4}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, "layer_types is .* must be null"),
        ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window is 0"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "but sliding_window is None"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ("Qwen3ForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'; supported"),
        ("Qwen3ForCausalLM", {"layer_types": 3}, "layer_types is 3; a list"),
        ("Qwen2ForCausalLM", {"max_window_layers": "all"}, "max_window_layers is 'all'"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": -1}, "sliding_window_pattern is -1"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("Gemma3ForCausalLM", {"hidden_activation": "silu"}, "'silu'; supported: gelu_pytorch_tanh"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_type": "default"}}, "not by kind of layer"),
        ("MixtralForCausalLM", {"num_local_experts": 0}, "num_experts is 0"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, there are 8 experts"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    ],
)
def test_what_a_family_does_not_have_is_named(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        checked(config_of(name, **fields), "config.json")
    assert caught.value.where == "config.json" and caught.value.do


def test_fields_of_other_families_are_not_followed() -> None:
    """What config.json happens to hold beside its family's fields changes nothing."""
    plain = checked(BASE, "config.json")
    stray = {"qk_norm": True, "norm_offset": 1.0, "experts": 4, "query_scalar": 3, "query_pre_attn_scalar": 3}
    found = checked({**BASE, **stray, "windows": [1], "activation": "relu", "local_rope": 1}, "config.json")
    assert {key: found[key] for key in plain} == plain


def test_the_nearest_family_and_all_are_named() -> None:
    with pytest.raises(ModelError) as caught:
        checked({**BASE, "architectures": ["Qwen2MoeForCausalLM"]}, "config.json")
    assert "did you mean 'Qwen" in caught.value.why
    assert all(name in caught.value.why for name in ARCHITECTURES)
    assert "model_families.md" in caught.value.do
    with pytest.raises(ModelError, match=r"'gemma3' is not supported as GGUF") as caught:
        of_gguf("gemma3", "m.gguf")
    assert "Gemma3ForCausalLM is read from there" in caught.value.do
    assert "llama, qwen2, qwen3" in caught.value.why


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    page = family_table.PAGE.read_text(encoding="utf-8")
    assert family_table.render(page) == page, "run: python tests/checkpoint/family_table.py --write"

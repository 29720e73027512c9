"""The catalog of models: shapes whose parameters add up to the published totals."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from servelab.core.config import DTYPE_BYTES, ModelConfig
from servelab.core.facts import ModelFacts
from servelab.core.sites import linear_sites, parameters, weight_bytes

FOLDER = Path(__file__).parents[2] / "configs" / "model"

TOTALS = {
    # exact, as the hub counts the checkpoints, and transformers its own classes of these shapes; biases and
    # norms of queries and keys included
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "smollm2_135m": 134_515_008,
    # as transformers counts them; 671, 13 and 66 billion as published
    "deepseek_v3_like": 671_026_404_352,
    "opt_13b": 12_853_473_280,
    "opt_66b": 65_719_701_504,
}
ACTIVE = {"mixtral_8x7b": 12.9e9, "qwen3_30b_a3b": 3.3e9, "deepseek_v3_like": 37e9}
"""Published, rounded, parameters one token runs through."""
KV_KIB = {
    "llama2_7b": 512,
    "llama2_13b": 800,
    "llama2_70b": 320,
    "llama3_8b": 128,
    "llama3_70b": 320,
    "llama3_405b": 504,
    "mistral_7b": 128,
    "qwen2_5_7b": 56,
    "qwen3_32b": 256,
    "qwen3_30b_a3b": 96,
    "mixtral_8x7b": 128,
    "opt_13b": 800,
    "deepseek_v3_like": 68.625,
}
"""16-bit KV per token: 2 * layers * kv_heads * head_dim * 2 bytes; 61 * (512 + 64) * 2 for the latent."""
NOT_MODELS = {"toy", "hub", "local", "reference_5m"}


def config(name: str) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def facts(name: str) -> ModelFacts:
    one = config(name)
    shape = one.model_dump(include={f.name for f in fields(ModelFacts)}, exclude_none=True)
    return ModelFacts(**shape, dtype_bytes=DTYPE_BYTES[one.dtype])


CATALOG = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NOT_MODELS)


def test_every_model_has_a_published_total() -> None:
    assert sorted(TOTALS) == CATALOG


@pytest.mark.parametrize("name", CATALOG)
def test_parameters_are_the_published_total(name: str) -> None:
    ours = parameters(facts(name))
    left_out = 1e-3 if name.startswith("opt_") else 1e-4  # learned positions and biases; biases
    assert ours == pytest.approx(TOTALS[name], rel=left_out)
    assert weight_bytes(facts(name), None) == pytest.approx(ours * facts(name).dtype_bytes)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_the_published_ones(name: str) -> None:
    assert parameters(facts(name), active=True) == pytest.approx(ACTIVE[name], rel=0.02)


@pytest.mark.parametrize("name", ["llama2_7b", "opt_13b"])
def test_every_parameter_of_a_dense_model_is_active(name: str) -> None:
    assert parameters(facts(name), active=True) == parameters(facts(name))


@pytest.mark.parametrize("name", KV_KIB)
def test_kv_per_token(name: str) -> None:
    model = facts(name)
    assert model.kv_bytes_per_token_layer * model.layers / 1024 == KV_KIB[name]


@pytest.mark.parametrize("name", CATALOG)
def test_the_file_says_what_it_is_and_where_from(name: str) -> None:
    one = config(name)
    assert one.name == name
    assert one.source != "none" or (one.origin or "").startswith("config.json of ")
    assert one.heads and one.kv_heads and one.heads % one.kv_heads == 0


@pytest.mark.parametrize(
    ("name", "billions"), [("llama2_7b", 6.476), ("llama2_13b", 12.69), ("llama2_70b", 68.45)]
)
def test_linears_of_the_layers(name: str, billions: float) -> None:
    linears = sum(site.n * site.k for site in linear_sites(facts(name)) if site.role != "head")
    assert linears / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("name", CATALOG)
def test_the_last_linear_is_the_head(name: str) -> None:
    model = facts(name)
    *_, head = linear_sites(replace(model, layers=1, dense_layers=()))
    assert (head.role, head.n, head.k) == ("head", model.vocab, model.hidden)


def test_latent_attention_by_hand() -> None:
    """DeepSeek-V3, one layer: 187.1 million in five matrices; three experts' matrices, one expert shared."""
    model = facts("deepseek_v3_like")
    sites = [site for site in linear_sites(model) if site.layer == 3]
    attention = {site.name.rsplit(".", 1)[1]: (site.n, site.k) for site in sites if "self_attn" in site.name}
    assert attention == {
        "q_a_proj": (1536, 7168),
        "q_b_proj": (128 * 192, 1536),
        "kv_a_proj_with_mqa": (576, 7168),
        "kv_b_proj": (128 * (128 + 128), 512),
        "o_proj": (7168, 128 * 128),
    }
    shared = [site for site in sites if "shared_experts" in site.name]
    assert [(site.role, site.n, site.k) for site in shared] == [
        ("gate", 2048, 7168),
        ("up", 2048, 7168),
        ("down", 7168, 2048),
    ]
    assert sum(site.role == "expert_down" for site in sites) == 256
    dense = [site for site in linear_sites(model) if site.layer == 2 and "mlp" in site.name]
    assert [(site.n, site.k) for site in dense] == [(18432, 7168), (18432, 7168), (7168, 18432)]


def test_a_network_without_a_gate_has_two_matrices() -> None:
    sites = [site for site in linear_sites(facts("opt_13b")) if site.layer == 0 and ".mlp." in site.name]
    assert [(site.role, site.n, site.k) for site in sites] == [("up", 20480, 5120), ("down", 5120, 20480)]
    assert all(name != "gate" for site in sites for name in site.shares_input)

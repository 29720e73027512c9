"""Every model family against transformers: logits through chunks, pages and windows; tensors; linears."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.torch.family_errors import measured
from tests.torch.models import FAMILIES, decoder, exact, facts, family, normalised
from tests.torch.quantizers import Plain
from tests.torch.sessions import Session, answer, apart, ids_of
from torch import Tensor

from servelab.core.config import ModelConfig
from servelab.core.errors import ConfigError
from servelab.core.sites import linear_bytes, linear_sites
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import describe, find
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.linear import DenseLinear, PackedLinear, packs
from servelab.plugins.executors.torch.mlp import ACTIVATIONS, GatedMlp
from servelab.plugins.executors.torch.moe import Experts
from servelab.plugins.executors.torch.quantize import quantize
from servelab.plugins.executors.torch.shape import DecoderConfig
from servelab.plugins.executors.torch.weights import tensors

WINDOWED = [name for name, (_, settings) in FAMILIES.items() if settings.get("sliding_window")]
MIXED = [name for name, (prefix, _) in FAMILIES.items() if prefix in ("Mixtral", "Qwen3Moe")]


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    """A prompt in chunks, then one token at a time, over pages of 4."""
    assert measured(name, dtype).relative < (1e-9 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_is_shorter_than_the_prompt_and_matters(name: str) -> None:
    _, d = exact(family(name))
    ids = ids_of(40)
    model = facts(d)
    assert any(model.windows) and len(model.windows) == d.config.layers
    windowed = Session(d).logits((0, ids))[0]
    unlimited = decoder_with(d, windows=(None,) * d.config.layers)
    first = min(window for window in model.windows if window)
    full = Session(unlimited).logits((0, ids))[0]
    assert apart(windowed[:first], full[:first]) < 1e-12
    assert apart(windowed[first:], full[first:]) > 1e-3


def decoder_with(d: Decoder, **changes: Any) -> Decoder:
    """The same weights and angles under another configuration."""
    from copy import copy
    from dataclasses import replace

    other = copy(d)
    other.config = replace(d.config, **changes)
    return other


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_and_company_change_nothing(name: str) -> None:
    _, d = exact(family(name))
    ids = {0: ids_of(33), 1: ids_of(33, 1), 2: ids_of(33, 2)}
    alone = {r: Session(d).logits((r, i))[0] for r, i in ids.items()}
    session = Session(d)
    for first, end in ((0, 14), (14, 15), (15, 30), (30, 31), (31, 33)):
        chunks = [(r, i[first:end]) for r, i in ids.items()]
        for (r, _), got in zip(chunks, session.logits(*chunks), strict=True):
            assert apart(got, alone[r][first:end]) < 1e-12


DENSE = [name for name in FAMILIES if name not in MIXED]


@pytest.mark.parametrize("name", DENSE)
def test_bfloat16_is_as_near_to_the_wide_model_as_transformers_is(name: str) -> None:
    model = family(name)
    ids = ids_of(40)
    wide = answer(model, ids)
    model = model.bfloat16()
    (got,) = Session(decoder(model, torch.bfloat16)).logits((0, ids))
    theirs = answer(model, ids)
    assert got.dtype == torch.bfloat16
    assert (got - wide).square().mean() < 1.5 * (theirs - wide).square().mean()


@pytest.mark.parametrize("name", MIXED)
def test_bfloat16_experts_are_those_of_transformers_but_for_roundings(name: str) -> None:
    """Layer by layer: a router that sees another rounding may choose other experts, and so on from there."""
    model = family(name).bfloat16()
    d = decoder(model, torch.bfloat16)
    torch.manual_seed(0)
    x = torch.randn(1, 50, d.config.hidden).bfloat16()
    for ours, layer in zip(d.layers, model.model.layers, strict=True):
        with torch.no_grad():
            theirs = layer.mlp(x)[0]
        assert (ours.mlp(x[0]) - theirs).abs().max() < 2**-6 * theirs.abs().max()


def test_embeddings_are_scaled_with_the_models_own_rounding() -> None:
    model = family("gemma3").bfloat16()
    d = decoder(model, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(d.embed(ids_of(20)), model.model.embed_tokens(ids_of(20)))
    assert not torch.equal(d.embed(ids_of(20)), d.embedding[ids_of(20)] * 48**0.5)


def test_norms_with_an_offset_are_kept_wide() -> None:
    """1 + weight in bfloat16 would lose most of a small weight."""
    model = family("gemma3").bfloat16()
    d = decoder(model, torch.bfloat16)
    assert torch.equal(d.norm, 1 + model.model.norm.weight.float())
    x = torch.randn(9, 48).bfloat16()
    with torch.no_grad():
        theirs = model.model.norm(x)
    assert ((d._norm(x, d.norm) - theirs).abs() <= 2**-8 * theirs.abs()).all()
    plain = decoder(family("qwen3").bfloat16(), torch.bfloat16)
    assert plain.norm.dtype == torch.bfloat16


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    model = family(name)
    model.save_pretrained(tmp_path)
    section = ModelConfig(name="t", source="path", path=str(tmp_path))
    checkpoint = find(section.model_copy(update=describe(section)))
    shape = DecoderConfig.of(checkpoint.config)
    assert shape == DecoderConfig.of(normalised(model))
    saved, ours = Decoder(shape, torch.float32, tensors(checkpoint)), decoder(model, torch.float32)
    assert torch.equal(Session(saved).logits((0, ids_of(20)))[0], Session(ours).logits((0, ids_of(20)))[0])
    model_facts = facts(saved)
    for field, value in describe(section).items():
        assert getattr(model_facts, field) == value, field


def test_a_shape_in_part_is_completed_and_one_in_whole_must_state_windows_too(tmp_path: Path) -> None:
    family("mixtral, window").save_pretrained(tmp_path)
    section = ModelConfig(name="t", source="path", path=str(tmp_path))
    whole = describe(section)
    assert whole["windows"] == (9, 9, 9) and (whole["experts"], whole["experts_per_token"]) == (8, 1)
    part = section.model_copy(update={"layers": 3, "windows": (9, 9, 9)})
    assert describe(part) == {k: v for k, v in whole.items() if k not in ("layers", "windows")}
    find(section)
    find(section.model_copy(update=whole))
    kinds = ("windows", "experts", "experts_per_token")
    with pytest.raises(
        ConfigError, match=r"model.windows is \(\), the files say \(9, 9, 9\); model.experts is 0"
    ):
        find(section.model_copy(update={k: v for k, v in whole.items() if k not in kinds}))
    with pytest.raises(ConfigError, match=r"model.experts is 4, the files say 8"):
        find(section.model_copy(update={**whole, "experts": 4}))


def fused(model: Any) -> dict[str, Tensor]:
    """Tensors of all experts in one, as transformers 5 holds them."""
    return dict(model.state_dict())


def one_by_one(model: Any) -> dict[str, Tensor]:
    """Each expert's tensors, as checkpoints on the hub name them."""
    mixtral = type(model).__name__ == "MixtralForCausalLM"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        where = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        experts, _, part = where.rpartition(".")
        for e, one in enumerate(tensor if part in ("gate_up_proj", "down_proj") else ()):
            if part == "down_proj":
                found[f"{experts}.{e}.{down}.weight"] = one
            else:
                found[f"{experts}.{e}.{gate}.weight"], found[f"{experts}.{e}.{up}.weight"] = one.chunk(2)
        if part not in ("gate_up_proj", "down_proj"):
            found[where] = tensor
    return found


def load(model: Any, state: dict[str, Tensor]) -> Decoder:
    return Decoder(DecoderConfig.of(normalised(model)), torch.float32, state.items())


@pytest.mark.parametrize("name", MIXED)
def test_experts_are_read_in_either_layout(name: str) -> None:
    model = family(name)
    a, b = (Session(load(model, form(model))).logits((0, ids_of(20)))[0] for form in (fused, one_by_one))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("form", [fused, one_by_one], ids=["fused", "one by one"])
def test_every_missing_or_misshapen_tensor_is_named(name: str, form: Any) -> None:
    model = family(name)
    state = form(model)
    for key in state:
        rest = {k: t for k, t in state.items() if k != key}
        with pytest.raises(
            ModelError, match=r"tensors are missing[\s\S]*not found: model|not found: lm_head"
        ):
            load(model, rest)
        for wrong in (state[key][:-1], state[key].repeat_interleave(2, -1)):
            with pytest.raises(ModelError, match="it must be"):
                load(model, {**state, key: wrong})
    with pytest.raises(ModelError, match=r"not found: model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight"):
        key = next(
            k for k in one_by_one(model) if ".1." in k and ".experts.4." in k and k.split(".")[-2] in UP
        )
        load(model, {k: t for k, t in one_by_one(model).items() if k != key})
    extra = {**state, "model.layers.1.mlp.experts.9.up_proj.weight": torch.zeros(80, 48)}
    with pytest.raises(ModelError, match=r"experts\.9\.up_proj\.weight'.*no place for"):
        load(model, extra)


UP = ("up_proj", "w3")


@pytest.mark.parametrize("name", DENSE)
def test_every_missing_tensor_of_a_dense_family_is_named(name: str) -> None:
    model = family(name)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key in state:
        with pytest.raises(ModelError, match=f"^1 tensors are missing[\\s\\S]*not found: {key}"):
            load(model, {k: t for k, t in state.items() if k != key})
        with pytest.raises(ModelError, match=f"'{key}' is"):
            load(model, {**state, key: state[key][:-1]})


# ------------------------------------------------------------------ layers that turn by other angles


def test_parts_of_attention_add_up_in_layers_of_either_kind() -> None:
    _, d = exact(family("gemma3"))
    session = Session(d)
    x, plan = session.embed((0, ids_of(30)))
    d.run(x, session.attention, plan)
    for layer, q in list(session.attention.queries):  # running adds to them
        o, lse = session.attention.run(layer, q, plan)
        one = session.attention.partial(layer, q, plan, [0])
        nothing = session.attention.partial(layer, q, plan, [])
        assert torch.allclose(session.attention.merge([one, nothing])[0], o, rtol=0, atol=1e-12)
        assert torch.allclose(one[1], lse, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ experts


def experts(loads: tuple[int, ...], per_token: int = 1) -> tuple[Experts, Tensor]:
    """Experts and tokens such that each expert is the first choice of as many tokens as said."""
    torch.manual_seed(0)
    count, hidden = len(loads), 12

    def linear(n: int, k: int) -> DenseLinear:
        return DenseLinear(torch.randn(n, k, dtype=torch.float64))

    parts = [GatedMlp(linear(20, hidden), linear(hidden, 10), ACTIVATIONS["silu"]) for _ in loads]
    router = 30 * torch.eye(count, hidden, dtype=torch.float64)
    x = torch.rand(sum(loads), hidden, dtype=torch.float64) / 4
    for token, expert in enumerate(e for e, n in enumerate(loads) for _ in range(n)):
        x[token, expert] += 1
    return Experts(router, parts, per_token, norm_topk=True), x[torch.randperm(len(x))]


@pytest.mark.parametrize("loads", [(7, 0, 1, 3), (0, 0, 0, 5), (1, 1, 1, 1), (1, 0, 0, 0)])
@pytest.mark.parametrize("per_token", [1, 2, 4])
@pytest.mark.parametrize("norm_topk", [True, False])
def test_uneven_experts_equal_the_formula(loads: tuple[int, ...], per_token: int, norm_topk: bool) -> None:
    layer, x = experts(loads, per_token)
    layer.norm_topk = norm_topk
    _, chosen = layer.route(x)
    assert tuple(chosen[:, 0].bincount(minlength=4).tolist()) == loads
    probabilities = (x @ layer.router.T).softmax(-1)
    expected = torch.zeros_like(x)
    for token, row in enumerate(x):
        best = probabilities[token].argsort(descending=True)[:per_token]
        total = probabilities[token, best].sum() if norm_topk else 1.0
        for e in best.tolist():
            expected[token] += probabilities[token, e] / total * layer.parts[e](row[None])[0]
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def test_an_expert_runs_once_and_only_if_it_has_tokens() -> None:
    layer, x = experts((4, 0, 2, 1))
    seen: list[tuple[int, int]] = []
    for e, part in enumerate(layer.parts):
        op = part.down

        class Counted(DenseLinear):
            def apply(self, prepared: Tensor, e: int = e) -> Tensor:
                seen.append((e, len(prepared)))
                return super().apply(prepared)

        assert isinstance(op, DenseLinear)
        part.down = Counted(op.weight)
    layer(x)
    assert seen == [(0, 4), (2, 2), (3, 1)]


# ------------------------------------------------------------------ linears


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_are_the_linears_of_the_checkpoint(name: str) -> None:
    model = family(name)
    linears = {k: t for k, t in one_by_one(model).items() if re.search(r"(_proj|\.w[123])\.weight$", k)}
    sites = [site for site in linear_sites(facts(decoder(model, torch.float32))) if site.role != "head"]
    shapes = sorted((site.layer, site.n, site.k) for site in sites)
    assert shapes == sorted((int(k.split(".")[2]), *t.shape) for k, t in linears.items())
    if not any(".w1." in key for key in linears):
        assert {f"{site.name}.weight" for site in sites} == set(linears)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("left_out", [(), ("k", "up", "expert_up"), ("v", "gate", "expert_gate")])
def test_packed_weights_kept_as_they_are_change_nothing(name: str, left_out: tuple[str, ...]) -> None:
    model = family(name)
    plain, d = decoder(model, torch.float64), decoder(model, torch.float64)
    with torch.inference_mode():
        memory = quantize(d, Plain(left_out=left_out), facts(d))
    ids = ids_of(20)
    assert apart(Session(d).logits((0, ids))[0], Session(plain).logits((0, ids))[0]) < 1e-12
    head = 0 if d.config.tied else d.embedding.nbytes
    assert memory["dense_bytes"] == memory["packed_bytes"] == linear_bytes(facts(d), None) + head
    quantized = sum(type(getattr(holder, name)) is not DenseLinear for holder, name in d.linears())
    assert quantized == sum(1 for _ in d.linears()) - 1  # every linear but the head


@pytest.mark.parametrize("name", [*MIXED, "gemma3", "qwen2"])
def test_each_linear_gets_its_own_weight(name: str) -> None:
    """Every third weight halved in the packed model, and in the checkpoint, are the same model."""
    model = family(name)
    d = decoder(model, torch.float64)
    chosen = {site.name for site in list(linear_sites(facts(d)))[:-1:3]}

    class Halves(Plain):
        def pack(self, site: Any, weight: Tensor, bias: Any, state: Any) -> Any:
            self.edit = (lambda w: w / 2) if site.name in chosen else torch.clone
            return super().pack(site, weight, bias, state)

    with torch.inference_mode():
        quantize(d, Halves(), facts(d))
    state = {}
    for key, tensor in one_by_one(model).items():
        site = key.removesuffix(".weight").replace("block_sparse_moe", "mlp")
        for short, long in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            site = site.replace(f".{short}", f".{long}")
        state[key] = tensor / 2 if site in chosen and key.endswith("weight") else tensor
    other = Decoder(DecoderConfig.of(normalised(model)), torch.float64, state.items())
    ids = ids_of(20)
    assert apart(Session(d).logits((0, ids))[0], Session(other).logits((0, ids))[0]) < 1e-12


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not packs(torch.bfloat16), reason="oneDNN has no bfloat16 matrix kernels here")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_packing_for_the_processor_leaves_logits_as_they_are(name: str) -> None:
    d = decoder(family(name), torch.bfloat16)
    ids = ids_of(20)
    before = Session(d).logits((0, ids))[0]
    d.pack()
    assert all(type(getattr(holder, name)) is PackedLinear for holder, name in d.linears())
    assert torch.equal(Session(d).logits((0, ids))[0], before)

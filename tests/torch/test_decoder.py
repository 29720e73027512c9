"""The decoder against transformers, in any chunks, batches and ranges of layers; and its linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.torch import models
from tests.torch.models import ROPES, decoder, llama, normalised
from tests.torch.sessions import LENGTH, Session, answer, apart, ids_of
from torch import Tensor

from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.linear import DenseLinear, PackedLinear, packs
from servelab.plugins.executors.torch.mlp import GatedMlp
from servelab.plugins.executors.torch.shape import DecoderConfig

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"rope-{kind}": {"kind": kind} for kind in ROPES},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "group-of-one": {"num_key_value_heads": 6},
    "group-of-two": {"num_key_value_heads": 3},
    "group-of-six": {"num_key_value_heads": 1},
    "heads-wider-than-hidden": {"head_dim": 14},
    "heads-narrower-than-hidden": {"head_dim": 4, "attention_bias": True},
    "eps": {"rms_norm_eps": 0.3},
    "one-layer": {"num_hidden_layers": 1},
}


def exact(**changes: Any) -> tuple[Any, Decoder]:
    return models.exact(llama(**changes))


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_are_those_of_transformers(name: str) -> None:
    model = llama(**VARIANTS[name])
    ids = ids_of(LENGTH)
    expected = answer(model, ids)
    (got,) = Session(decoder(model, torch.float32)).logits((0, ids))
    assert got.dtype == torch.float32 and expected.std() > 0.5
    assert apart(got, expected) < 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", VARIANTS)
def test_float64_logits_are_those_of_transformers(name: str) -> None:
    model, d = exact(**VARIANTS[name])
    ids = ids_of(LENGTH)
    expected = answer(model, ids)
    session = Session(d)
    (got,) = session.logits((0, ids[:-1]))
    (last,) = session.logits((0, ids[-1:]))
    assert got.dtype == torch.float64
    assert apart(torch.cat((got, last)), expected) < 1e-9


def test_bfloat16_logits_are_near_those_of_transformers() -> None:
    model = llama()
    wide = answer(model, ids_of(LENGTH))
    model = model.bfloat16()
    (got,) = Session(decoder(model, torch.bfloat16)).logits((0, ids_of(LENGTH)))
    theirs = answer(model, ids_of(LENGTH))
    assert got.dtype == torch.bfloat16
    # as near to the float32 model as transformers itself
    assert (got - wide).square().mean() < 1.5 * (theirs - wide).square().mean()


# ------------------------------------------------------------------ chunks and batches


@settings(max_examples=10)
@given(
    cuts=st.sets(st.integers(1, 39), max_size=8),
    others=st.lists(st.integers(0, 3), max_size=9),
    page=st.sampled_from([1, 4, 16]),
)
def test_any_chunks_in_any_company_give_the_same_logits(cuts: set[int], others: list[int], page: int) -> None:
    _, d = exact(kind="llama3")
    ids = {0: ids_of(40), 1: ids_of(40, 1), 2: ids_of(40, 2)}
    alone = {r: Session(d, page).logits((r, i))[0] for r, i in ids.items()}
    session, ends = Session(d, page), sorted({*cuts, 40})
    for step, end in enumerate(ends):
        chunks = [(0, ids[0][session.held[0] : end])]
        n = others[step] if step < len(others) else 1
        chunks += [(r, ids[r][session.held[r] :][:n]) for r in (1, 2) if n]
        chunks = chunks[::-1] if step % 2 else chunks
        starts = [session.held[r] for r, _ in chunks]
        for start, (r, chunk), got in zip(starts, chunks, session.logits(*chunks), strict=True):
            assert apart(got, alone[r][start : start + len(chunk)]) < 1e-12


# ------------------------------------------------------------------ layers: ranges, watching, captures


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_ranges_of_layers_are_parts_of_the_whole(dtype: torch.dtype) -> None:
    d = decoder(llama(), dtype)
    (x, plan), session = Session(d).embed((0, ids_of(9))), Session(d)
    whole = d.run(x, session.attention, plan)
    for bounds in ([0, 1, 3], [0, 1, 2, 3], [0, 2, 2, 3]):
        y, other = x, Session(d)
        for first, end in pairwise(bounds):
            y = d.run(y, other.attention, plan, (first, end))
        assert torch.equal(y, whole)
        assert [layer for layer, _ in other.attention.captures] == [0, 1, 2]
    assert torch.equal(d.run(x, session.attention, plan, (1, 1)), x)


def test_the_input_of_each_layer_is_watched_in_order() -> None:
    model, d = exact()
    theirs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: theirs.append(args[0][0]))
    ids = ids_of(12)
    expected = answer(model, ids)
    seen: list[tuple[int, Tensor]] = []
    (got,) = Session(d).logits((0, ids), watch=lambda i, x: seen.append((i, x.clone())))
    assert [i for i, _ in seen] == [0, 1, 2] and apart(got, expected) < 1e-9
    for (_, ours), other in zip(seen, theirs, strict=True):
        assert apart(ours, other) < 1e-9


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_watch_may_replace_the_input_of_a_layer(at: int) -> None:
    d = decoder(llama(), torch.float64)
    plain, watched = Session(d), Session(d)
    x, plan = plain.embed((0, ids_of(12)))
    watched.embed((0, ids_of(12)))
    shift = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)

    def watch(i: int, x: Tensor) -> Tensor | None:
        return x + shift if i == at else None

    y = d.run(x, watched.attention, plan, watch=watch)
    changed = d.run(x, plain.attention, plan, (0, at)) + shift
    assert torch.equal(y, d.run(changed, plain.attention, plan, (at, 3)))
    assert torch.equal(watched.attention.captures[at][1]["x"], changed)
    # a range calls it for its own layers alone, by their numbers
    numbers: list[int] = []
    d.run(x, plain.attention, plan, (1, 3), watch=lambda i, _: numbers.append(i))
    assert numbers == [1, 2]


@pytest.mark.parametrize(
    "name", ["rope-default", "attention-bias", "group-of-six", "heads-wider-than-hidden"]
)
def test_captures_are_keys_before_rotation_values_and_layer_inputs(name: str) -> None:
    model, d = exact(**VARIANTS[name])
    theirs: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "x": []}
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: theirs["x"].append(args[0][0]))
        for part in "qkv":
            getattr(layer.self_attn, f"{part}_proj").register_forward_hook(
                lambda _m, _i, out, part=part: theirs[part].append(out[0])
            )
    ids = ids_of(12)
    answer(model, ids)
    session = Session(d)
    session.logits((0, ids))
    c = d.config
    for i, (layer, captures) in enumerate(session.attention.captures):
        assert layer == i and set(captures) == {"k", "v", "x"}
        assert captures["k"].shape == captures["v"].shape == (12, c.kv_heads, c.head_dim)
        for part, ours in [*captures.items(), ("q", session.attention.queries[i][1])]:
            assert apart(ours.flatten(1), theirs[part][i]) < 1e-9, (i, part)
    assert [layer for layer, _ in session.attention.queries] == [0, 1, 2]


# ------------------------------------------------------------------ linears

packing = pytest.mark.skipif(
    not packs(torch.bfloat16), reason="oneDNN has no bfloat16 matrix kernels on this processor"
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are not divided among threads, which oneDNN may do for one form of the weights only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forms(n: int, k: int, biased: bool) -> tuple[DenseLinear, PackedLinear]:
    torch.manual_seed(n)
    weight, bias = torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16() if biased else None
    dense = DenseLinear(weight, bias)
    return dense, PackedLinear(dense)


@packing
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), [(80, 48), (97, 576), (960, 576), (576, 1536)])
def test_packed_linears_give_the_same_bits(n: int, k: int, biased: bool) -> None:
    dense, packed = forms(n, k, biased)
    for tokens in range(1, 65):
        x = torch.randn(tokens, k).bfloat16()
        assert torch.equal(packed.apply(packed.prepare(x)), dense.apply(dense.prepare(x))), tokens


@packing
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("n", "k"), [(96, 576), (960, 576), (576, 1536)])
def test_packed_linears_differ_by_roundings_at_most_on_any_number_of_threads(
    n: int, k: int, biased: bool
) -> None:
    dense, packed = forms(n, k, biased)
    for tokens in (*range(1, 65, 3), 512, 777):
        x = torch.randn(tokens, k).bfloat16()
        a, b = packed.apply(packed.prepare(x)), dense.apply(dense.prepare(x))
        assert torch.equal(a, packed.apply(packed.prepare(x)))
        assert (a != b).sum() <= max(2, 1e-3 * a.numel())
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2e-3)


@packing
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["rope-default", "tied", "biases-tied"])
def test_packing_leaves_logits_as_they_are(name: str) -> None:
    model = llama(**VARIANTS[name])
    d = decoder(model, torch.bfloat16)
    sessions = [Session(d), Session(d)]
    chunks = [ids_of(33), ids_of(1, 1), ids_of(4, 2)]
    before = [sessions[0].logits((0, ids), (1, ids[:1])) for ids in chunks]
    d.pack()
    assert all(type(getattr(holder, name)) is PackedLinear for holder, name in d.linears())
    after = [sessions[1].logits((0, ids), (1, ids[:1])) for ids in chunks]
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    d.pack()  # nothing is left to pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_bfloat16_is_packed(dtype: torch.dtype) -> None:
    assert packs(dtype) is False


def test_linears_may_be_exchanged() -> None:
    """A layer's linear, doubled, is as a checkpoint with doubled weights."""

    class Doubled(DenseLinear):
        def apply(self, prepared: Tensor) -> Tensor:
            return 2 * super().apply(prepared)

    model = llama()
    d = decoder(model, torch.float64)
    mlp = d.layers[1].mlp
    assert isinstance(mlp, GatedMlp) and isinstance(mlp.down, DenseLinear)
    mlp.down = Doubled(mlp.down.weight)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    ids = ids_of(7)
    assert torch.equal(
        Session(d).logits((0, ids))[0], Session(decoder(model, torch.float64)).logits((0, ids))[0]
    )


# ------------------------------------------------------------------ tensors of a checkpoint


def load(model: Any, tensors: Sequence[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(DecoderConfig.of(normalised(model)), dtype, tensors)


def test_tensors_come_in_any_order_and_are_copied() -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = ids_of(7)
    expected = Session(decoder(model, torch.float32)).logits((0, ids))[0]
    d = load(model, list(reversed(state.items())))
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(Session(d).logits((0, ids))[0], expected)


PARTS = {
    **{f"self_attn.{part}_proj": ("weight", "bias") for part in "qkvo"},
    **{f"mlp.{part}_proj": ("weight", "bias") for part in ("gate", "up", "down")},
    **{f"{part}_layernorm": ("weight",) for part in ("input", "post_attention")},
}
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"model.layers.{i}.{part}.{kind}" for i in range(3) for part, kinds in PARTS.items() for kind in kinds
]


@pytest.mark.parametrize(
    ("name", "tied"), [(n, tied) for n in NAMES for tied in (False, True) if not (tied and "head" in n)]
)
def test_every_missing_misshapen_or_repeated_tensor_is_named(name: str, tied: bool) -> None:
    model = llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    state = {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    assert {*state} == {*NAMES} - ({"lm_head.weight"} if tied else set())
    with pytest.raises(ModelError, match=r"^1 tensors are missing[\s\S]*not found: " + name):
        load(model, [item for item in state.items() if item[0] != name])
    with pytest.raises(ModelError, match=f"'{name}'.*no place for"):
        load(model, [*state.items(), (name, state[name])])
    for wrong in (state[name][:-1], state[name][None], state[name].repeat_interleave(2, 0)):
        with pytest.raises(ModelError) as error:
            load(model, [*{**state, name: wrong}.items()])
        assert f"'{name}' is {list(wrong.shape)}" in str(error.value)
        assert f"must be {list(state[name].shape)}" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.embed_tokens.weight.scale",
    ],
)
def test_tensors_of_another_model_are_named(name: str) -> None:
    model = llama()
    with pytest.raises(ModelError, match=f"'{name}'.*no place for"):
        load(model, [*model.state_dict().items(), (name, torch.zeros(48))])


def test_several_missing_tensors_are_counted() -> None:
    model = llama()
    with pytest.raises(ModelError, match=r"^29 tensors are missing[\s\S]*, \.\.\."):
        load(model, [next(iter(model.state_dict().items()))])


def test_what_follows_from_the_rest_is_ignored() -> None:
    model = llama(tie_word_embeddings=True)
    state = dict(model.state_dict())
    ids = ids_of(7)
    expected = Session(decoder(model, torch.float32)).logits((0, ids))[0]
    state["lm_head.weight"] = torch.full((97, 48), torch.nan)
    state["model.rotary_emb.inv_freq"] = torch.full((4,), torch.nan)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), torch.nan)
    assert torch.equal(Session(load(model, [*state.items()])).logits((0, ids))[0], expected)


def test_an_untied_model_needs_its_head() -> None:
    model = llama()
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(model, [*state.items()])


def test_a_configuration_may_leave_out_what_follows() -> None:
    config = normalised(llama())
    for name in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        del config[name]
    c = DecoderConfig.of(config)
    assert (c.kv_heads, c.head_dim) == (6, 8)
    assert not (c.attention_bias or c.mlp_bias or c.tied)

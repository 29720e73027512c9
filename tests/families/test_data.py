"""The small dataclasses that families exchange refuse values that would mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servelab.core.families.app import Graph, Node, Piece, Start
from servelab.core.families.grammar import Vocabulary
from servelab.core.families.kernel import BatchLayout, OpCost
from servelab.core.families.kvquant import KVFormat
from servelab.core.families.prefix import Content, FixupPlan, Provenance, Span
from servelab.core.families.quant import QTensor, ScaleLevel, WeightFormat
from servelab.core.families.router import Dispatch, InstanceRow, Migrate, SetShare, TrafficStats
from servelab.core.families.semantic import Answer, Augment, Miss
from servelab.core.families.spec import Draft, Verified


def layout(**changes: Any) -> BatchLayout:
    """Two rows: one decodes after a shared prefix, one recomputes positions 1 and 3 of four."""
    fields: dict[str, Any] = {
        "q_indptr": [0, 1, 3],
        "q_positions": [9, 1, 3],
        "seg_indptr": [0, 2, 3],
        "seg_tokens": [8, 2, 4],
        "seg_offset": [0, 8, 0],
        "seg_pages": [[[0, 1], [2], [3]]],
        "masks": ["causal", "index"],
    }
    return BatchLayout(**{**fields, **changes})


def node(id: str, *pieces: Piece, **fields: Any) -> Node:
    return Node(id=id, pieces=pieces, **fields)


def reads(variable: str) -> Piece:
    return Piece(kind="input", variable=variable)


def writes(variable: str) -> Piece:
    return Piece(kind="output", variable=variable)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Span(handle=1, start=4, end=4, source_start=4), "empty"),
    (lambda: Span(handle=1, start=-1, end=4, source_start=-1), "negative"),
    (lambda: Span(handle=1, start=8, end=16, source_start=0), "computed at 0 and used at 8 is not exact"),
    (lambda: Span(handle=1, start=0, end=4, source_start=0, needs_fixup=True), "exact span needs no fix-up"),
    (lambda: Content(length=3), "exactly one"),
    (lambda: Content(length=3, ids=[1, 2]), "2 ids for 3 tokens"),
    (lambda: Content(length=3, hashes=[1]), "hash_tokens"),
    (lambda: FixupPlan(check_layers=(1,), keep=(0.15,)), "need a measure"),
    (lambda: FixupPlan(check_layers=(1, 2), measure="k", keep=(0.15,)), "one keep share per check layer"),
    (lambda: FixupPlan(check_layers=(1,), measure="k", keep=(0.2,), threshold_std=2.0), "or threshold_std"),
    (lambda: FixupPlan(check_layers=(1, 2), measure="v", keep=(0.1, 0.2)), "never grow"),
    (lambda: Miss(search_ns=-1, reason="expired"), "search_ns is a cost"),
    (lambda: Answer(entry="e", similarity=1.2, output_tokens=3, search_ns=1, fetch_ns=1), "cosine"),
    (lambda: Augment(entries=("e",), added_tokens=-5, search_ns=1), "added_tokens"),
    (lambda: ScaleLevel(group=0), "at least 1 input"),
    (lambda: ScaleLevel(group=64, zero_bits=4), "zero 'none' with 4 bits"),
    (lambda: ScaleLevel(group=64, zero="int"), "zero 'int' with 0 bits"),
    (lambda: WeightFormat(kind="int", bits=6, slices=(4, 4)), "do not add up"),
    (lambda: WeightFormat(kind="int", bits=0), "0 bits"),
    (lambda: WeightFormat(kind="int", bits=4, act_per="block", high_blocks=1.5), "share"),
    (
        lambda: QTensor(format=WeightFormat(kind="int", bits=6, slices=(4, 2)), shape=(8, 8), codes=(None,)),
        "code",
    ),
    (
        lambda: QTensor(format=WeightFormat(kind="int", bits=4), shape=(8, 8), codes=(0,), scales=(0,)),
        "scale",
    ),
    (lambda: KVFormat(codec="x", key_space="x"), "encoded from 'x'"),
    (lambda: KVFormat(codec="kivi", group_tokens=0), "negative or zero"),
    (lambda: OpCost(flops=-1), "less than nothing"),
    (lambda: layout(seg_indptr=[0, 3]), "2 rows of queries, 1 of segments"),
    (lambda: layout(q_positions=[9, 1]), "3 query tokens have 2 positions"),
    (lambda: layout(seg_pages=[[[0, 1], [2]]]), r"lengths \[2, 3\] for 3 segments"),
    (lambda: layout(seg_instance=[0]), "for 3 segments"),
    (lambda: layout(trees={1: [-1]}), "row 1"),
    (lambda: Draft((1, 2), (-1,)), "1 parents"),
    (lambda: Draft((1, 2), (1, -1)), "parents come before"),
    (lambda: Verified(request_id="r", drafted=3, verified=2, accepted=3), "accepted 3"),
    (lambda: Vocabulary(tokens=[b"a", b"b"], padded_size=1, stop_ids=(0,)), "tokenizer's"),
    (lambda: InstanceRow(id=0, reported_ns=0, free_pages=2, total_pages=1), "2 of 1 pages"),
    (lambda: Dispatch(prefill=0, decode=1, decide_decode_late=True), "decided late"),
    (lambda: Migrate(request="r", source=1, target=1), "to itself"),
    (lambda: SetShare(0, 0.5, 1.5), "0..1"),
    (lambda: TrafficStats(rate_per_s=1.0, lengths={(10, 10): 0.5}), "add up to 0.5"),
    (lambda: Piece(kind="constant", variable="a"), "name a variable"),
    (lambda: Piece(kind="input"), "name a variable"),
    (lambda: node("a", kind="tool"), "tool call with tool None"),
    (lambda: node("a", tool="search"), "model call with tool 'search'"),
    (lambda: Graph(id="g", nodes=(node("a"), node("a"))), "twice"),
    (
        lambda: Graph(id="g", nodes=(node("a", after=("b",)), node("b", after=("a",)))),
        r"cycle through \['a', 'b'\]",
    ),
    (lambda: Graph(id="g", nodes=(node("a", reads("x"), writes("x")),)), "cycle"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_misleading_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_prefix_data_expresses_blended_chunks() -> None:
    moved = Span(handle=7, start=256, end=512, source_start=0, exact=False, needs_fixup=True, layers_ready=2)
    plan = FixupPlan(always=((512, 520),), check_layers=(1,), measure="v", keep=(0.16,))
    assert moved.end - moved.start == 256 and plan.always[0][0] == moved.end
    FixupPlan(check_layers=(1,), measure="k", threshold_std=2.0, decode_every=8, decode_tokens=4)
    Content(length=2, ids=[1, 2], segments=((0, 1, "a"), (1, 2, "b")))
    Content(length=1024, hashes=[11, 12], hash_tokens=512)


def test_provenance_separates_what_must_not_mix() -> None:
    exact = Provenance(model="m")
    others = {
        Provenance(model="m", namespace="tenant-b"),
        Provenance(model="m", codec="kv4"),
        Provenance(model="m", eviction="h2o:0.2"),
        Provenance(model="m", exact=False),
    }
    assert len(others) == 4 and exact not in others and exact == Provenance(model="m")


@pytest.mark.parametrize(
    ("bits", "scales", "expected"),
    [
        (16, (), 2.0),
        (8, (ScaleLevel(group=None),), 1.0),
        (4, (ScaleLevel(group=128),), 0.515625),
        (4, (ScaleLevel(group=128, zero_bits=4, zero="int"),), 0.51953125),
        (4, (ScaleLevel(group=64),), 0.53125),
        (4, (ScaleLevel(group=None), ScaleLevel(group=128, bits=8, zero_bits=8, zero="int")), 0.515625),
        (6, (ScaleLevel(group=128),), 0.765625),
        (1.6, (), 0.2),
    ],
)
def test_bytes_per_weight(bits: float, scales: tuple[ScaleLevel, ...], expected: float) -> None:
    """Hand-computed: codes, then (scale + zero) over the group; scales per output are not counted."""
    assert WeightFormat(kind="int", bits=bits, scales=scales).bytes_per_weight == pytest.approx(expected)


def test_split_and_nested_storage() -> None:
    six = WeightFormat(kind="int", bits=6, slices=(4, 2), scales=(ScaleLevel(group=128),))
    assert QTensor(format=six, shape=(64, 128), codes=("hi", "lo"), scales=("s",)).packing == "canonical"
    assert WeightFormat(kind="int", bits=8, slices=(2, 1, 1, 1, 1, 1, 1)).bytes_per_weight == 1.0


def test_kv_formats_of_all_key_spaces() -> None:
    KVFormat(codec="kv4")
    KVFormat(codec="nuq3", key_space="pre_rope", exact_head_tokens=1)
    KVFormat(codec="kivi2", group_tokens=32, exact_tail_tokens=128)
    KVFormat(codec="xquant4", key_space="x", captures=("x",))
    KVFormat(codec="xquant_latent", key_space="latent", captures=("x",))
    KVFormat(codec="xquant_cl2", key_space="x_delta", captures=("x",))


def test_batch_layout_expresses_gaps_trees_and_moved_segments() -> None:
    assert layout().masks[1] == "index"
    moved = layout(seg_offset=[4, 12, 0], q_positions=[13, 1, 3])
    assert moved.seg_pages == layout().seg_pages
    assert layout(masks=["causal", "tree"], trees={1: [-1, 0]}).trees[1] == [-1, 0]
    assert layout(seg_instance=[1, 0, 0]).seg_instance[0] == 1


def test_drafts_are_chains_or_trees() -> None:
    assert Draft((4, 2, 3)).is_chain and Draft((4, 2), (-1, 0)).is_chain
    assert not Draft((4, 2, 3), (-1, -1, 0)).is_chain


def test_mask_words_cover_the_padded_vocabulary() -> None:
    assert Vocabulary(tokens=[b"a"] * 33, padded_size=33, stop_ids=(0,)).mask_words == 2
    assert Vocabulary(tokens=[b"a"], padded_size=128_256, stop_ids=(0,)).mask_words == 4008


def test_map_reduce_graph() -> None:
    maps = tuple(node(f"map{i}", writes(f"s{i}")) for i in range(3))
    reduce = node("reduce", *(reads(f"s{i}") for i in range(3)), writes("answer"))
    graph = Graph(id="g", nodes=(*maps, reduce), wants=(("answer", "latency"),))
    assert graph.nodes[-1].id == "reduce" and Start(node="map0").annotation.depth == 0


def test_inputs_may_come_from_outside_the_graph() -> None:
    Graph(id="g", nodes=(node("a", reads("question"), after=("earlier_graph_node",)),))

"""Unknown names are refused; conflicts fire on the pairs the literature names, and only there."""

from __future__ import annotations

import pytest

from servelab.core.families import KINDS
from servelab.core.vocabulary import CAPABILITIES, CONFLICTS, Conflict, find_conflicts, unknown_capabilities

PROVIDES: dict[str, set[str]] = {
    "scheduler 'vllm_v1'": {"scheduler.chunks"},
    "scheduler 'layered_prefill'": {"scheduler.layers"},
    "scheduler 'nanoflow'": {"scheduler.ahead"},
    "kvcache 'paged'": {"kvcache.block_table", "kvcache.fork", "kvcache.swap", "kvcache.pin"},
    "kvcache 'per_head'": {"kvcache.block_table", "kvcache.per_head_tokens"},
    "kvcache 'vattention'": {"kvcache.contiguous_slot"},
    "kvcache 'segmented'": {"kvcache.segments", "kvcache.fork"},
    "prefix 'hash_prefix'": {"prefix.exact", "prefix.page_sharing", "prefix.owns_pool", "prefix.events"},
    "prefix 'radix_prefix'": {"prefix.exact", "prefix.page_sharing", "prefix.owns_pool", "prefix.probe"},
    "prefix 'cacheblend'": {"prefix.moving", "prefix.approximate", "prefix.provenance"},
    "prefix 'careless_blend'": {"prefix.moving", "prefix.approximate"},
    "prefix 'continuum_ttl'": {"prefix.pin"},
    "semantic 'gptcache'": {"semantic.answers"},
    "semantic 'category'": {"semantic.answers", "semantic.category_policy"},
    "semantic 'ic_cache'": {"semantic.augments", "router.places"},
    "quant 'w4a8'": {"quant.weights", "quant.activations", "quant.transform"},
    "quant 'awq'": {"quant.weights", "quant.calibrated"},
    "kvquant 'qserve_kv4'": {"kvquant.representation", "kvquant.post_rope", "kvquant.transform"},
    "kvquant 'kv4_rerotating'": {"kvquant.representation", "kvquant.post_rope", "kvquant.rerotate"},
    "kvquant 'nuq'": {"kvquant.representation", "kvquant.pre_rope", "kvquant.calibrated"},
    "kvquant 'xquant'": {"kvquant.representation", "kvquant.rematerializes"},
    "kvquant 'xquant_cl'": {"kvquant.representation", "kvquant.rematerializes", "kvquant.cross_layer"},
    "kvquant 'host_tier_codec'": {"kvquant.representation", "kvquant.tiered"},
    "kernel 'flashinfer'": {"kernel.block_table", "kernel.partial", "kernel.cascade", "kernel.tree_mask"},
    "kernel 'shadowkv'": {"kvquant.representation", "kernel.select", "kernel.prefill_built"},
    "kernel 'travelling_index'": {"kernel.select", "kernel.prefill_built", "kernel.index_travels"},
    "kernel 'one_shot_index'": {"kernel.select", "kernel.whole_prompt"},
    "kernel 'streaming_llm'": {"kernel.evicts", "kernel.moves_keys", "kernel.pre_rope"},
    "kernel 'h2o'": {"kernel.evicts", "kernel.per_head_sets", "kernel.probabilities"},
    "kernel 'snapkv'": {"kernel.evicts", "kernel.per_head_sets", "kernel.prefill_built"},
    "kernel 'lserve'": {"kernel.ring", "kernel.select"},
    "kernel 'dllm_head_sparse'": {"kernel.noncausal", "kernel.select"},
    "kernel 'hogwild'": {"kernel.segments", "kernel.block_local"},
    "spec 'prompt_lookup'": {"spec.drafts"},
    "spec 'trees'": {"spec.drafts", "spec.tree"},
    "grammar 'xgrammar'": {"grammar.constrains", "grammar.rollback", "grammar.tree", "grammar.jump_forward"},
    "grammar 'regex'": {"grammar.constrains"},
    "grammar 'late'": {"grammar.constrains", "grammar.late_mask"},
    "router 'distserve'": {"router.disaggregates", "router.plans"},
    "router 'llumnix'": {"router.places", "router.migrates", "router.scales"},
    "router 'round_robin'": set(),
    "app 'llmcompiler'": {"app.graphs", "app.dynamic", "app.tools"},
    "app 'halo'": {"app.graphs", "app.dedup", "app.plans", "router.places"},
    "app 'parrot'": {"app.graphs", "app.annotates", "app.plans"},
    "app 'hogwild'": {"app.shared_context"},
}

REFUSED = [
    # KV cards, "refuse at composition time"
    ("kernel 'shadowkv'", "kvquant 'qserve_kv4'", "two_kv_forms"),
    ("kvquant 'xquant'", "kvquant 'nuq'", "two_kv_forms"),
    ("kvquant 'qserve_kv4'", "prefix 'cacheblend'", "post_rope_reuse"),
    ("kvquant 'qserve_kv4'", "kernel 'streaming_llm'", "post_rope_shift"),
    ("kvquant 'qserve_kv4'", "kvcache 'segmented'", "post_rope_segments"),
    ("kernel 'h2o'", "prefix 'hash_prefix'", "lossy_exact_prefix"),
    ("kernel 'snapkv'", "prefix 'radix_prefix'", "lossy_exact_prefix"),
    ("kernel 'streaming_llm'", "prefix 'hash_prefix'", "lossy_exact_prefix"),
    ("kernel 'h2o'", "kvcache 'paged'", "per_head_tables"),
    ("kvcache 'vattention'", "prefix 'hash_prefix'", "contiguous_sharing"),
    ("kvcache 'vattention'", "app 'hogwild'", "contiguous_shared_context"),
    ("kvquant 'xquant_cl'", "kernel 'h2o'", "cross_layer_eviction"),
    ("kvquant 'xquant_cl'", "scheduler 'layered_prefill'", "cross_layer_ranges"),
    ("kernel 'snapkv'", "router 'distserve'", "index_stays_behind"),
    ("kernel 'one_shot_index'", "scheduler 'vllm_v1'", "whole_prompts"),
    # prefix, semantic and app cards
    ("prefix 'hash_prefix'", "prefix 'radix_prefix'", "two_prefix_owners"),
    ("prefix 'careless_blend'", "prefix 'hash_prefix'", "approximate_exact_prefix"),
    ("prefix 'cacheblend'", "kvquant 'xquant_cl'", "cross_layer_overwrite"),
    ("prefix 'cacheblend'", "scheduler 'layered_prefill'", "approximate_layers"),
    ("semantic 'gptcache'", "grammar 'xgrammar'", "answers_constrained"),
    ("semantic 'gptcache'", "app 'llmcompiler'", "answers_tools"),
    ("app 'halo'", "semantic 'ic_cache'", "two_placers"),
    ("app 'halo'", "router 'llumnix'", "two_placers"),
    ("prefix 'continuum_ttl'", "kvcache 'vattention'", "contiguous_pin"),
    # attention, grammar and quantization cards
    ("kernel 'lserve'", "prefix 'hash_prefix'", "ring_sharing"),
    ("kernel 'dllm_head_sparse'", "prefix 'hash_prefix'", "noncausal_prefix"),
    ("grammar 'xgrammar'", "scheduler 'nanoflow'", "mask_too_late"),
    ("grammar 'regex'", "spec 'prompt_lookup'", "grammar_rollback"),
    ("grammar 'regex'", "spec 'trees'", "grammar_tree"),
    ("quant 'w4a8'", "quant 'awq'", "two_weight_formats"),
]

ALLOWED = [
    ("kvquant 'nuq'", "prefix 'cacheblend'"),
    ("kvquant 'xquant'", "kernel 'streaming_llm'"),
    ("kvquant 'kv4_rerotating'", "prefix 'cacheblend'"),
    ("kvquant 'qserve_kv4'", "prefix 'hash_prefix'"),
    ("kvquant 'host_tier_codec'", "kernel 'shadowkv'"),
    ("quant 'w4a8'", "kvquant 'qserve_kv4'"),
    ("kernel 'h2o'", "kvcache 'per_head'"),
    ("kernel 'h2o'", "prefix 'cacheblend'"),
    ("kernel 'travelling_index'", "router 'distserve'"),
    ("kernel 'flashinfer'", "prefix 'radix_prefix'"),
    ("kernel 'hogwild'", "kvcache 'segmented'"),
    ("kvcache 'segmented'", "app 'hogwild'"),
    ("prefix 'continuum_ttl'", "kvcache 'paged'"),
    ("semantic 'category'", "grammar 'xgrammar'"),
    ("semantic 'ic_cache'", "grammar 'xgrammar'"),
    ("semantic 'ic_cache'", "app 'parrot'"),
    ("app 'halo'", "router 'round_robin'"),
    ("grammar 'late'", "scheduler 'nanoflow'"),
    ("grammar 'xgrammar'", "spec 'trees'"),
    ("scheduler 'vllm_v1'", "kvcache 'paged'"),
]


def named(name: str) -> Conflict:
    return next(c for c in CONFLICTS if c.name == name)


@pytest.mark.parametrize(("one", "other", "name"), REFUSED)
def test_refused_pairs_name_everything_in_either_order(one: str, other: str, name: str) -> None:
    conflict = named(name)
    for pair in ((one, other), (other, one)):
        sentences = find_conflicts({p: PROVIDES[p] for p in pair})
        hit = [s for s in sentences if conflict.reason in s]
        assert len(hit) == 1, sentences
        assert one in hit[0] and other in hit[0]
        assert conflict.a in hit[0] and conflict.b in hit[0]
        assert hit[0].endswith(conflict.remedy)


@pytest.mark.parametrize(("one", "other"), ALLOWED)
def test_compatible_pairs_run(one: str, other: str) -> None:
    assert find_conflicts({one: PROVIDES[one], other: PROVIDES[other]}) == []
    assert find_conflicts({other: PROVIDES[other], one: PROVIDES[one]}) == []


def test_every_conflict_has_an_example_above() -> None:
    assert {name for _, _, name in REFUSED} | {"cross_layer_moving"} == {c.name for c in CONFLICTS}


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda c: c.name)
def test_each_conflict_fires_symmetrically_and_each_way_out_lifts_it(conflict: Conflict) -> None:
    one, other = {"p": {conflict.a}, "q": {conflict.b}}, {"p": {conflict.b}, "q": {conflict.a}}
    assert any(conflict.reason in s for s in find_conflicts(one))
    assert any(conflict.reason in s for s in find_conflicts(other))
    for way_out in conflict.unless:
        for helper in ("p", "q", "r"):
            lifted = {**one, helper: one.get(helper, set()) | {way_out}}
            assert not any(conflict.reason in s and conflict.a in s for s in find_conflicts(lifted))


def test_one_plugin_answers_for_itself() -> None:
    assert find_conflicts({p: PROVIDES[p] for p in ["grammar 'xgrammar'"]}) == []
    for conflict in CONFLICTS:
        assert find_conflicts({"p": {conflict.a, conflict.b}}) == []


def test_all_conflicts_are_reported_at_once_in_a_fixed_order() -> None:
    chosen = [
        "kvquant 'qserve_kv4'",
        "kernel 'streaming_llm'",
        "prefix 'hash_prefix'",
        "kvcache 'vattention'",
    ]
    sentences = find_conflicts({p: PROVIDES[p] for p in chosen})
    reasons = [next(c.name for c in CONFLICTS if c.reason in s) for s in sentences]
    assert len(sentences) == 3
    assert sentences == find_conflicts({p: PROVIDES[p] for p in chosen})
    assert reasons == sorted(reasons, key=[c.name for c in CONFLICTS].index)


def test_three_owners_give_three_sentences() -> None:
    assert len(find_conflicts({p: {"prefix.owns_pool"} for p in "abc"})) == 3


def test_conflicts_are_well_formed() -> None:
    assert len({c.name for c in CONFLICTS}) == len(CONFLICTS)
    assert len({frozenset((c.a, c.b)) for c in CONFLICTS}) == len(CONFLICTS)
    for c in CONFLICTS:
        assert {c.a, c.b, *c.unless} <= CAPABILITIES.keys(), c.name
        assert not c.reason.endswith(".") and (c.reason[0].islower() or c.reason.startswith("KV ")), c.name
        assert c.remedy.endswith(".") and c.remedy[0].isupper(), c.name


def test_vocabulary_is_well_formed() -> None:
    for name, meaning in CAPABILITIES.items():
        family, _, word = name.partition(".")
        assert family in KINDS and word, name
        assert meaning.endswith(".") and "\n" not in meaning, name
    assert unknown_capabilities([*CAPABILITIES, *(c for p in PROVIDES.values() for c in p)]) == []


def test_unknown_names_are_refused_with_the_nearest() -> None:
    (sentence,) = unknown_capabilities(["kernel.tree_masks"])
    assert "'kernel.tree_masks' is unknown" in sentence and "did you mean 'kernel.tree_mask'?" in sentence
    (sentence,) = unknown_capabilities(["kernels.tree_mask"])
    assert "did you mean 'kernel.tree_mask'?" in sentence


def test_packages_have_a_namespace_of_their_own() -> None:
    assert unknown_capabilities(["x_acme.sixbit_codec", "x_acme_labs.v2"]) == []
    for wrong in ("x_.a", "x_acme", "x_acme.", "x_Acme.codec", "x_acme.a.b"):
        (sentence,) = unknown_capabilities([wrong])
        assert "x_<package>.<name>" in sentence

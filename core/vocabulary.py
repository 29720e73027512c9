"""The capability vocabulary, and which capabilities never meet in one run. Data, and two pure functions.

A capability is ``family.name``. The family says what it is about, not who brings it: an attention backend
that stores keys in a form of its own provides ``kvquant.representation``. Specs that name an unknown
capability are refused. Packages add their own as ``x_<package>.<name>``; the core never gives those a
meaning.

Requirements need no table: a spec lists them, and another selected plugin must provide them. A conflict
listed here holds between any two plugins, so that neither has to know the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from servelab.core.errors import nearest

CAPABILITIES: dict[str, str] = {
    "scheduler.chunks": "May run a prompt in several launches.",
    "scheduler.layers": "Emits layer ranges: some layers of a prompt per launch.",
    "scheduler.swap": "Preempts by moving KV to the host tier.",
    "scheduler.lanes": "Plans several lanes of a device side by side.",
    "scheduler.ahead": "Plans a step before the results of the one before are known.",
    "scheduler.retains": "Keeps KV between the turns of a program (on_turn_end).",
    "kvcache.block_table": "Addresses KV as pages named by a table per request.",
    "kvcache.contiguous_slot": "Addresses KV as one contiguous range per request.",
    "kvcache.segments": "Addresses KV as ordered segments whose positions may change.",
    "kvcache.remote_spans": "Addresses KV that partly lies on other instances.",
    "kvcache.fork": "Lets requests share pages until one of them writes (copy-on-write).",
    "kvcache.swap": "Has a host tier that KV can be moved to and from.",
    "kvcache.pin": "Keeps the KV of a request that has ended.",
    "kvcache.per_head_tokens": "Can keep different tokens for each KV head.",
    "prefix.exact": "Publishes stored KV as equal to computing it.",
    "prefix.page_sharing": "Puts one physical page into several requests.",
    "prefix.owns_pool": "Decides what is evicted from the device pools.",
    "prefix.moving": "Reuses KV at positions other than those it was computed at.",
    "prefix.approximate": "Returns spans of which some tokens must be computed again.",
    "prefix.decode_fixup": "Computes reused tokens again while decoding.",
    "prefix.provenance": "Keys entries by eviction policy and exactness, so that unlike KV never mixes.",
    "prefix.pin": "Keeps entries out of eviction until a deadline.",
    "prefix.tiers": "Keeps entries on tiers below the device.",
    "prefix.probe": "Can match without changing its state.",
    "prefix.fork": "Counts users of pages that several samples of one prompt share.",
    "prefix.events": "Reports what it stores and removes.",
    "semantic.answers": "Answers requests from stored answers.",
    "semantic.augments": "Adds stored examples to prompts.",
    "semantic.category_policy": "Answers constrained or tool-calling requests only by category.",
    "semantic.load_adaptive": "Changes its policy with the load of models.",
    "semantic.replay": "Asks for background requests that improve its entries.",
    "quant.weights": "Packs linear weights.",
    "quant.activations": "Quantizes the inputs of linear layers.",
    "quant.calibrated": "Needs calibration data.",
    "quant.gradients": "Needs a backward pass over calibration data.",
    "quant.transform": "Folds exact transforms into the weights.",
    "quant.permutes": "Reorders the input channels of linear layers.",
    "quant.online_ops": "Adds work in front of linear layers.",
    "quant.nested": "Serves several bit widths from one store.",
    "quant.streams": "Keeps only part of the weights on the device.",
    "kvquant.representation": "Owns the form in which KV is stored on the device.",
    "kvquant.tiered": "Encodes only KV on a tier that the owner of the form leaves to it.",
    "kvquant.pre_rope": "Stores keys from before rotation.",
    "kvquant.post_rope": "Stores keys from after rotation.",
    "kvquant.rerotate": "Can give encoded keys another position.",
    "kvquant.rematerializes": "Needs model weights to read KV.",
    "kvquant.cross_layer": "Needs the pages of earlier layers to read a layer.",
    "kvquant.stash": "Can park the state it carries from layer to layer.",
    "kvquant.calibrated": "Needs calibration data.",
    "kvquant.gradients": "Needs a backward pass over calibration data.",
    "kvquant.transform": "Folds exact transforms into the projections.",
    "kernel.block_table": "Reads KV by block tables.",
    "kernel.whole_prompt": "Needs the whole prompt in one launch.",
    "kernel.contiguous_slot": "Reads KV from one contiguous range per request.",
    "kernel.segments": "Reads KV as segments with positions of their own.",
    "kernel.remote_spans": "Computes over KV on other instances.",
    "kernel.pre_rope": "Reads keys stored before rotation.",
    "kernel.block_local": "Reads keys rotated by their position within a segment.",
    "kernel.latent": "Reads keys and values stored as latents.",
    "kernel.partial": "Returns attention states that can be merged.",
    "kernel.host_partial": "Computes attention states over host memory.",
    "kernel.cascade": "Reads a prefix shared by several requests once.",
    "kernel.tree_mask": "Masks drafts that are trees.",
    "kernel.index_mask": "Masks by original position where queries have gaps.",
    "kernel.noncausal": "Lets tokens attend to later ones, so KV depends on what follows.",
    "kernel.layer_ranges": "Runs different requests in different layers of one launch.",
    "kernel.probabilities": "Returns the attention mass of each key.",
    "kernel.select": "Reads only chosen pages or tokens.",
    "kernel.evicts": "Drops tokens for good, so later KV differs from a full computation.",
    "kernel.per_head_sets": "Keeps different tokens for each KV head.",
    "kernel.moves_keys": "Gives stored keys new positions.",
    "kernel.ring": "Overwrites its oldest pages with new tokens.",
    "kernel.prefill_built": "Builds an index over each prompt when its prefill ends.",
    "kernel.index_travels": "Can send that index to another instance.",
    "kernel.batch_invariant": "Gives a request the same result in every batch.",
    "kernel.linear": "Runs packed weights.",
    "spec.drafts": "Drafts tokens for the model to verify.",
    "spec.tree": "Drafts trees.",
    "spec.draft_model": "Drafts with a model that has KV of its own.",
    "spec.adaptive": "Chooses draft lengths from load or acceptance.",
    "spec.trains": "Trains its draft model on live traffic.",
    "grammar.constrains": "Masks tokens by a grammar.",
    "grammar.rollback": "Can take accepted tokens back.",
    "grammar.tree": "Masks every node of a draft tree.",
    "grammar.jump_forward": "Knows text that must follow.",
    "grammar.late_mask": "Makes sampling wait for masks filled after the token before.",
    "router.places": "Its choice of instance is the technique; nobody else may decide it.",
    "router.disaggregates": "Runs prefill and decode of a request on different instances.",
    "router.migrates": "Moves running requests between instances.",
    "router.roles": "Changes the roles of instances.",
    "router.shares": "Divides a device between prefill and decode.",
    "router.scales": "Starts, drains and resizes instances.",
    "router.lends": "Puts KV of a request on other instances.",
    "router.replicates": "Copies cached KV between instances.",
    "router.experts": "Places experts on devices.",
    "router.models": "Chooses or escalates among models.",
    "router.plans": "Plans fleets offline.",
    "app.graphs": "Runs graphs of calls.",
    "app.dynamic": "Adds calls to a graph while others stream.",
    "app.tools": "Calls tools.",
    "app.annotates": "Tells schedulers and routers what a call is for.",
    "app.dedup": "Runs equal calls once.",
    "app.plans": "Proposes where and when calls run.",
    "app.shared_context": "Runs calls that see each other's output as it grows.",
    "cost.lanes": "Prices lanes that run side by side.",
    "cost.energy": "Prices energy.",
    "cost.quant": "Prices the formats of a quantizer.",
    "workload.closed_loop": "Reacts to completions.",
    "workload.programs": "Has conversations or jobs of several turns.",
    "workload.prompt_ids": "Carries real token ids.",
    "workload.truth": "Carries true output lengths.",
    "task.offline": "Serves nothing, so KV memory need not hold the longest request.",
    "executor.torch": "Runs real weights and gives real tokens.",
    "executor.sim": "Prices work only.",
    "executor.tokenizer": "Turns text into the model's token ids and back.",
    "executor.quant": "Runs or prices quantized linear layers.",
    "executor.quality": "Compares quantized models with the unquantized one, token by token.",
    "executor.simulated": "Takes no time of its own; the cost model says how long a launch lasts.",
}
"""Every capability the core knows, by kind."""

_OWN = re.compile(r"x_[a-z0-9][a-z0-9_]*\.[a-z0-9][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two capabilities that two plugins of one run never provide, unless one of them all brings a way out.

    ``a == b`` forbids a second provider. A single plugin that provides both answers for itself.
    """

    name: str
    a: str
    b: str
    reason: str
    """Why it goes wrong; completes "..., because"."""
    remedy: str
    """What to do; a full sentence."""
    unless: frozenset[str] = frozenset()
    """Capabilities any of which, brought by any selected plugin, lifts the conflict."""


_REROTATE = frozenset({"kvquant.rerotate"})
_POST_ROPE = "its stored keys are quantized after rotation, and turning them to another position is not exact"
_PRE_ROPE_INSTEAD = "Take a codec that stores keys before rotation, or one that can rotate them again."
_CROSS_LAYER = "a layer's KV can be read only after that of all layers below, for the same tokens"
_CATEGORY = frozenset({"semantic.category_policy"})

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        "two_kv_forms",
        "kvquant.representation",
        "kvquant.representation",
        "KV on the device is stored in one form and both would own it",
        "Keep one of them, or let one encode only a tier the other leaves to it.",
        frozenset({"kvquant.tiered"}),
    ),
    Conflict(
        "post_rope_reuse", "kvquant.post_rope", "prefix.moving", _POST_ROPE, _PRE_ROPE_INSTEAD, _REROTATE
    ),
    Conflict(
        "post_rope_shift", "kvquant.post_rope", "kernel.moves_keys", _POST_ROPE, _PRE_ROPE_INSTEAD, _REROTATE
    ),
    Conflict(
        "post_rope_segments",
        "kvquant.post_rope",
        "kvcache.segments",
        _POST_ROPE,
        _PRE_ROPE_INSTEAD,
        _REROTATE,
    ),
    Conflict(
        "lossy_exact_prefix",
        "kernel.evicts",
        "prefix.exact",
        "KV computed after an eviction would be published as if nothing had been evicted",
        "Take a prefix store that keys entries by eviction policy, or run without one.",
        frozenset({"prefix.provenance"}),
    ),
    Conflict(
        "approximate_exact_prefix",
        "prefix.approximate",
        "prefix.exact",
        "KV that descends from repaired spans would be published as exact",
        "Take one store that keeps exact and approximate entries apart.",
        frozenset({"prefix.provenance"}),
    ),
    Conflict(
        "per_head_tables",
        "kernel.per_head_sets",
        "kvcache.block_table",
        "one table serves all heads of a layer, and the heads keep different tokens",
        "Take a KV cache with per-head tokens.",
        frozenset({"kvcache.per_head_tokens"}),
    ),
    Conflict(
        "contiguous_sharing",
        "kvcache.contiguous_slot",
        "prefix.page_sharing",
        "a contiguous range belongs to one request, so no page of it can be another's prefix",
        "Take a paged KV cache, or run without a prefix store.",
    ),
    Conflict(
        "contiguous_pin",
        "kvcache.contiguous_slot",
        "prefix.pin",
        "the range of a request that has ended is handed to the next one",
        "Take a KV cache that can pin.",
        frozenset({"kvcache.pin"}),
    ),
    Conflict(
        "contiguous_shared_context",
        "kvcache.contiguous_slot",
        "app.shared_context",
        "calls that read each other's KV need segments, and a contiguous range has one owner",
        "Take a KV cache with segments.",
        frozenset({"kvcache.segments"}),
    ),
    Conflict(
        "cross_layer_eviction",
        "kvquant.cross_layer",
        "kernel.evicts",
        _CROSS_LAYER + ", and an eviction in one layer breaks all above",
        "Take a codec whose layers stand alone, or attention that keeps every token.",
    ),
    Conflict(
        "cross_layer_overwrite",
        "kvquant.cross_layer",
        "prefix.approximate",
        _CROSS_LAYER + ", and repairing tokens in one layer breaks all above",
        "Take a codec whose layers stand alone, or a store of exact prefixes.",
    ),
    Conflict(
        "cross_layer_moving",
        "kvquant.cross_layer",
        "prefix.moving",
        _CROSS_LAYER + ", which moved spans with layers of their own do not have",
        "Take a codec whose layers stand alone, or a store of exact prefixes.",
    ),
    Conflict(
        "cross_layer_ranges",
        "kvquant.cross_layer",
        "scheduler.layers",
        _CROSS_LAYER + ", and the state that carries them is lost between layer ranges",
        "Take a codec that can park its state, or a scheduler that runs all layers at once.",
        frozenset({"kvquant.stash"}),
    ),
    Conflict(
        "index_stays_behind",
        "kernel.prefill_built",
        "router.disaggregates",
        "the index over a prompt is built where it was prefilled and is missing where it is decoded",
        "Take attention whose index can travel, or keep prefill and decode together.",
        frozenset({"kernel.index_travels"}),
    ),
    Conflict(
        "ring_sharing",
        "kernel.ring",
        "prefix.page_sharing",
        "pages of a ring are overwritten, and a shared page must never change",
        "Run without a prefix store, or with attention that keeps every page.",
    ),
    Conflict(
        "noncausal_prefix",
        "kernel.noncausal",
        "prefix.exact",
        "tokens attend to later ones, so equal prefixes do not have equal KV",
        "Run without a prefix store.",
    ),
    Conflict(
        "two_prefix_owners",
        "prefix.owns_pool",
        "prefix.owns_pool",
        "both would evict from the same pools",
        "Keep one; tiers below it are fine.",
    ),
    Conflict(
        "approximate_layers",
        "prefix.approximate",
        "scheduler.layers",
        "a repair runs other tokens in each layer, and a layer range runs the same ones",
        "Take a scheduler that runs all layers at once.",
    ),
    Conflict(
        "answers_constrained",
        "semantic.answers",
        "grammar.constrains",
        "a stored answer was not made under this request's grammar",
        "Take a semantic cache that allows it per category, or one that only augments.",
        _CATEGORY,
    ),
    Conflict(
        "answers_tools",
        "semantic.answers",
        "app.tools",
        "a stored answer would replace a call whose tools have effects",
        "Take a semantic cache that allows it per category, or one that only augments.",
        _CATEGORY,
    ),
    Conflict(
        "whole_prompts",
        "kernel.whole_prompt",
        "scheduler.chunks",
        "its index is built from the whole prompt in one launch",
        "Take a scheduler that runs prompts whole, or a kernel that builds after the last chunk.",
    ),
    Conflict(
        "two_placers",
        "router.places",
        "router.places",
        "both decide where calls run, and one would be measured with the other's choices",
        "Keep one; others may annotate or propose.",
    ),
    Conflict(
        "two_weight_formats",
        "quant.weights",
        "quant.weights",
        "both would pack the same linear layers",
        "Keep one.",
    ),
    Conflict(
        "mask_too_late",
        "grammar.constrains",
        "scheduler.ahead",
        "a mask needs the token before it, and the next step starts without waiting for it",
        "Plan one step at a time, or take a grammar that makes sampling wait.",
        frozenset({"grammar.late_mask"}),
    ),
    Conflict(
        "grammar_rollback",
        "grammar.constrains",
        "spec.drafts",
        "rejected drafts must be taken back from the grammar",
        "Take a grammar with rollback.",
        frozenset({"grammar.rollback"}),
    ),
    Conflict(
        "grammar_tree",
        "grammar.constrains",
        "spec.tree",
        "each branch of a draft tree needs a mask of its own",
        "Take a grammar that masks trees, or drafts that are chains.",
        frozenset({"grammar.tree"}),
    ),
)
"""Found in the papers and systems ServeLab reproduces; ``docs/explanation/families.md`` shows them as a
table.
"""


def unknown_capabilities(names: Iterable[str]) -> list[str]:
    """One sentence for each name that is neither in the vocabulary nor in a package's own namespace."""
    out = []
    for name in names:
        if name in CAPABILITIES or _OWN.fullmatch(name):
            continue
        if name.startswith("x_"):
            out.append(
                f"Capability {name!r} is malformed; a package's own are 'x_<package>.<name>', lower case."
            )
            continue
        family = name.partition(".")[0]
        known = [c for c in CAPABILITIES if c.partition(".")[0] == family] or [*CAPABILITIES]
        out.append(
            f"Capability {name!r} is unknown; {nearest(name, known)}; packages use 'x_<package>.<name>'."
        )
    return out


def find_conflicts(provides: Mapping[str, Collection[str]]) -> list[str]:
    """Every conflict among selected plugins, as sentences with both plugins, the reason and the remedy.

    ``provides`` maps a label such as ``"kvquant 'kv4'"`` to what that plugin provides. The result is in the
    order of ``CONFLICTS``, then in that of the labels; empty if all can run together.
    """
    present = {c for brought in provides.values() for c in brought}
    out = []
    for conflict in CONFLICTS:
        if conflict.unless & present:
            continue
        first = [p for p in provides if conflict.a in provides[p]]
        second = [p for p in provides if conflict.b in provides[p]]
        pairs = (
            list(combinations(first, 2))
            if conflict.a == conflict.b
            else [(p, q) for p in first for q in second if p != q]
        )
        out += [
            f"{p} ({conflict.a}) cannot run with {q} ({conflict.b}), "
            f"because {conflict.reason}. {conflict.remedy}"
            for p, q in pairs
        ]
    return out

"""KV caches, one line per technique: which pages a request gets."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PAGED_ATTENTION = Paper(
    title="Efficient Memory Management for Large Language Model Serving with PagedAttention",
    year=2023,
    id="arXiv:2309.06180",
)


def _contiguous(name: str, factory: str, reserves: str, *, oracle: bool = False) -> PluginSpec:
    return PluginSpec(
        name=name,
        factory=f"servelab.plugins.kvcache.contiguous:{factory}",
        config="servelab.plugins.kvcache.contiguous:ContiguousConfig",
        summary=f"one contiguous range per request, reserved at admission: {reserves}",
        paper=PAGED_ATTENTION,
        deviations=(
            "Ranges are counted in pages of page_tokens tokens; with 1 nothing is rounded.",
            "No reservation exceeds engine.max_model_len.",
        ),
        provides=frozenset({"kvcache.contiguous_slot"}),
        requires=frozenset({"workload.truth"}) if oracle else frozenset(),
        # a range of true length has no room for drafts beyond the end
        conflicts=frozenset({"scheduler.retains", "scheduler.swap", *({"spec.drafts"} if oracle else ())}),
        oracle=oracle,
        tier="stable",
    )


TABLE = (
    PluginSpec(
        name="paged",
        factory="servelab.plugins.kvcache.paged:Paged",
        config="servelab.plugins.kvcache.paged:PagedConfig",
        summary="fixed pages and a block table per sequence",
        paper=PAGED_ATTENTION,
        deviations=(
            "The released engine keeps page 0 as a null page; here a table simply begins later.",
            "The watermark is 0 unless set. It is stated here and heeded by the budget that schedulers "
            "plan with, as v1 does: for requests not running yet, and only while others run.",
        ),
        provides=frozenset({"kvcache.block_table", "kvcache.fork", "kvcache.swap"}),
        tier="stable",
    ),
    _contiguous("contiguous", "Contiguous", "the longest there may be (Orca Max)"),
    _contiguous(
        "contiguous_pow2", "Pow2", "true output, rounded up to a power of two (Orca Pow2)", oracle=True
    ),
    _contiguous("contiguous_oracle", "TrueLengths", "what it will need (Orca Oracle)", oracle=True),
)


@hookimpl
def servelab_kvcaches() -> Iterable[PluginSpec]:
    return TABLE

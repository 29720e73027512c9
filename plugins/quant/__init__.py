"""Quantizers and KV codecs, one line per technique."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

_WEIGHTS = frozenset({"quant.weights"})
_BOTH = frozenset({"quant.weights", "quant.activations"})
_NEEDS = frozenset({"executor.quant"})

QUANTIZERS: tuple[PluginSpec, ...] = (
    PluginSpec(
        name="w8a16",
        factory="servelab.plugins.quant.w8a16:W8A16",
        config="servelab.plugins.quant._describe:LayersConfig",
        summary="int8 weights with a scale per output, rounded to nearest",
        provides=_WEIGHTS,
        requires=_NEEDS,
        tier="stable",
    ),
    PluginSpec(
        name="w4a16",
        factory="servelab.plugins.quant.w4a16:W4A16",
        config="servelab.plugins.quant.w4a16:W4A16Config",
        summary="4-bit weights in groups, rounded to nearest",
        deviations=(
            "Scales are in the model's 16-bit dtype (bfloat16 here, float16 there), float32 for wider "
            "models.",
            "Zeros take a byte instead of 4 bits.",
            "The group is the first of several sizes that divides the inputs: papers' models divide by 128.",
        ),
        provides=_WEIGHTS,
        requires=_NEEDS,
        tier="stable",
    ),
    PluginSpec(
        name="w8a8",
        factory="servelab.plugins.quant.w8a8:W8A8",
        config="servelab.plugins.quant._describe:LayersConfig",
        summary="int8 weights per output, int8 activations per token, products of integers",
        deviations=("Activations are quantized in an operation of their own, not in the norm before it.",),
        provides=_BOTH,
        requires=_NEEDS,
        tier="stable",
    ),
    PluginSpec(
        name="w4a8",
        factory="servelab.plugins.quant.w4a8:W4A8",
        config="servelab.plugins.quant._describe:GroupsConfig",
        summary="QServe's two-level 4-bit weights and int8 activations, rounded to nearest",
        paper=Paper(
            title="QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving",
            year=2024,
            id="arXiv:2405.04532",
        ),
        deviations=(
            "No rotation of block inputs, smoothing of block outputs or SmoothAttention.",
            "No reordering of channels.",
            "Weights are rounded to nearest instead of by GPTQ.",
            "KV is not touched (KV4 is a codec's).",
            "The zero is taken before s2, as the paper writes; the released g128 configuration takes "
            "one after it.",
            "s1 is in the model's 16-bit dtype (bfloat16 here, float16 there), float32 for wider models.",
            "The group is the first of several sizes that divides the inputs.",
            "On a CPU weights are unpacked to memory that all layers share, not within the product "
            "(with the paper's register-level parallelism: one multiplication scales four codes); "
            "activations are quantized in an operation of their own, not in the norm before it.",
        ),
        provides=_BOTH,
        requires=_NEEDS,
        tier="stable",
    ),
)
KV_CODECS: tuple[PluginSpec, ...] = ()


@hookimpl
def servelab_quantizers() -> Iterable[PluginSpec]:
    return QUANTIZERS


@hookimpl
def servelab_kv_codecs() -> Iterable[PluginSpec]:
    return KV_CODECS

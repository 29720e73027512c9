"""Cost models, one line per technique: the price of a batch."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="scripted",
        factory="servelab.plugins.costmodels.scripted:ScriptedCost",
        config="servelab.plugins.costmodels.scripted:ScriptedCostConfig",
        summary="prices from a list or a straight line in tokens and context",
        tier="stable",
    ),
    PluginSpec(
        name="roofline",
        factory="servelab.plugins.costmodels.roofline.cost:RooflineCost",
        config="servelab.plugins.costmodels.roofline.factors:RooflineConfig",
        summary="FLOPs and bytes of every operation over a device's peaks, smooth maximum, overheads",
        paper=Paper(
            title="LLM Inference Unveiled: Survey and Roofline Model Insights",
            year=2024,
            id="arXiv:2402.16363",
        ),
        deviations=(
            "Compute and memory overlap in part (smooth maximum), and operations, layers, steps and requests "
            "have overheads; LLM-Viewer has the greater of both, and none.",
            "Keys and values of attention are read once per KV head; LLM-Viewer's fused attention reads them "
            "once per query head.",
            "The 8-bit peak needs 8-bit weights and activations, whatever the width of KV; LLM-Viewer asks "
            "for 8-bit KV too. Attention is always priced at 16 bits.",
            "Logits are of the rows that sample; LLM-Viewer prices them for every token of a prompt.",
            "Embedding and collectives are priced, softmax is not.",
            "Attention is priced here, not by the kernel plugin: a run on a described GPU must not cost what "
            "the kernel of this machine does.",
        ),
        provides=frozenset({"cost.quant", "cost.energy", "cost.lanes"}),
        tier="stable",
    ),
    PluginSpec(
        name="phase_linear",
        factory="servelab.plugins.costmodels.phase_linear:PhaseLinear",
        config="servelab.plugins.costmodels.phase_linear:PhaseLinearConfig",
        summary="DistServe's regressions: prefill and decode as polynomials in tokens, context and requests",
        paper=Paper(
            title="DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model "
            "Serving",
            year=2024,
            id="arXiv:2401.09670",
        ),
        deviations=(
            "A step with both prompts and decodes, which DistServe has not, takes the prompts' variable part "
            "on top of the decodes' time.",
            "No step gets cheaper with more work, as the released fits do (by 6 % for OPT-13B on one device "
            "where the second set begins): from large_batch requests on the greater of both sets is taken, "
            "a prompt beside others takes at least what it would as a decode, and one of one token is one.",
            "Transfers take time (the released simulator charges none).",
        ),
        tier="stable",
    ),
    PluginSpec(
        name="table",
        factory="servelab.plugins.costmodels.table:TableCost",
        config="servelab.plugins.costmodels.table:TableConfig",
        summary="measured step times of a file, interpolated as in splitwise-sim",
        paper=Paper(
            title="Splitwise: Efficient Generative LLM Inference Using Phase Splitting",
            year=2024,
            id="arXiv:2311.18677",
        ),
        deviations=(
            "Measured points that fall are pooled to their mean, so that no step gets cheaper with more "
            "tokens; the released code interpolates them as they are.",
            "Decodes are measured and looked up by requests; the released code files their times under the "
            "tokens of the prompts before them and looks them up by requests, below all its points.",
            "No step takes less than its first point says, nor less than its requests would if each ran one "
            "token.",
            "A draft of d tokens counts as d more requests, a prompt of one token as a decode, and one point "
            "is a flat table.",
        ),
        tier="stable",
    ),
)


@hookimpl
def servelab_cost_models() -> Iterable[PluginSpec]:
    return TABLE

"""Executors, one line per technique: where a batch runs."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="torch",
        factory="servelab.plugins.executors.torch.executor:TorchExecutor",
        config="servelab.plugins.executors.torch.executor:TorchExecutorConfig",
        describe_model="servelab.plugins.executors.checkpoint.find:describe",
        diagnose="servelab.plugins.executors.torch.diagnose:diagnose",
        summary="real weights and tokens on this machine's CPU",
        runs=("torch",),
        provides=frozenset({"executor.torch", "executor.tokenizer", "executor.quant", "executor.quality"}),
        requires=frozenset({"workload.prompt_ids"}),
        # needs parts of the contract that it does not run yet
        conflicts=frozenset(
            {"quant.calibrated", "quant.gradients", "quant.transform", "quant.nested", "quant.streams"}
        ),
        imports=("torch", "numpy", "safetensors", "tokenizers", "jinja2"),
        tier="stable",
    ),
    PluginSpec(
        name="sim",
        factory="servelab.plugins.executors.sim:SimExecutor",
        config="servelab.plugins.executors.sim:SimExecutorConfig",
        describe_model="servelab.plugins.executors.checkpoint.find:describe",
        summary="a described device: KV pages from its memory, time from the cost model, no model",
        runs=("sim",),
        provides=frozenset({"executor.sim", "executor.simulated", "executor.quant"}),
        requires=frozenset({"workload.truth"}),
        tier="stable",
    ),
    PluginSpec(
        name="scripted",
        factory="servelab.plugins.executors.scripted:ScriptedExecutor",
        config="servelab.plugins.executors.scripted:ScriptedExecutorConfig",
        describe_model="servelab.plugins.executors.checkpoint.find:describe",
        summary="placeholder tokens until the workload's hidden lengths end, no model",
        runs=("sim",),
        provides=frozenset({"executor.sim", "executor.simulated"}),
        requires=frozenset({"workload.truth"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_executors() -> Iterable[PluginSpec]:
    return TABLE

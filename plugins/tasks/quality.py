"""Quality: several quantizers beside the unquantized model, as one table and one plot. A baseline.

Mechanism: every window of held-out text is read by the unquantized model and by each quantized one
(``core/quality.py``); all are held in memory together, so that they are compared on the same tokens at any
time, also when the task is interrupted. Nothing is served. The ``report`` observer prints the table; the plot
(``quality.png``) shows memory of the linears, divergence and agreement, one bar per quantizer.

Deviations: none. Tier: stable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core import quality
from servelab.core.api import ConfigError, Context, QualityBegan, QualityMeasured, ServeLabError
from servelab.core.bus import Bus
from servelab.core.compose import another_quantizer
from servelab.core.config import Choice, choice_of
from servelab.core.run_folder import unwritable
from servelab.plugins.tasks._life import announced

if TYPE_CHECKING:
    from servelab.core.compose import Run

PLOT_FILE = "quality.png"


class QualityTaskConfig(BaseModel):
    """Settings of ``task=quality``. How much text is read is set by ``quality.max_tokens``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantizers: tuple[str | dict[str, Any], ...] = Field(
        default=("w8a16", "w8a8", "w4a16", "w4a8"),
        min_length=1,
        description="What is compared: names, or mappings with a name and settings, such as "
        "{name: w4a16, group_size: 32}.",
    )


class QualityTask:
    """Keeps no state between runs."""

    def __init__(self, config: QualityTaskConfig, context: Context) -> None:
        self._config, self._folder = config, context.run_dir

    def run(self, run: Run) -> float | None:
        """Compare; returns the largest mean divergence, for sweepers."""
        try:
            _check(run)
            choices = self._choices(run)
            quantizers = {label: another_quantizer(run, choice) for label, choice in choices.items()}
        except BaseException:
            run.close()
            raise
        found: dict[str, QualityMeasured] = {}

        def compare(bus: Bus) -> None:
            def emit(record: QualityBegan | QualityMeasured) -> None:
                if isinstance(record, QualityMeasured):
                    found[record.label] = record
                bus.emit(record)

            try:
                quality.measure(run, quantizers, emit, 0)
            finally:  # also of what was read before an interruption
                if self._folder is not None and found:
                    plot(found, str(run.info["model"]), self._folder / PLOT_FILE)

        announced(run, _info(run, choices), compare, lambda: 0)
        return max(record.kl_mean for record in found.values())

    def _choices(self, run: Run) -> dict[str, Choice]:
        """Quantizers by label: the name, and the settings that are not at their defaults."""
        found: dict[str, Choice] = {}
        for i, stated in enumerate(self._config.quantizers):
            choice = choice_of("quant", stated, run.registry, where=f"task.quantizers[{i}]")
            changed = ", ".join(f"{key}={value}" for key, value in choice.changed().items())
            label = f"{choice.name} ({changed})" if changed else choice.name
            if label in found:
                raise ConfigError(f"{label} is listed twice", where="task.quantizers", do="list it once")
            found[label] = choice
        return found


def _check(run: Run) -> None:
    if run.config.quant is not None:
        raise ConfigError(
            f"task 'quality' compares task.quantizers, and quant is {run.config.quant.name!r}",
            where="quant",
            why="the run itself is the unquantized reference",
            do=f"leave quant out, and set task.quantizers=[{run.config.quant.name}]",
        )
    if not run.config.quality.max_tokens:
        raise ConfigError(
            "task 'quality' has nothing to read",
            where="quality.max_tokens",
            why="it is 0",
            do="set it to 8192 or more",
        )


def _info(run: Run, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What identifies the run, with what is compared in it."""
    origin = run.info.get("weights", {}).get("quantization", "unknown")
    return {
        **run.info,
        "stamps": [*run.info["stamps"], f"reference_weights: {origin}"],
        "quality": {
            "measured": True,
            "corpus": quality.describe(),
            "quantizers": {
                label: {"name": choice.name, **choice.settings()} for label, choice in choices.items()
            },
        },
    }


def plot(found: Mapping[str, QualityMeasured], model: str, path: Path) -> None:
    """Memory of the linears, divergence and agreement, one bar per quantizer.

    Raises:
        ServeLabError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ServeLabError(
            "the plot needs matplotlib", where=str(path), why=str(exc), do='pip install -e ".[run]"'
        ) from exc
    labels, ones = list(found), list(found.values())
    figure = Figure(figsize=(12, 1.6 + 0.45 * len(found)), layout="constrained")
    panels = (
        (f"linears, MiB ({ones[0].reference_linear_bytes / 2**20:.1f} unquantized)", "{:.1f}"),
        ("mean KL from unquantized, nats per token", "{:.4f}"),
        ("same most likely token, %", "{:.1f}"),
    )
    values = (
        [one.linear_bytes / 2**20 for one in ones],
        [one.kl_mean for one in ones],
        [100 * one.top1_agreement for one in ones],
    )
    for axes, (title, digits), bars in zip(figure.subplots(1, 3, sharey=True), panels, values, strict=True):
        drawn = axes.barh(labels, bars, color="0.75")
        axes.bar_label(drawn, [digits.format(bar) for bar in bars], padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # shared: the first quantizer on top
    tokens = f"{ones[0].tokens:,} tokens of held-out text"
    figure.suptitle(f"{model}: {tokens}, perplexity {ones[0].reference_perplexity:.2f} unquantized")
    try:
        figure.savefig(path, dpi=120)
    except OSError as exc:
        raise unwritable(path, exc) from exc

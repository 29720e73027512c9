"""Quality beside speed: how far a quantized model is from the unquantized one, token by token.

Text is the ``evaluation`` part of ``core/corpus.py``, which neither prompts nor calibration touch, cut into
windows that do not overlap; every token of a window but the first is predicted. An executor with
``executor.quality`` runs each window through both models; this module chooses the windows and adds up.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, fsum, isfinite
from typing import TYPE_CHECKING, Any

from servelab.core.corpus import digest, part
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.metrics.distribution import Distribution
from servelab.core.records import QualityBegan, QualityMeasured
from servelab.core.sites import linear_bytes

if TYPE_CHECKING:
    from servelab.core.compose import Run
    from servelab.core.config import QualityConfig
    from servelab.core.families.quant import Quantizer
    from servelab.core.text import Tokenizer

log = logging.getLogger("servelab")

RECORDS = 50
"""Figures are made so many times at most: each sorts all that was compared."""

PART = "evaluation"
"""Part of the corpus that quality is measured on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One window, one quantizer. Logarithms are natural."""

    kl: Sequence[float]
    """Per predicted token, the divergence of the quantized model's distribution from the reference's,
    KL(reference || quantized)."""
    agreements: int
    """Predicted tokens whose most likely continuation is the same in both."""
    nll: float
    """Sum of -log p of the text's own tokens, quantized."""
    reference_nll: float


@dataclass(slots=True)
class Tally:
    """What a quantizer's windows add up to."""

    kl: list[float] = field(default_factory=list)
    agreements: int = 0
    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)

    def add(self, window: Comparison) -> None:
        self.kl += window.kl
        self.agreements += window.agreements
        self.nll.append(window.nll)
        self.reference_nll.append(window.reference_nll)

    def figures(self) -> dict[str, Any]:
        """Fields of ``QualityMeasured``, after at least one window."""
        tokens, kl = len(self.kl), Distribution.of(self.kl)
        return {
            "tokens": tokens,
            "windows": len(self.nll),
            "kl_mean": kl.mean(),
            "kl_p99": kl.percentile(99),
            "kl_max": kl.values[-1],
            "top1_agreement": self.agreements / tokens,
            "perplexity": exp(fsum(self.nll) / tokens),
            "reference_perplexity": exp(fsum(self.reference_nll) / tokens),
        }


def measure(
    run: Run,
    quantizers: Mapping[str, Quantizer],
    emit: Callable[[QualityBegan | QualityMeasured], None],
    now_ns: int,
) -> None:
    """Compare quantizers with the unquantized model.

    Emits ``QualityBegan`` before any work.

    Args:
        run: its executor provides ``executor.quality``.
        quantizers: by label.
        emit: gets figures per quantizer, after every window or every few; the last of each stand.
        now_ns: time of the records; the clock of the run stands still meanwhile.

    Raises:
        ConfigError: the text gives not one window.
        ServeLabError: a model's logits are not numbers.
    """
    assert run.tokenizer is not None
    model = run.engine.model
    windows = evaluation_windows(run.tokenizer, run.config.quality, model.max_position)
    total = sum(len(window) - 1 for window in windows)
    dense = linear_bytes(model, None)
    stored = {label: linear_bytes(model, quantizer) for label, quantizer in quantizers.items()}
    tallies = {label: Tally() for label in quantizers}
    every = -(-len(windows) // RECORDS)
    emit(QualityBegan(t_ns=now_ns, labels=list(quantizers), total=total))
    log.info("measuring quality of %s on %s tokens of held-out text", ", ".join(quantizers), f"{total:,}")
    for i, compared in enumerate(run.executor.compare(quantizers, windows), 1):  # type: ignore[attr-defined]
        for label, one in compared.items():
            _check(label, one)
            tallies[label].add(one)
        if i % every and i < len(windows):
            continue
        for label in quantizers:
            emit(
                QualityMeasured(
                    t_ns=now_ns,
                    label=label,
                    total=total,
                    linear_bytes=stored[label],
                    reference_linear_bytes=dense,
                    **tallies[label].figures(),
                )
            )


def _check(label: str, window: Comparison) -> None:
    if isfinite(window.nll) and isfinite(window.reference_nll) and all(map(isfinite, window.kl)):
        return
    whose = f"quantizer {label!r}" if isfinite(window.reference_nll) else "the unquantized model"
    raise ServeLabError(
        f"{whose} gives logits that are not numbers",
        where="measuring quality",
        why="an overflow, a division by zero, or damaged weights",
        do="try model.dtype=float32 (with executor.kv_memory_mib twice as large); if it stays, mend the "
        "quantizer or fetch the weights again",
    )


def evaluation_windows(tokenizer: Tokenizer, config: QualityConfig, longest: int) -> list[list[int]]:
    """Windows of equal length, spread evenly over the text; together at most ``config.max_tokens`` tokens.

    Raises:
        ConfigError: the text, or the model's context, gives no window of two tokens.
    """
    ids = tokenizer.encode("\n\n".join(topic.text for topic in part(PART)))
    size = min(config.window, config.max_tokens, longest, len(ids))
    if size < 2:
        raise ConfigError(
            f"quality cannot be measured on windows of {size} tokens",
            where="quality.max_tokens, quality.window",
            why="the first token of a window is not predicted",
            do="raise them, or set quality.max_tokens=0 to measure nothing",
        )
    there = len(ids) // size
    wanted = min(there, config.max_tokens // size)
    starts = [i * there // wanted * size for i in range(wanted)]
    return [ids[start : start + size] for start in starts]


def describe() -> dict[str, Any]:
    """The text, for reports."""
    return {
        "source": "pydoc_data.topics",
        "python": platform.python_version(),
        "part": PART,
        "part_sha256": digest(PART),
    }

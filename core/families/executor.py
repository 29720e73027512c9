"""Executor: where a batch runs.

Intent: own the bytes. The engine decides what runs; the executor runs it and reports what came out. It
never decides when: on the virtual clock the cost model prices every launch, on the wall clock time passes.

Capabilities: ``executor.torch`` (real weights and tokens), ``executor.sim`` (prices only),
``executor.tokenizer`` (has an attribute ``tokenizer``, see ``core/text.py``, which the parts built after the
executor are given in their ``Context``),
``executor.quant`` (runs or prices quantized linears; is given the quantizer in its ``Context``),
``executor.quality`` (has the method of ``ComparingExecutor``),
``executor.simulated`` (launches take no time of their own; on the wall clock the driver waits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.engine.swap import Transfer
    from servelab.core.events import Batch
    from servelab.core.families.quant import Quantizer
    from servelab.core.layout import Capacity, KVLayout
    from servelab.core.plan import Outcome
    from servelab.core.quality import Comparison


class Executor(Protocol):
    """Runs launches. Called by the driver, never by policies; both executors honour the same contract."""

    simulated: bool
    """True if ``launch`` and ``transfer`` return at once and their time comes from the cost model."""

    def capacity(self, layout: KVLayout) -> Capacity:
        """Pages it can hold, per pool; called once, at composition."""
        ...

    def horizon(self, batch: Batch, max_steps: int) -> int:
        """Largest ``k <= max_steps`` such that no request of the batch finishes before step ``k``.

        Pure. Executors that cannot know return 1: a hold then runs as ``k`` launches of one step.
        """
        ...

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        """Run ``steps`` steps (``1 <= steps <= batch.steps``) and report one outcome per request.

        A request with ``batch.samples[i]`` yields exactly ``steps`` tokens (with drafts: ``accepted + 1``),
        others none. Called once per launch, in launch order per lane. What it reports for a request that
        ended or was preempted meanwhile is dropped.

        An executor that takes real time is called in a thread of the lane when launches go side by side or
        ahead of results: a launch may begin before the outcome of the one before it is booked, so what a
        ``Request`` counts may lag behind; what ``batch`` states does not.
        """
        ...

    def transfer(self, transfer: Transfer) -> None:
        """Move the pages of a transfer; returns when the bytes are in place."""
        ...

    def close(self) -> None:
        """Release everything. Called once, also after errors."""
        ...


class ComparingExecutor(Executor, Protocol):
    """With ``executor.quality``."""

    def compare(
        self, quantizers: Mapping[str, Quantizer], windows: Sequence[Sequence[int]]
    ) -> Iterator[Mapping[str, Comparison]]:
        """Each window run through the unquantized model and through each quantized one, from position 0.

        Args:
            quantizers: by label. The executor's own (``Context.quant``) is compared as it serves.
            windows: token ids, at least 2 each, within the model's context.

        Yields:
            Per window, how every quantizer did. Called between launches, before ``close``.
        """
        ...

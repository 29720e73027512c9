"""Synthetic open-loop traffic: lengths from laws, arrivals from a renewal process.

Technique: baseline. The arrival process is that of ``vllm bench serve`` (vllm-project/vllm,
``vllm/benchmarks/serve.py`` at 009e6d4), the ``zipf`` length law that of the Llumnix artifact (Sun et al.,
OSDI 2024, arXiv 2406.03243).

Mechanism: ``num_requests`` requests arrive with Gamma gaps, rescaled (unless told otherwise) so that the last
one is at exactly n/R. Prompt length, true output length, client cap, class and cancellation of each request
are drawn independently, each from its own stream: changing one law leaves every other quantity as it was.
Outputs are enforced and hidden: they are in ``Arrival.truth`` only, so a policy sees the cap and never the
length.

Symbols:
    R        ``request_rate``      requests per second
    g        ``burstiness``        shape of the gaps, CV = 1/sqrt(g); papers that quote a CV: g = 1/CV^2
    n        ``num_requests``
    a, b, p  ``ramp_up.start_rate``, ``ramp_up.end_rate``, (i - 1)/(n - 1) for the i-th request

Deviations from ``vllm bench serve``:
    1. Times are whole nanoseconds, and the last one is exact, not exact up to rounding.
    2. A ramp may also go down, which vLLM refuses; it must start above 0, which vLLM only asserts.
    3. Prompt ids are uniform over the whole vocabulary, special tokens included; lengths are exact.

Faithful when: the last arrival is n/R to the nanosecond; the CV of unscaled gaps is 1/sqrt(g); gaps of g = 1
are exponential; an infinite rate puts every request at 0; a ramp follows a + (b - a)p or a(b/a)^p and is
never rescaled; ``zipf`` reproduces the artifact's percentiles at its four published settings.

Tier: stable.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop
from random import Random
from typing import Any

from pydantic import Field

from servelab.core.api import Arrival, Cancel, Context
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._describe import arrival_statistics, json_settings, statistics
from servelab.plugins.workloads._labels import NS_PER_MS
from servelab.plugins.workloads._laws import LengthLaw, LogNormal
from servelab.plugins.workloads._population import Population
from servelab.plugins.workloads._requests import Requests
from servelab.plugins.workloads._traffic import Traffic


class SyntheticConfig(Requests, Traffic):
    """Settings of the ``synthetic`` workload. Defaults are ours, sized for a small model on a CPU."""

    cancel_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Chance that a client gives up if it has to wait too long."
    )
    patience_ms: LengthLaw = Field(
        default=LogNormal(median=10_000, sigma=1.0, min=1, max=3_600_000),
        description="Law of how long such a client waits after arriving before it cancels, ms.",
    )


class Synthetic:
    """Open-loop traffic from laws.

    State: one column of whole numbers per quantity, drawn once at construction; ``arrivals()`` only reads
    them, so it may be called again. Token ids are made as requests are yielded. Costs O(n) to construct.

    Raises:
        WorkloadError: a request would be longer than the model allows.
    """

    def __init__(self, config: SyntheticConfig, ctx: Context) -> None:
        self._config = config
        self._vocab = ctx.model.vocab
        # drawn once, so that every stream below can be restarted
        self._root = ctx.rng.getrandbits(64)

        self._times = config.times_ns(self._stream("arrival"))
        self._requests = Population(config, config.samples, self._stream, ctx)
        self._requests.extend(config.num_requests, self._times.__getitem__)
        self._patience_ms = self._column("patience", config.patience_ms)
        gives_up = self._stream("cancel").random
        self._cancels = [i for i in range(config.num_requests) if gives_up() < config.cancel_fraction]

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """Requests and cancellations in time order; at the same time, cancellations first."""
        requests, prompt_ids = self._requests, self._prompt_ids()
        pending = [(self._times[i] + self._patience_ms[i] * NS_PER_MS, i) for i in self._cancels]
        heapify(pending)
        for i, time_ns in enumerate(self._times):
            while pending and pending[0][0] <= time_ns:
                yield _cancel(heappop(pending))
            yield Arrival(time_ns, requests.spec(i, _id(i), next(prompt_ids)), requests.truth(i))
        while pending:
            yield _cancel(heappop(pending))

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """Nothing: the loop is open."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Sample statistics and every setting, ready for JSON. See the workload's page for the keys."""
        return {
            **arrival_statistics(self._times),
            **self._requests.describe(),
            "turns": 1,
            "cancellations": len(self._cancels),
            "patience_ms": statistics([self._patience_ms[i] for i in self._cancels]),
            "settings": json_settings(self._config),
        }

    def _stream(self, quantity: str) -> Random:
        """The generator of one quantity, at its start; independent of every other quantity's."""
        return Random(f"{self._root}/{quantity}")

    def _column(self, quantity: str, law: LengthLaw) -> array[int]:
        sample, uniform = law.sampler(), self._stream(quantity).random
        return array("q", [sample(uniform()) for _ in range(self._config.num_requests)])

    def _prompt_ids(self) -> Iterator[tuple[int, ...] | None]:
        """Token ids of each request in turn."""
        shared, vocab = self._config.prefix_tokens, self._vocab
        if not self._config.with_prompt_ids:
            yield from [None] * len(self._requests.prompts)
            return
        prefix, rng = uniform_ids(shared, vocab, self._stream("prefix")), self._stream("tokens")
        for length in self._requests.prompts:
            yield prefix + uniform_ids(length - shared, vocab, rng)


def uniform_ids(n: int, vocab: int, rng: Random) -> tuple[int, ...]:
    """``n`` token ids, uniform over ``[0, vocab)`` up to one part in ``2**32 / vocab``."""
    return tuple([x * vocab >> 32 for x in struct.unpack(f"<{n}I", rng.randbytes(4 * n))])


def _id(index: int) -> str:
    return f"r{index}"


def _cancel(due: tuple[int, int]) -> Cancel:
    time_ns, index = due
    return Cancel(time_ns, _id(index))

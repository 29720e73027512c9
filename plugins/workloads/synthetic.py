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
from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop
from random import Random
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.core.api import SLO, Arrival, Cancel, Context, RequestSpec, Truth, WorkloadError
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._describe import arrival_statistics, json_settings, statistics
from servelab.plugins.workloads._laws import Constant, LengthLaw, LogNormal, chooser
from servelab.plugins.workloads._traffic import Traffic

NS_PER_MS = 1_000_000


class RequestClass(BaseModel):
    """A share of the requests, with its own tenant, priority and bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="Value of the requests' ``request_class``.")
    weight: float = Field(
        default=1.0, gt=0, le=1e9, description="Its share is this over the sum of all weights. Ours."
    )
    tenant: str = Field(default="default", min_length=1, description="Who pays. Ours.")
    priority: int = Field(default=0, description="Higher is more important. Ours.")
    ttft_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Bound on time to first token, ms."
    )
    tpot_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Bound on time per output token, ms."
    )
    e2el_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Bound on end-to-end latency, ms."
    )

    tbt_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Bound on every gap between tokens, ms."
    )

    def slo(self) -> SLO | None:
        """The bounds in nanoseconds, or None if it states none."""
        bounds = SLO(
            ttft_ns=_ns(self.ttft_ms),
            tpot_ns=_ns(self.tpot_ms),
            e2el_ns=_ns(self.e2el_ms),
            tbt_ns=_ns(self.tbt_ms),
        )
        return None if bounds == SLO() else bounds


class SyntheticConfig(Traffic):
    """Settings of the ``synthetic`` workload. Defaults are ours, sized for a small model on a CPU."""

    prompt_length: LengthLaw = Field(
        default=LogNormal(median=128, sigma=0.6, min=16, max=1024),
        description="Law of the prompt length in tokens, without the shared prefix.",
    )
    output_length: LengthLaw = Field(
        default=LogNormal(median=64, sigma=0.7, min=1, max=512),
        description="Law of the true output length in tokens: enforced, and hidden from policies.",
    )
    max_new_tokens: LengthLaw = Field(
        default=Constant(value=1024),
        description="Law of the client's cap in tokens, independent of the true length. An output above its "
        "cap is cut there and ends with reason 'length'; ``describe`` counts them as ``length_capped``.",
    )

    with_prompt_ids: bool = Field(
        default=True, description="Give prompts token ids, which executors that run a model need."
    )
    prefix_tokens: int = Field(
        default=0,
        ge=0,
        le=100_000_000,
        description="Tokens at the start of every prompt that all requests share, on top of prompt_length.",
    )

    classes: tuple[RequestClass, ...] = Field(
        default=(), description="Mixture of classes; empty: all requests of class 'online', without bounds."
    )

    cancel_fraction: float = Field(
        default=0.0, ge=0, le=1, description="Chance that a client gives up if it has to wait too long."
    )
    patience_ms: LengthLaw = Field(
        default=LogNormal(median=10_000, sigma=1.0, min=1, max=3_600_000),
        description="Law of how long such a client waits after arriving before it cancels, ms.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prefix_tokens and not self.with_prompt_ids:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} cannot be shared without token ids: "
                "set with_prompt_ids to true, or prefix_tokens to 0"
            )
        if self.max_new_tokens.highest < self.output_length.lowest:
            raise ValueError(
                f"every request would be cut: max_new_tokens is at most {self.max_new_tokens.highest}, "
                f"output_length at least {self.output_length.lowest}: raise the first or lower the second"
            )
        groups = Counter((c.name, c.tenant) for c in self.classes)
        (name, tenant), times = max(groups.items(), key=lambda kv: kv[1], default=(("", ""), 0))
        if times > 1:
            raise ValueError(
                f"class {name!r} of tenant {tenant!r} is listed {times} times: merge them or rename one"
            )
        return self


class Synthetic:
    """Open-loop traffic from laws.

    State: one column of whole numbers per quantity, drawn once at construction; ``arrivals()`` only reads
    them, so it may be called again. Token ids are made as requests are yielded. Costs O(n) to construct.

    Raises:
        WorkloadError: a request would be longer than the model allows.
    """

    def __init__(self, config: SyntheticConfig, ctx: Context) -> None:
        self._config = config
        self._where = f"workload {ctx.name!r}"
        self._vocab = ctx.model.vocab
        # drawn once, so that every stream below can be restarted
        self._root = ctx.rng.getrandbits(64)
        self._classes = config.classes or (RequestClass(name="online"),)

        n = config.num_requests
        self._times = config.times_ns(self._stream("arrival"))
        drawn = self._column("prompt", config.prompt_length)
        self._prompts = array("q", [config.prefix_tokens + length for length in drawn])
        self._outputs = self._column("output", config.output_length)
        self._caps = self._column("cap", config.max_new_tokens)
        choose, pick = chooser([c.weight for c in self._classes]), self._stream("class").random
        self._class_of = array("q", [choose(pick()) for _ in range(n)])
        self._patience_ms = self._column("patience", config.patience_ms)
        gives_up = self._stream("cancel").random
        self._cancels = [i for i in range(n) if gives_up() < config.cancel_fraction]
        self._check_lengths(ctx.limits.max_model_len, ctx.model.max_position)

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """Requests and cancellations in time order; at the same time, cancellations first."""
        slos = [c.slo() for c in self._classes]
        prompt_ids = self._prompt_ids()
        pending = [(self._times[i] + self._patience_ms[i] * NS_PER_MS, i) for i in self._cancels]
        heapify(pending)
        for i, time_ns in enumerate(self._times):
            while pending and pending[0][0] <= time_ns:
                yield _cancel(heappop(pending))
            which = self._class_of[i]
            request_class = self._classes[which]
            spec = RequestSpec(
                id=_id(i),
                prompt_tokens=self._prompts[i],
                max_new_tokens=self._caps[i],
                prompt_ids=next(prompt_ids),
                tenant=request_class.tenant,
                request_class=request_class.name,
                priority=request_class.priority,
                slo=slos[which],
            )
            yield Arrival(time_ns, spec, Truth(self._outputs[i]))
        while pending:
            yield _cancel(heappop(pending))

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """Nothing: the loop is open."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Sample statistics and every setting, ready for JSON. See the workload's page for the keys."""
        config, prompt_total = self._config, sum(self._prompts)
        return {
            **arrival_statistics(self._times),
            "prompt_tokens": statistics(self._prompts),
            "output_tokens": statistics(self._outputs),
            "max_new_tokens": statistics(self._caps),
            "length_capped": sum(o > c for o, c in zip(self._outputs, self._caps, strict=True)),
            "shared_prefix_share": config.prefix_tokens * (len(self._prompts) - 1) / prompt_total,
            "turns": 1,
            "cancellations": len(self._cancels),
            "patience_ms": statistics([self._patience_ms[i] for i in self._cancels]),
            "classes": self._class_counts(),
            "settings": json_settings(config),
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
            yield from [None] * len(self._prompts)
            return
        prefix, rng = uniform_ids(shared, vocab, self._stream("prefix")), self._stream("tokens")
        for length in self._prompts:
            yield prefix + uniform_ids(length - shared, vocab, rng)

    def _class_counts(self) -> list[dict[str, Any]]:
        counts = Counter(self._class_of)
        return [
            {"name": c.name, "tenant": c.tenant, "requests": counts[k]} for k, c in enumerate(self._classes)
        ]

    def _check_lengths(self, limit: int, max_position: int) -> None:
        """What a request really takes is its prompt and the output it is allowed."""
        config = self._config
        for i, (prompt, output, cap) in enumerate(zip(self._prompts, self._outputs, self._caps, strict=True)):
            served = min(output, cap)
            if prompt + served <= limit:
                continue
            longest_output = min(config.output_length.highest, config.max_new_tokens.highest)
            longest = config.prefix_tokens + config.prompt_length.highest + longest_output
            prefix = f" with {config.prefix_tokens} of prefix_tokens" if config.prefix_tokens else ""
            if limit < max_position:
                otherwise = f"raise engine.max_model_len (the model allows {max_position})"
            else:
                otherwise = "choose a model with a longer context"
            raise WorkloadError(
                f"request {_id(i)} is longer than the model allows",
                where=f"{self._where}, prompt_length {config.prompt_length}, "
                f"output_length {config.output_length}",
                why=f"prompt of {prompt} tokens{prefix} plus {served} of output is {prompt + served}, "
                f"limit {limit} (max_model_len)",
                do=f"these laws reach {longest} tokens: lower them to {limit} together (max of prompt_length "
                f"and output_length, or their values), or {otherwise}",
            )


def uniform_ids(n: int, vocab: int, rng: Random) -> tuple[int, ...]:
    """``n`` token ids, uniform over ``[0, vocab)`` up to one part in ``2**32 / vocab``."""
    return tuple([x * vocab >> 32 for x in struct.unpack(f"<{n}I", rng.randbytes(4 * n))])


def _id(index: int) -> str:
    return f"r{index}"


def _cancel(due: tuple[int, int]) -> Cancel:
    time_ns, index = due
    return Cancel(time_ns, _id(index))


def _ns(ms: float | None) -> int | None:
    return None if ms is None else round(ms * NS_PER_MS)

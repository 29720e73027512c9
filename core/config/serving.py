"""Sections on how a run serves: limits of the engine, instances, bounds of requests, time, quality."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from servelab.core.config.section import Section
from servelab.core.request import SLO


class EngineConfig(Section):
    """Limits of the device and how closely the engine checks its plugins."""

    max_batch_tokens: int = Field(
        default=8192, ge=1, description="Tokens one launch may run per step, drafts included."
    )
    max_batch_requests: int = Field(default=1024, ge=1, description="Requests one launch may name.")
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Prompt plus output tokens of one request; null: the model's max_position.",
    )
    lanes: int = Field(default=1, ge=1, description="Batches the device runs side by side.")
    max_in_flight: int = Field(
        default=1, ge=1, description="Launches queued per lane; 2 lets the scheduler plan one step ahead."
    )
    checks: Literal["basic", "full"] = Field(
        default="basic",
        description="full also checks the KV ledger's integrity and the lifetime of views; slower.",
    )


class SLOBounds(Section):
    """Bounds on one request, inclusive; null: not bounded."""

    ttft_ms: float | None = Field(default=None, gt=0, description="Time to first token, in milliseconds.")
    tpot_ms: float | None = Field(
        default=None, gt=0, description="Mean time per output token after the first, in milliseconds."
    )
    e2el_ms: float | None = Field(default=None, gt=0, description="End-to-end latency, in milliseconds.")
    tbt_ms: float | None = Field(
        default=None,
        gt=0,
        description="Longest time between two tokens of the request: every gap, in milliseconds.",
    )

    def bounds(self) -> SLO | None:
        """In nanoseconds; None if nothing is bounded."""
        ms = (self.ttft_ms, self.tpot_ms, self.e2el_ms, self.tbt_ms)
        ttft, tpot, e2el, tbt = (None if one is None else round(one * 1e6) for one in ms)
        slo = SLO(ttft_ns=ttft, tpot_ns=tpot, e2el_ns=e2el, tbt_ns=tbt)
        return None if slo == SLO() else slo


class SLOConfig(SLOBounds):
    """Bounds that goodput counts, for requests that state none of their own; null: not bounded."""

    classes: dict[str, SLOBounds] = Field(
        default={},
        description="Bounds by request class, such as {online: {ttft_ms: 250}, offline: {}}. They stand "
        "instead of the ones above, which hold for classes that are not named here.",
    )


class ClockConfig(Section):
    """Who owns time."""

    name: Literal["virtual", "wall"] = Field(
        default="virtual",
        description="virtual: the cost model prices every launch, runs repeat bit by bit; wall: time passes.",
    )


class ClusterConfig(Section):
    """Instances behind a router: each has its own engine, KV memory, and state of its policies."""

    instances: int = Field(default=1, ge=1, le=4096, description="Instances there are at the start.")
    max_instances: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Instances there may be at a time; null: as many as at the start.",
    )
    report_interval_ms: float = Field(
        default=0.0,
        ge=0,
        description="Time between the reports that the router sees of each instance, in milliseconds; 0: an "
        "instance reports at once whatever happens to it.",
    )
    network_gb_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth of each instance's network link, one way, in 1e9 bytes per second; null: "
        "hardware.network_bytes_per_s.",
    )
    network_latency_us: float = Field(
        default=10.0,
        ge=0,
        description="Time of a transfer between instances besides its bytes, in microseconds. The default is "
        "a round figure of ours.",
    )
    start_s: float | None = Field(
        default=None,
        ge=0,
        description="Time until a new instance is ready, in seconds; null: what the cost model says it takes "
        "to load the weights.",
    )

    @model_validator(mode="after")
    def _at_most(self) -> Self:
        if self.max_instances is not None and self.max_instances < self.instances:
            raise ValueError(f"max_instances must be at least instances, {self.instances}")
        return self


class QualityConfig(Section):
    """How quantized models are compared with the unquantized one."""

    max_tokens: int = Field(
        default=8192,
        ge=0,
        description="Tokens of held-out text that a quantized run reads through both models after serving, "
        "at most; 0: quality is not measured.",
    )
    window: int = Field(
        default=1024,
        ge=16,
        description="Tokens read at a time, none before them in sight; the model's context if that is less.",
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.max_tokens == 1:
            raise ValueError(
                "max_tokens is 0 (measure nothing) or at least 2: the first token is not predicted"
            )
        return self

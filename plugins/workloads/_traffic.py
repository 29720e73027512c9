"""Settings that open-loop workloads share: how many requests, and when they come."""

from __future__ import annotations

import math
from random import Random
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.plugins.workloads._arrivals import (
    MIN_RATE,
    OnOff,
    Process,
    RampUp,
    Windows,
    arrival_times_ns,
)


class Traffic(BaseModel):
    """Base of the settings of open-loop workloads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_requests: int = Field(default=64, ge=1, le=10_000_000, description="How many requests, n.")

    request_rate: float = Field(
        default=8.0, ge=MIN_RATE, description="R in requests/s; inf: all at time 0 (vLLM's default)."
    )
    process: Process = Field(
        default="poisson",
        description="Gaps between arrivals: exponential, Gamma or Weibull with shape ``burstiness``, or all "
        "equal.",
    )
    burstiness: float = Field(
        default=1.0,
        ge=1e-3,
        description="Shape of process 'gamma', CV = 1/sqrt(g), or 'weibull': below 1 burstier than Poisson, "
        "above 1 more even, inf equal gaps. vLLM's default.",
    )
    normalize_arrivals: bool = Field(
        default=True,
        description="Rescale times so that the last arrival is at exactly n/R, as vLLM does. False keeps the "
        "gaps independent. A ramp-up is never rescaled.",
    )
    ramp_up: RampUp | None = Field(
        default=None,
        description="Let the rate change from request to request; needs request_rate=inf, as in vLLM.",
    )

    on_off: OnOff | None = Field(
        default=None, description="Busy and quiet times take turns; request_rate is the mean over both."
    )
    windows: Windows | None = Field(
        default=None,
        description="Rate and burstiness by stretches of time, again and again; needs request_rate=inf. "
        "Never rescaled.",
    )

    samples: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Outputs drawn from each prompt, the client's n; they share its KV. Their true lengths "
        "are drawn one by one.",
    )

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if self.process not in ("gamma", "weibull") and self.burstiness != 1.0:
            raise ValueError(
                f"burstiness={self.burstiness:g} has no effect on process {self.process!r}: "
                "set process to 'gamma' or 'weibull', or leave burstiness at 1"
            )
        if self.process == "weibull" and self.burstiness < 0.05:
            raise ValueError(f"burstiness={self.burstiness:g} makes Weibull gaps of no use: at least 0.05")
        stated = [name for name in ("ramp_up", "windows", "on_off") if getattr(self, name) is not None]
        if len(stated) > 1:
            raise ValueError(f"{' and '.join(stated)} all say how the rate changes: keep one of them")
        if stated and stated != ["on_off"] and not math.isinf(self.request_rate):
            raise ValueError(
                f"both {stated[0]} and request_rate={self.request_rate:g} state the rate: "
                f"set request_rate to inf, or remove {stated[0]}"
            )
        if stated == ["on_off"] and math.isinf(self.request_rate):
            raise ValueError("on_off needs a mean rate: request_rate is inf")
        if self.windows and self.burstiness != 1.0:
            raise ValueError("windows state their own burstiness: leave the workload's at 1")
        return self

    @property
    def shape(self) -> float:
        """Shape of the gaps under any process."""
        return math.inf if self.process == "constant" else self.burstiness

    def times_ns(self, rng: Random) -> list[int]:
        """When the requests arrive, in nanoseconds from the start of the run, never decreasing."""
        return arrival_times_ns(
            self.num_requests,
            rng,
            rate=self.ramp_up or self.windows or self.request_rate,
            burstiness=self.shape,
            normalize=self.normalize_arrivals,
            process=self.process,
            on_off=self.on_off,
        )

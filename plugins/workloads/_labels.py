"""Whose a request is and what it may take: settings, and their application to requests that others made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import SLO, RequestSpec

NS_PER_MS = 1_000_000


class Bounds(BaseModel):
    """Bounds that a request should meet."""

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

    def slo(self, scale: float = 1.0) -> SLO | None:
        """The bounds in nanoseconds, times a scale, or None if it states none."""
        bounds = SLO(
            ttft_ns=_ns(self.ttft_ms, scale),
            tpot_ns=_ns(self.tpot_ms, scale),
            e2el_ns=_ns(self.e2el_ms, scale),
            tbt_ns=_ns(self.tbt_ms, scale),
        )
        return None if bounds == SLO() else bounds


class Labels(Bounds):
    """What is said of requests that another workload sends; null: as that workload says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_class: str | None = Field(default=None, min_length=1, description="Their class.")
    tenant: str | None = Field(default=None, min_length=1, description="Who pays.")
    priority: int | None = Field(default=None, description="Higher is more important.")

    def changes(self) -> dict[str, Any]:
        """Fields of ``RequestSpec`` that are set."""
        stated = {name: getattr(self, name) for name in ("request_class", "tenant", "priority")}
        return {name: value for name, value in {**stated, "slo": self.slo()}.items() if value is not None}

    def on(self, spec: RequestSpec) -> RequestSpec:
        """A request with these labels."""
        changes = self.changes()
        return replace(spec, **changes) if changes else spec


def _ns(ms: float | None, scale: float) -> int | None:
    return None if ms is None else round(ms * scale * NS_PER_MS)

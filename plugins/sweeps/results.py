"""One job's ``results.json``: the figures that a comparison shows, under the names they have there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servelab.core.api import ServeLabError
from servelab.core.run_folder import RESULTS_FILE

EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure to compare."""

    key: str
    """Its path in ``results.json``, where lists and mappings are reduced as ``figure`` says."""
    group: str
    """Heading above it; that of neighbours may be the same."""
    label: str
    unit: str
    better: int = 0
    """1: higher is better, -1: lower is; 0: neither."""
    digits: int = 0
    scale: float = 1.0
    """Shown are figures times this."""
    always: bool = True
    """False: only where some job has it."""

    def shown(self, value: float) -> float:
        """A figure as precisely as it is shown: what looks alike counts as alike."""
        return round(value * self.scale, self.digits)

    @property
    def name(self) -> str:
        """In full, with its unit."""
        return f"{self.group} {self.label}".strip() + (f" ({self.unit})" if self.unit else "")


METRICS = (
    Metric("completed", "requests", "done", ""),
    Metric("output_throughput", "output", "tok/s", "", 1, 1),
    Metric("request_goodput", "goodput", "req/s", "", 1, 3, always=False),
    Metric("servelab.slo_attainment", "SLO", "met %", "", 1, 1, 100, always=False),
    Metric("mean_ttft_ms", "TTFT", "mean", "ms", -1, 1),
    Metric("p99_ttft_ms", "TTFT", "p99", "ms", -1, 1, always=False),
    Metric("mean_tpot_ms", "TPOT", "mean", "ms", -1, 2),
    Metric("p99_tpot_ms", "TPOT", "p99", "ms", -1, 2, always=False),
    Metric("mean_e2el_ms", "E2E", "mean", "ms", -1, 0),
    Metric("p99_e2el_ms", "E2E", "p99", "ms", -1, 0, always=False),
    Metric("servelab.preemptions", "preemptions", "", "", -1),
    Metric("servelab.kv_peak_use", "KV", "peak %", "", 0, 0, 100),
    Metric("servelab.kl_mean", "quality", "KL", "nats", -1, 4, always=False),
)
"""Keys that are no path in ``results.json``: ``kv_peak_use``, of the fullest pool; ``kl_mean``, of the job's
quantizer."""


def read_results(folder: Path) -> Mapping[str, Any] | None:
    """The results of a job; None where it has none.

    Raises:
        ServeLabError: the file is no result of ours.
    """
    path = folder / RESULTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["servelab"]["run"]["status"], found["servelab"]["kv_pages"], found["servelab"]["stamps"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return found  # type: ignore[no-any-return]


def _unreadable(path: Path, error: Exception) -> ServeLabError:
    return ServeLabError(
        f"{path.name} cannot be read",
        where=str(path),
        why=f"{type(error).__name__}: {error}",
        do="remove the job's folder, and run the sweep again to fill it",
    )


def figure(results: Mapping[str, Any], metric: Metric) -> float | None:
    """The figure of a metric; None where it was not measured."""
    extra = results["servelab"]
    key = metric.key.removeprefix("servelab.")
    if key == metric.key:
        value = results.get(key)
    elif key == "kv_peak_use":
        shares = [pool["peak_use"] for pool in extra["kv_pages"] if pool.get("peak_use") is not None]
        value = max(shares, default=None)
    elif key == "kl_mean":
        compared = list((extra.get("quality") or {}).values())
        value = compared[0].get("kl_mean") if len(compared) == 1 else None
    else:
        value = extra.get(key)
    return value


def read_columns(folder: Path) -> Mapping[Metric, float | None]:
    """The figures that a job's task names for comparison, in its order; none where it names none.

    Raises:
        ServeLabError: the file is none of ours.
    """
    path = folder / EXPERIMENT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("columns", [])
        return {
            Metric(
                f"task.{one['name']}",
                one["name"],
                one["label"],
                "",
                one["better"],
                one["digits"],
                always=False,
            ): one["value"]
            for one in found
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def stamps(results: Mapping[str, Any]) -> list[str]:
    """What restricts how a run may be read, such as an oracle."""
    return list(results["servelab"]["stamps"])


def ending(results: Mapping[str, Any]) -> tuple[str, str]:
    """Status and reason of a run."""
    run = results["servelab"]["run"]
    return run["status"], run.get("reason") or ""

"""What a workload sends, counted from its arrivals: any workload, whatever it says of itself."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from servelab.core.api import Arrival, Cancel
from servelab.core.metrics import Distribution

NS = 1_000_000_000
WINDOW_S = 60
"""Length of the windows in which papers state burstiness."""
MIN_WINDOW_GAPS = 10
"""A window with fewer gaps says nothing about their variation."""
QUANTILES = (10, 50, 90, 99)


class Traffic:
    """Columns and counts of all arrivals.

    Args:
        items: of ``Workload.arrivals()``.
    """

    def __init__(self, items: Iterable[Arrival | Cancel]) -> None:
        self.times = array("q")
        """ns."""
        self.prompts, self.caps = array("q"), array("q")
        self.outputs, self.asked = array("q"), array("q")
        """True lengths, where they are known, and the prompts that they answer."""
        self.cancellations = 0
        self.classes: Counter[tuple[str, str, int]] = Counter()
        """Requests by class, tenant and priority."""
        self.programs: Counter[str] = Counter()
        self.with_slo = self.with_ids = self.samples = self.capped = 0
        for item in items:
            if isinstance(item, Cancel):
                self.cancellations += 1
                continue
            self._add(item)

    def _add(self, arrival: Arrival) -> None:
        spec = arrival.spec
        self.times.append(arrival.time_ns)
        self.prompts.append(spec.prompt_tokens)
        self.caps.append(spec.max_new_tokens)
        self.classes[spec.request_class, spec.tenant, spec.priority] += 1
        self.samples += spec.n
        self.with_slo += spec.slo is not None
        self.with_ids += spec.prompt_ids is not None
        if spec.program is not None:
            self.programs[spec.program] += 1
        if arrival.truth is not None:
            for sample in range(spec.n):
                length = arrival.truth.of(sample).output_tokens
                self.outputs.append(length)
                self.asked.append(spec.prompt_tokens)
                self.capped += length > spec.max_new_tokens

    def figures(self) -> dict[str, Any]:
        """Everything counted, ready for JSON; None where there is nothing to say."""
        last_ns = self.times[-1] if self.times else 0
        gaps = array("q", (after - before for before, after in pairwise(self.times)))
        windows = windowed_cv(self.times)
        return {
            "requests": len(self.times),
            "duration_s": last_ns / NS,
            "requests_per_s": len(self.times) * NS / last_ns if last_ns else None,
            "iat_cv": cv(Distribution.of(gaps)),
            "iat_cv_60s": {
                "windows": windows.count,
                "p50": windows.percentile(50),
                "p90": windows.percentile(90),
            },
            "prompt_tokens": spread(self.prompts),
            "output_tokens": spread(self.outputs),
            "max_new_tokens": spread(self.caps),
            "length_capped": self.capped,
            "prompt_output_correlation": correlation(self.asked, self.outputs),
            "samples_per_request": self.samples / len(self.times) if self.times else None,
            "cancellations": self.cancellations,
            "with_slo": self.with_slo,
            "with_prompt_ids": self.with_ids,
            "classes": [
                {"name": name, "tenant": tenant, "priority": priority, "requests": n}
                for (name, tenant, priority), n in self.classes.most_common()
            ],
            "programs": len(self.programs),
            "turns": spread(self.programs.values()),
        }

    def rates(self, windows: int) -> tuple[float, list[float]]:
        """Length of a window in seconds, and requests/s in each of that many equal ones."""
        last_ns = self.times[-1] if self.times else 0
        if not last_ns:
            return 0.0, []
        counts = [0] * windows
        for time_ns in self.times:
            counts[min(time_ns * windows // last_ns, windows - 1)] += 1
        window_s = last_ns / windows / NS
        return window_s, [count / window_s for count in counts]


def spread(values: Iterable[int]) -> dict[str, float] | None:
    """Mean, population CV, percentiles by linear interpolation, extremes and sum; None of nothing."""
    found = Distribution.of(values)
    mean = found.mean()
    if mean is None:
        return None
    return {
        "mean": mean,
        "cv": cv(found) or 0.0,
        "min": found.values[0],
        **{f"p{q}": found.percentile(q) or 0.0 for q in QUANTILES},
        "max": found.values[-1],
        "total": sum(v * n for v, n in zip(found.values, found.counts, strict=True)),
    }


def cv(found: Distribution) -> float | None:
    """Population standard deviation over the mean; None of nothing and of a mean of 0."""
    mean, std = found.mean(), found.std()
    return std / mean if mean and std is not None else None


def windowed_cv(times: array[int]) -> Distribution:
    """CV of the gaps inside each 60 s window with enough of them."""
    inside: dict[int, list[int]] = {}
    for before, after in pairwise(times):
        window = after // (WINDOW_S * NS)
        if before // (WINDOW_S * NS) == window:
            inside.setdefault(window, []).append(after - before)
    values = (cv(Distribution.of(gaps)) for gaps in inside.values() if len(gaps) >= MIN_WINDOW_GAPS)
    return Distribution.of(value for value in values if value is not None)


def correlation(a: array[int], b: array[int]) -> float | None:
    """Pearson's; None where one of them does not vary."""
    n = len(a)
    if n < 2:
        return None
    mean_a, mean_b = sum(a) / n, sum(b) / n
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    squares = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return float(top / squares**0.5) if squares else None

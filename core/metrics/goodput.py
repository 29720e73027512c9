"""Judging requests against the bounds they state: goodput and attainment.

A request is judged *good* or *missed*, or stays *undecided* and is left out of attainment:

- completed: good if every stated metric is at most its bound (inclusive), else missed;
- failed, or aborted by a policy: missed;
- rejected: missed, unless asked otherwise (then undecided);
- cancelled by its client, or cut off by the end of the run: missed if a bound on TTFT, E2EL or the gap
  between tokens was already broken at that moment, else undecided. It is never good.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from servelab.core.metrics.timeline import RequestFacts

METRICS = ("ttft", "tpot", "e2el", "tbt")
"""Metrics that can be bounded: those of vLLM's ``--goodput``, and the longest gap between tokens."""


def judge(facts: RequestFacts, now_ns: int, *, rejections_are_misses: bool = True) -> dict[str, bool | None]:
    """Per stated metric: met, missed, or undecided (None). Empty for a request that states no bound.

    Args:
        facts: the request.
        now_ns: end of the log, for requests still open.
        rejections_are_misses: count a rejection as a miss of everything stated.
    """
    state, bounds = facts.state, facts.bounds
    if state == "completed":
        return {metric: _at_most(getattr(facts, f"{metric}_ns"), bound) for metric, bound in bounds.items()}
    if state in ("failed", "aborted") or (state == "rejected" and rejections_are_misses):
        return dict.fromkeys(bounds, False)
    if state == "rejected":
        return dict.fromkeys(bounds, None)
    end = now_ns if facts.ended_ns is None else facts.ended_ns
    return {metric: None if _open(facts, metric, bound, end) else False for metric, bound in bounds.items()}


def _at_most(value: float | None, bound: int) -> bool:
    return value is not None and value <= bound


def _open(facts: RequestFacts, metric: str, bound: int, end_ns: int) -> bool:
    """Whether the bound of a request that did not complete could still have been met at ``end_ns``."""
    if metric == "tpot":
        return True
    if metric == "tbt":
        return max(facts.tbt_ns, 0 if facts.last_chunk_ns is None else end_ns - facts.last_chunk_ns) <= bound
    waited = end_ns - facts.arrival_ns
    if metric == "ttft" and facts.ttft_ns is not None:
        waited = facts.ttft_ns
    return waited <= bound


@dataclass(slots=True)
class Tally:
    """Good among judged."""

    good: int = 0
    judged: int = 0

    def add(self, verdict: bool | None) -> None:
        if verdict is not None:
            self.good += verdict
            self.judged += 1

    @property
    def attainment(self) -> float | None:
        """good / judged; None if nothing was judged."""
        return self.good / self.judged if self.judged else None


@dataclass(slots=True)
class Verdicts:
    """Over some requests."""

    total: Tally = field(default_factory=Tally)
    by_metric: dict[str, Tally] = field(default_factory=dict)
    """Those that some request bounds."""
    good_tokens: int = 0
    """Output tokens of good requests."""

    def add(self, verdicts: Mapping[str, bool | None], output_tokens: int) -> None:
        """Take in one request."""
        for metric, met in verdicts.items():
            self.by_metric.setdefault(metric, Tally()).add(met)
        verdict = overall(verdicts.values())
        self.total.add(verdict)
        if verdict:
            self.good_tokens += output_tokens

    def attainment_by_metric(self) -> dict[str, float | None]:
        """In the order of ``METRICS``."""
        return {m: self.by_metric[m].attainment for m in METRICS if m in self.by_metric}


@dataclass(slots=True)
class Goodput(Verdicts):
    """Verdicts of a run."""

    stated: bool = False
    """Whether any request states a bound."""
    by_class: dict[str, Verdicts] = field(default_factory=dict)


def overall(verdicts: Iterable[bool | None]) -> bool | None:
    """A miss of one metric is a miss; otherwise one undecided metric leaves the request undecided."""
    found = set(verdicts)
    if False in found:
        return False
    return None if None in found else True


def judge_all(
    requests: Iterable[RequestFacts], now_ns: int, *, rejections_are_misses: bool = True
) -> Goodput:
    """Judge every request that states a bound."""
    out = Goodput()
    for facts in requests:
        if not facts.bounds:
            continue
        out.stated = True
        verdicts = judge(facts, now_ns, rejections_are_misses=rejections_are_misses)
        out.add(verdicts, facts.output_tokens)
        out.by_class.setdefault(facts.request_class, Verdicts()).add(verdicts, facts.output_tokens)
    return out

"""Workload: the traffic.

Intent: say who asks what and when, reproducibly, and keep the truth (output lengths) away from policies.

Capabilities: ``workload.closed_loop`` (reacts to completions), ``workload.programs`` (multi-turn),
``workload.prompt_ids`` (real token ids, needed by executors that run a model), ``workload.truth``
(carries output lengths, needed by executors that do not).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from servelab.core.records import RequestFinished
    from servelab.core.request import Arrival, Cancel


class Workload(Protocol):
    """Pure in its seed: the same seed gives the same requests, byte for byte."""

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """Requests and cancellations in time order, lazily; each call begins anew and gives the same. Ids are
        unique over the run.
        """
        ...

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """What follows from a terminal record, at or after its time; empty for open-loop workloads."""
        ...

    def describe(self) -> dict[str, Any]:
        """Statistics and settings for the run card: requests, length laws, arrival process."""
        ...

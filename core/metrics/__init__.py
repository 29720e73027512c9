"""Definitions: event log -> numbers. The glossary is ``docs/reference/metrics.md``.

``Timeline`` keeps the facts, ``definitions`` and ``distribution`` hold the formulas, ``goodput`` judges
requests against their bounds, ``summarize`` puts all of it into one flat dict.
"""

from servelab.core.errors import LogError
from servelab.core.metrics.distribution import Distribution
from servelab.core.metrics.summary import RESULT_SCHEMA, SummaryOptions, summarize
from servelab.core.metrics.timeline import RequestFacts, Timeline

__all__ = [
    "RESULT_SCHEMA",
    "Distribution",
    "LogError",
    "RequestFacts",
    "SummaryOptions",
    "Timeline",
    "summarize",
]

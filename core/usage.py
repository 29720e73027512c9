"""What a run costs in the real world, whatever its own clock says. Only the last record holds it."""

from __future__ import annotations

import resource
import sys
from datetime import datetime
from time import monotonic
from typing import TypedDict

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit of ``ru_maxrss``: macOS counts bytes, Linux and the BSDs KiB."""


class Cost(TypedDict):
    """Fields of ``RunFinished``."""

    date: str
    wall_s: float
    peak_rss_bytes: int


class Usage:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._date, self._start = datetime.now(), monotonic()

    def cost(self) -> Cost:
        """Until now; the memory is the whole process's, from its start."""
        return {
            "date": f"{self._date:%Y%m%d-%H%M%S}",
            "wall_s": monotonic() - self._start,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
        }

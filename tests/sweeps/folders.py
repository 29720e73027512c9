"""Folders of sweeps as jobs leave them, with real results of a small log."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.metrics.logs import three_requests

from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.plugins.sweeps.folder import JobState

RESULTS: dict[str, Any] = summarize(
    Timeline().feed_all(three_requests()), SummaryOptions(percentiles=(50.0, 99.0))
)


def results(**figures: Any) -> dict[str, Any]:
    """Real results, with some figures replaced; ``servelab__x`` is one of the sub-object."""
    found = deepcopy(RESULTS)
    for key, value in figures.items():
        if key.startswith("servelab__"):
            found["servelab"][key.removeprefix("servelab__")] = value
        else:
            found[key] = value
    return found


def leave(
    sweep: Path,
    number: int,
    *overrides: str,
    status: Any = "ok",
    found: dict[str, Any] | None = None,
    reason: str = "",
    **config: Any,
) -> Path:
    """What one job leaves in its folder."""
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    files = []
    if found is not None:
        (folder / "results.json").write_text(json.dumps(found), encoding="utf-8")
        files = ["results.json"]
    JobState(
        number=number,
        overrides=list(overrides),
        config={"seed": 0, "workload": {"name": "chat"}, "executor": {"name": "torch"}, **config},
        servelab="0.1.0",
        status=status,
        reason=reason,
        files=files,
    ).write(folder)
    return folder

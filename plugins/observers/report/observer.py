"""Report: what a run measured, on stdout and in ``results.json`` (baseline).

At the end of a run: a run card (what ran), one table of latencies and one of totals, and as the last line
where the artefacts are. ``results.json`` holds the flat object of ``vllm bench serve`` with a ``servelab``
sub-object; ``docs/reference/metrics.md`` defines every key. A run that did not end well is marked PARTIAL,
with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, ServeLabError, hookimpl
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.metrics.definitions import NS_PER_MS
from servelab.core.records import Record, RunFinished
from servelab.core.run_folder import RESULTS_FILE, check_unused, write_file
from servelab.core.stdout import say
from servelab.plugins.observers.report.page import write_artefacts
from servelab.plugins.observers.report.series import Series
from servelab.plugins.observers.report.text import render

AT_ONCE = 1000
"""Records that are read together."""


class ReportConfig(BaseModel):
    """Settings of the ``report`` observer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    percentiles: tuple[float, ...] = Field(
        default=(50.0, 90.0, 99.0),
        min_length=1,
        max_length=6,
        description="Percentiles of every latency, in percent (0 to 100), as columns and as keys.",
    )
    itl_mode: Literal["chunk", "spread"] = Field(
        default="chunk",
        description="ITL of a step that emits k tokens of a request: one gap (chunk, as vLLM) or k equal "
        "shares of it (spread, as SGLang).",
    )
    rejections_are_misses: bool = Field(
        default=True, description="Count rejected requests as misses of their service level objective."
    )
    tbt_ms: float | None = Field(
        default=None,
        ge=0,
        description="Bound in ms for the share of gaps between tokens within it; by default slo.tbt_ms, if "
        "the run states one.",
    )
    plots: bool | None = Field(
        default=None,
        description="Draw plots/*.png, and the plots of the page; takes a second or two (matplotlib). null: "
        "unless the run is a job of a sweep, whose plots `servelab report` draws when they are wanted.",
    )
    page: bool | None = Field(
        default=None, description="Write report.html, everything on one page. null: as for plots."
    )


class ReportObserver:
    """Keeps a timeline while the run goes on; writes once, at its end."""

    def __init__(self, config: ReportConfig, ctx: Context) -> None:
        for q in config.percentiles:
            if not 0 <= q <= 100:
                raise ConfigError(
                    f"observer 'report' cannot show percentile {q}",
                    where="percentiles",
                    why="it is outside 0..100",
                    do="write it in percent, e.g. 99 or 99.9",
                )
        self._options = SummaryOptions(
            percentiles=config.percentiles,
            itl_mode=config.itl_mode,
            rejections_are_misses=config.rejections_are_misses,
            tbt_bound_ns=None if config.tbt_ms is None else round(config.tbt_ms * NS_PER_MS),
        )
        if ctx.run_dir is not None:
            check_unused(ctx.run_dir, f"observer {ctx.name!r}")
        self._folder = ctx.run_dir
        self._timeline = Timeline()
        plots, self._page = (not ctx.sweep if x is None else x for x in (config.plots, config.page))
        self._series = Series() if plots and ctx.run_dir is not None else None
        self._unread: list[Record] = []

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self._unread.append(record)
        if len(self._unread) >= AT_ONCE:
            self._read()

    def _read(self) -> None:
        """Many records one behind the other take half as long as each between two steps of the run."""
        records, self._unread = self._unread, []
        for record in records:
            self._timeline.feed(record)
        if self._series is not None:
            for record in records:
                self._series.feed(record)

    @hookimpl
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        self._read()
        result = summarize(self._timeline, self._options)
        lines = list(render(result, self._options.percentiles, self._folder))
        try:
            if self._folder is not None:
                write_results(result, self._folder / RESULTS_FILE)
                if self._series is not None or self._page:
                    lines[-1:-1] = write_artefacts(
                        self._folder, self._timeline, self._series, result, page=self._page
                    )
        finally:  # what was measured is said even if the disk is full
            say("\n".join(lines))


def write_results(result: Mapping[str, Any], path: Path) -> None:
    """Write the result as indented JSON.

    Raises:
        ServeLabError: the file cannot be written, or the run's info holds what JSON does not know.
    """
    try:
        text = json.dumps(result, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ServeLabError(
            f"{path.name} cannot be written",
            where=str(path),
            why=str(error),
            do="put only text, finite numbers, booleans, lists and dicts into the run's info",
        ) from error
    write_file(path, text + "\n")

"""Describe: what a workload sends, as a table, a file and a picture, without serving it. From no paper.

Mechanism: the arrivals of the composed run's workload are counted: how many, how fast, how evenly, how long,
for whom. Nothing is launched, so no weights are needed: ``task=describe`` selects the executor without a
model unless another one is named. What the workload says of itself stands beside it (``workload.json``). The
picture (``plots/workload.png``) shows the rate over time, the lengths, and each prompt with its answer.

Deviations: none.

Faithful when: the figures are those of the same arrivals computed by hand; a workload's own ``describe()``
says the same.

Tier: stable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context
from servelab.core.capabilities import select
from servelab.core.run_folder import write_file
from servelab.core.stdout import say
from servelab.plugins.tasks._traffic import QUANTILES, Traffic

if TYPE_CHECKING:
    from servelab.core.compose import Run

SCHEMA = 1
JSON_FILE = "workload.json"
PLOT_FILE = "plots/workload.png"
NONE = "-"


class DescribeConfig(BaseModel):
    """Settings of ``task=describe``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plot: bool = Field(default=True, description="Draw plots/workload.png; needs matplotlib.")


class Describe:
    """Keeps no state between runs."""

    def __init__(self, config: DescribeConfig, context: Context) -> None:
        self._config, self._folder = config, context.run_dir

    def run(self, run: Run) -> float | None:
        """Count and tell; returns requests per second, for sweepers."""
        try:
            traffic = Traffic(run.workload.arrivals())
        finally:
            run.executor.close()
        figures, said = traffic.figures(), run.info["workload"]
        title = said.get("traffic") or run.config.workload.name
        lines = list(table(run, title, figures, said))
        if self._folder is not None:
            about = {
                "schema_version": SCHEMA,
                "workload": run.config.workload.name,
                "traffic": title,
                "seed": run.config.seed,
                "model": run.config.model.name,
                "measured": figures,
                "described": said,
            }
            write_file(self._folder / JSON_FILE, json.dumps(about, indent=2, allow_nan=False) + "\n")
            lines.append("")
            if self._config.plot:
                lines += self._picture(self._folder / PLOT_FILE, traffic, str(title))
            lines.append(f"artefacts: {self._folder}")
        say("\n".join(lines))
        rate = figures["requests_per_s"]
        return None if rate is None else float(rate)

    @staticmethod
    def _picture(path: Path, traffic: Traffic, title: str) -> list[str]:
        """Draw it; the line that says why there is none."""
        from servelab.plugins.tasks._traffic_plot import draw

        try:
            picture = draw(traffic, title)
        except ImportError as exc:
            reason = str(exc).strip().splitlines()[-1:]  # numpy tells a long story
            return [" ".join([f"{path.name}: left out; pip install matplotlib;", *reason])]
        write_file(path, picture)
        return []


def table(run: Run, title: str, figures: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the terminal's table."""
    choice = run.config.workload
    changed = ", ".join(f"{key}={value}" for key, value in choice.changed().items())
    rows = {
        "traffic": str(title),
        "workload": f"{choice.name}{f' ({changed})' if changed else ''}",
        "model": f"{run.config.model.name}; seed {run.config.seed}",
    }
    yield "ServeLab workload"
    yield from (f"  {key:<10}{value}" for key, value in rows.items())
    yield ""
    yield from _arrivals(figures)
    (workload,) = select([("workload", choice)], run.registry)
    if "workload.closed_loop" in workload.may:
        yield "  a closed loop: what follows answers comes on top, when something serves it"
    yield ""
    yield from _lengths(figures)
    yield from _cut(said.get("over_length"))
    yield from _groups(figures)
    yield from _reuse(said.get("reuse"))
    yield from _origins(said.get("constants"))


def _arrivals(figures: Mapping[str, Any]) -> Iterator[str]:
    windows = figures["iat_cv_60s"]
    inside = f"median {_number(windows['p50'])}, p90 {_number(windows['p90'])} over {windows['windows']}"
    rows = [
        ("requests", f"{figures['requests']:,}", _samples(figures)),
        ("duration", f"{figures['duration_s']:,.3f} s", "to the last arrival"),
        ("rate", f"{_number(figures['requests_per_s'])} req/s", "in the mean"),
        ("CV of gaps", _number(figures["iat_cv"]), f"in windows of 60 s: {inside}"),
    ]
    if figures["cancellations"]:
        rows.append(("cancelled", f"{figures['cancellations']:,}", "clients that may give up"))
    yield from (f"  {name:<12}{value:>16}   {note}".rstrip() for name, value, note in rows)


def _samples(figures: Mapping[str, Any]) -> str:
    each = figures["samples_per_request"]
    return f"{each:g} outputs of each prompt" if each and each != 1 else ""


def _lengths(figures: Mapping[str, Any]) -> Iterator[str]:
    heads = ("mean", "CV", "min", *(f"p{q}" for q in QUANTILES), "max", "total")
    yield f"  {'tokens':<12}" + "".join(f"{head:>{_width(head)}}" for head in heads)
    for name, key in (("prompt", "prompt_tokens"), ("output", "output_tokens"), ("cap", "max_new_tokens")):
        one = figures[key]
        if one is None:
            yield f"  {name:<12}{NONE:>10}   only a model can tell"
            continue
        cells = (_number(one[head.lower()]) for head in heads)
        yield f"  {name:<12}" + "".join(f"{c:>{_width(h)}}" for h, c in zip(heads, cells, strict=True))
    related = figures["prompt_output_correlation"]
    if related is not None:
        yield (
            f"  {figures['length_capped']:,} outputs above their cap; correlation of prompt and output "
            f"{related:.2f}"
        )


def _cut(over: Any) -> Iterator[str]:
    if isinstance(over, Mapping) and over.get("requests"):
        done = {"clip": "cut", "drop": "left out"}.get(over["rule"], over["rule"])
        yield f"  longer than the model's {over['limit']:,} tokens and {done}: {over['requests']:,}"


def _width(head: str) -> int:
    return 14 if head == "total" else 10


def _groups(figures: Mapping[str, Any]) -> Iterator[str]:
    classes = figures["classes"]
    if len(classes) > 1:
        yield ""
        yield f"  {'class':<16}{'tenant':<16}{'priority':>8}{'requests':>12}"
        for one in classes:
            yield f"  {one['name']:<16}{one['tenant']:<16}{one['priority']:>8}{one['requests']:>12,}"
    turns = figures["turns"]
    if turns is not None:
        yield ""
        yield (
            f"  {figures['programs']:,} programs: {turns['mean']:.2f} turns in the mean, "
            f"p90 {_number(turns['p90'])}, at most {_number(turns['max'])}"
        )


def _reuse(reuse: Any) -> Iterator[str]:
    if not isinstance(reuse, Mapping):
        return
    yield ""
    yield f"  prompt tokens that a cache would reuse: {100 * reuse['infinite']:.1f} % without limit"
    for size, share in reuse.get("lru", {}).items():
        yield f"  {int(size):>14,} tokens, least recently used out: {100 * share:.1f} %"


def _origins(constants: Any) -> Iterator[str]:
    if isinstance(constants, Mapping):
        yield ""
        yield "  where the generator's constants are from"
        yield from (f"    {name}: {origin}" for name, origin in constants.items())


def _number(value: float | None) -> str:
    """Four digits, or all of a whole number."""
    if value is None:
        return NONE
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"

"""Azure LLM inference traces: code completion and conversation of one hour, or the week of 2024.

Source: Azure/AzurePublicDataset (data CC-BY-4.0), released with Splitwise (Patel et al., ISCA 2024).

Mechanism: the rows of the csv are replayed at their recorded times, or at another rate: ContextTokens are the
prompt, GeneratedTokens the true output, which is hidden. Rows with equal stamps keep their order. Caps are
drawn independently of true lengths.

Symbols: R -> request_rate; p -> share that thinning keeps.

Deviations: none.

Faithful when: the conversation file has 19,366 requests in 3,502 s, 5.53 a second, CV of gaps 1.09, mean
prompt 1,155 and output 211 tokens; equal stamps are not sorted anew; scaling times keeps the CV.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

from pydantic import Field

from servelab.core.api import Context
from servelab.plugins.workloads._trace import Replay, Row, TraceConfig, sliced, taken
from servelab.plugins.workloads._trace_path import must_be_stated, trace_path
from servelab.plugins.workloads._trace_text import NS, Source, believable

TIME, PROMPT, OUTPUT = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
REMEDY = "fetch the publisher's: servelab data fetch azure_conv (or azure_code)"


class AzureConfig(TraceConfig):
    """Settings of the ``azure`` workload."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="csv with TIMESTAMP, ContextTokens, GeneratedTokens: a file, cache:FILE, or the name of "
        "a fetched data set (azure_conv, azure_code). Must be stated.",
    )


class Azure(Replay):
    """Open loop. The wanted rows are read at construction, 28 bytes each.

    Raises:
        ConfigError: no path.
        WorkloadError: the file, the slice, or a request's length.
    """

    def __init__(self, config: AzureConfig, ctx: Context) -> None:
        self.root = ctx.rng.getrandbits(64)
        path = trace_path(must_be_stated(config.path, "azure", "azure_conv"), REMEDY)
        columns, done = taken(sliced(rows(path), config), config, self._stream("thin"))
        super().__init__(config, ctx, columns, {"traffic": f"Azure, {path.name}", **done})


def rows(path: Path) -> Iterator[Row]:
    """Time in ns from the first row, prompt and output tokens, 0.

    Raises:
        WorkloadError: something is wrong in the file; it says where.
    """
    source = Source(path, REMEDY)
    return believable(source, _rows(source), ((PROMPT, 1), (OUTPUT, 2)))


def _rows(source: Source) -> Iterator[Row]:
    origin, last = None, 0
    for when, context, generated in source.table((TIME, PROMPT, OUTPUT)):
        time_ns = _stamp(source, when)
        source.in_order(time_ns, last, TIME, when)
        last = time_ns
        origin = time_ns if origin is None else origin
        prompt, output = source.whole(context, PROMPT), source.whole(generated, OUTPUT)
        source.served(prompt, output, (PROMPT, OUTPUT))
        yield time_ns - origin, prompt, output, 0


def _stamp(source: Source, text: str) -> int:
    """``2023-11-16 18:15:46.6805900`` as ns from year 1, exactly. The fraction, and ``+00:00``, may lack."""
    try:
        day, _, clock = text.strip().removesuffix("Z").removesuffix("+00:00").partition(" ")
        clock, _, fraction = clock.partition(".")
        hours, minutes, seconds = clock.split(":")
        # the csv has at most nine digits after the point; more say nothing
        parts = (hours, minutes, seconds, fraction[:9].ljust(9, "0"))
        if not all(part.isdecimal() for part in parts):
            raise ValueError
        h, m, s, ns = map(int, parts)
        if h > 23 or m > 59 or s > 60:
            raise ValueError
        return ((date.fromisoformat(day).toordinal() * 24 + h) * 60 + m) * 60 * NS + s * NS + ns
    except ValueError:
        raise source.fault(
            f"{text!r} is no time stamp",
            TIME,
            "stamps look like 2023-11-16 18:15:46.6805900",
            "correct the cell or delete the row",
        ) from None

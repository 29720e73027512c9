"""Phase regressions: prefill and decode as low-order polynomials. DistServe (OSDI 2024) and its simulator.

Mechanism: a step of prompts takes ``a + b sum n + c sum n^2`` ms for prompts of n tokens; a step of decodes
``a + b sum context + c requests``, with a second set of coefficients from ``large_batch`` requests on. The
coefficients are of one model on one device: presets of the paper's profiles are in ``configs/cost``, others
are stated, or fitted by least squares to measured steps (``measured``).

Symbols: a chunk of n tokens behind p is charged ``c ((p + n)^2 - p^2)``, so that chunks of a prompt add up to
it; a draft of d tokens counts as d more requests.

Deviations:
    1. A step with both prompts and decodes, which DistServe has not, takes the prompts' variable part on top
       of the decodes' time.
    2. No step gets cheaper with more work, as the released fits do (by 6 % for OPT-13B on one device where
       the second set begins): from large_batch requests on the greater of both sets is taken, a prompt beside
       others takes at least what it would as a decode, and one of one token is one.
    3. Transfers take time (the released simulator charges none).

Faithful when: the vectors of the paper's fits; least squares recovers planted coefficients; monotone.
Tier: stable.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from math import fsum
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from servelab.core.api import ConfigError, Context
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.plugins.costmodels._least_squares import least_squares
from servelab.plugins.costmodels._measured import (
    MeasuredConfig,
    cells,
    check_measured_on,
    columns,
    number,
    read,
    whole,
)

Coefficients = tuple[
    Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]
]


class PhaseLinearConfig(MeasuredConfig):
    """Settings of ``+cost=phase_linear``: coefficients, or a file of measured steps to fit them to."""

    prefill_ms: Coefficients | None = Field(
        None, description="ms per step, per prompt token, per squared prompt token"
    )
    decode_ms: Coefficients | None = Field(None, description="ms per step, per token of context, per request")
    decode_large_ms: Coefficients | None = Field(
        None, description="the same for large batches; None: decode_ms for all"
    )
    large_batch: int = Field(95, ge=1, description="requests from which decode_large_ms holds")
    measured: str | None = Field(
        None, description="CSV with columns phase, lengths, ms to fit the coefficients to, see the page"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        stated = [self.prefill_ms, self.decode_ms]
        if self.measured is None and None in stated:
            raise ValueError(
                "prefill_ms and decode_ms are needed, or measured; presets: "
                "+cost=distserve_opt_13b_tp1 and others, see the page"
            )
        if self.measured is not None and any((*stated, self.decode_large_ms)):
            raise ValueError("measured is fitted: leave prefill_ms, decode_ms and decode_large_ms out")
        return self


@dataclass(frozen=True, slots=True)
class Line:
    """``a + b x + c y`` in ms."""

    a: float
    b: float
    c: float

    def at(self, x: int, y: int) -> float:
        return self.a + self.b * x + self.c * y


class PhaseLinear:
    """Stateless; O(requests) per call, O(1) per further step."""

    def __init__(self, config: PhaseLinearConfig, ctx: Context) -> None:
        check_measured_on(config, ctx)
        self.config = config
        if config.measured is not None:
            self.prefill, self.decode, self.large = fitted(config.measured, config.large_batch)
            return
        assert config.prefill_ms is not None
        assert config.decode_ms is not None
        self.prefill, self.decode = Line(*config.prefill_ms), Line(*config.decode_ms)
        self.large = Line(*config.decode_large_ms) if config.decode_large_ms else None

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        rows = len(batch.tokens)
        extra = sum(item.draft for item in batch.extras.values())
        context, requests = sum(batch.starts) + sum(batch.tokens) + extra, rows + extra
        if batch.tokens.count(1) == rows:
            return [whole(self._decodes(context + k * rows, requests)) for k in range(steps)]
        prompts = [(n, p) for n, p in zip(batch.tokens, batch.starts, strict=True) if n > 1]
        decoding = context - sum(n + p for n, p in prompts)
        first = whole(self._with_prompts(prompts, decoding, requests - len(prompts), requests))
        return [first, *(whole(self._decodes(context + k * rows, requests)) for k in range(1, steps))]

    def transfer_time(self, transfer: Transfer) -> int:
        return self.config.transfer_time(transfer)

    def describe(self) -> dict[str, Any]:
        """Coefficients in force and where they are from."""
        lines = {"prefill_ms": self.prefill, "decode_ms": self.decode, "decode_large_ms": self.large}
        known = {name: [one.a, one.b, one.c] for name, one in lines.items() if one is not None}
        fitted_to = {"fitted_to": self.config.measured} if self.config.measured else {}
        return {**known, **fitted_to, **self.config.describe()}

    def _decodes(self, context: int, requests: int) -> float:
        """ms of a step of decodes."""
        return max(line.at(context, requests) for line in self._lines(requests))

    def _with_prompts(
        self, prompts: Sequence[tuple[int, int]], context: int, decodes: int, requests: int
    ) -> float:
        """ms of a step of prompts, (tokens, tokens before them) each, and of decodes with so much context."""
        runs = [self.prefill.b * n + self.prefill.c * n * (n + 2 * p) for n, p in prompts]
        took = self.prefill.a + fsum(runs)  # exact, so that the order of requests does not matter
        for line in self._lines(requests):
            # each takes at least what it would as a decode; without decodes, one may be cut to a token
            each = [max(run, line.b * (p + n) + line.c) for run, (n, p) in zip(runs, prompts, strict=True)]
            beside = line.at(context, decodes)
            if not decodes:
                last = min(range(len(each)), key=lambda i: each[i] - line.b * (prompts[i][1] + 1))
                beside = line.at(prompts[last][1] + 1, 1)
                del each[last]
            took = max(took, beside + fsum(each))
        return took

    def _lines(self, requests: int) -> tuple[Line, ...]:
        """The fits that hold for so many requests."""
        if self.large is None or requests < self.config.large_batch:
            return (self.decode,)
        return (self.decode, self.large)


def fitted(file: str, large_batch: int) -> tuple[Line, Line, Line | None]:
    """Coefficients of prefill, decode and decode of large batches (None where none were measured).

    Raises:
        ConfigError: the file cannot be read or does not decide them; names file, line and field.
    """
    prompts: list[tuple[float, float, float]] = []
    small: list[tuple[float, float, float]] = []
    large: list[tuple[float, float, float]] = []
    for phase, lengths, ms in _steps(file):
        if phase == "prefill":
            prompts.append((sum(lengths), sum(n * n for n in lengths), ms))
        else:
            (large if len(lengths) >= large_batch else small).append((sum(lengths), len(lengths), ms))
    both = small and large
    return (
        _fit(prompts, file, "prefill"),
        _fit(small or large, file, "decode"),
        _fit(large, file, "decode") if both else None,
    )


def _fit(steps: list[tuple[float, float, float]], file: str, phase: str) -> Line:
    found = least_squares([(1.0, x, y) for x, y, _ in steps], [ms for *_, ms in steps])
    if found is None:
        raise ConfigError(
            f"{len(steps)} measured {phase} steps do not decide three coefficients",
            where=f"cost.measured: {file}",
            why="they must differ in both lengths and requests",
            do=f"measure at least three {phase} steps: one request and several, short and long",
        )
    if min(found) < 0:
        named = ", ".join(f"{one:g}" for one in found)
        raise ConfigError(
            f"the fit of {phase} steps has a negative coefficient ({named})",
            where=f"cost.measured: {file}",
            why="prices would fall with more work, and no scheduler may count on that",
            do="measure more steps over a wider range, or state the coefficients",
        )
    return Line(*found)


def _steps(file: str) -> Iterable[tuple[str, list[int], float]]:
    """Phase, lengths of the requests, ms; of each measured step."""
    rows = csv.DictReader(StringIO(read(file, "cost.measured")))
    missing = {"phase", "lengths", "ms"} - columns(rows, f"cost.measured: {file}, line 1")
    if missing:
        raise ConfigError(
            f"missing columns: {', '.join(sorted(missing))}",
            where=f"cost.measured: {file}, line 1",
            why=f"it has {', '.join(rows.fieldnames or ()) or 'none'}",
            do="write phase (prefill or decode), lengths (of prompts or contexts, with spaces), ms",
        )
    for place, row in cells(rows, f"cost.measured: {file}"):
        if row["phase"] not in ("prefill", "decode"):
            raise ConfigError(
                f"phase must be prefill or decode (got {row['phase']!r})",
                where=f"{place}, field phase",
                do="name the phase of the step; a step of both cannot be fitted",
            )
        lengths = [int(number(one, "lengths", place, int)) for one in row["lengths"].split()]
        if not lengths:
            raise ConfigError(
                "lengths is empty",
                where=f"{place}, field lengths",
                why="a step runs at least one request",
                do="list the length of each request of the step, separated by spaces",
            )
        yield row["phase"], lengths, number(row["ms"], "ms", place)

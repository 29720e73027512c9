"""Interpolated tables of measured step times. splitwise-sim (Mutinifni/splitwise-sim, 2024).

Mechanism: a step of prompts takes what the table says of all its tokens together, a step of decodes what it
says of its requests, a step of both what it says of a step of prompts with all their tokens, times
``mixed_factor``. Between measured points time is linear, before the first it is flat, after the last it goes
on with the last slope, which a warning tells before the run. Points are stated (``prompt_ms``, ``token_ms``)
or read from ``file``: columns phase, tokens, ms; the same as JSON; or the columns of splitwise-sim's
``perf_model.csv``, of which rows are chosen by ``rows`` and medians taken.

Deviations:
    1. Measured points that fall are pooled to their mean, so that no step gets cheaper with more tokens; the
       released code interpolates them as they are.
    2. Decodes are measured and looked up by requests; the released code files their times under the tokens of
       the prompts before them and looks them up by requests, below all its points.
    3. No step takes less than its first point says, nor less than its requests would if each ran one token.
    4. A draft of d tokens counts as d more requests, a prompt of one token as a decode, and one point is a
       flat table.

Faithful when: measured points are reproduced; monotone; the mixed factor; the released table loads.
Tier: stable.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from statistics import median
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from servelab.core.api import ConfigError, Context
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.plugins.costmodels._curve import Curve
from servelab.plugins.costmodels._measured import (
    MeasuredConfig,
    cells,
    check_measured_on,
    columns,
    number,
    read,
    whole,
)

log = logging.getLogger(__name__)

Points = dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]]
PHASES = ("prompt", "token")
_SPLITWISE = {"prompt_size", "batch_size", "prompt_time", "token_time"}


class TableConfig(MeasuredConfig):
    """Settings of ``+cost=table``: points, or a file with them."""

    prompt_ms: Points | None = Field(None, description="ms of a step by its prompt tokens")
    token_ms: Points | None = Field(None, description="ms of a step by its decoding requests")
    file: str | None = Field(None, description="CSV or JSON with these points, see the page")
    rows: dict[str, str] = Field(
        {}, description="columns and what they must hold, to choose rows of a CSV, {hardware: a100-80gb}"
    )
    mixed_factor: float = Field(
        1.1, ge=1, description="what a step of prompts and decodes takes, as a multiple of one of prompts"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is None and not (self.prompt_ms and self.token_ms):
            raise ValueError(
                "prompt_ms and token_ms are needed, or file; presets: +cost=splitwise_llama2_70b_a100 and "
                "+cost=splitwise_llama2_70b_h100, see the page"
            )
        if self.file is not None and (self.prompt_ms or self.token_ms):
            raise ValueError("file holds the points: leave prompt_ms and token_ms out")
        return self


class TableCost:
    """Stateless; O(requests + log points) per call."""

    def __init__(self, config: TableConfig, ctx: Context) -> None:
        check_measured_on(config, ctx)
        self.config = config
        points = read_points(config.file, config.rows) if config.file is not None else None
        prompt = points["prompt"] if points else config.prompt_ms or {}
        token = points["token"] if points else config.token_ms or {}
        self.prompt, self.token = Curve(prompt), Curve(token)
        self._beyond: list[str] = []
        for curve, of, most in (
            (self.prompt, "prompt tokens", ctx.limits.max_batch_tokens),
            (self.token, "decoding requests", ctx.limits.max_batch_requests),
        ):
            if curve.pooled:
                log.warning("cost table: points by %s fall here and there; they are pooled to their mean", of)
            if most > curve.x[-1]:
                told = f"measured up to {curve.x[-1]} {of}, steps may have {most}"
                self._beyond.append(told)
                on = "the last slope goes on" if len(curve.x) > 1 else "they take as long"
                log.warning("cost table: %s: beyond, %s", told, on)

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        rows = len(batch.tokens)
        extra = sum(item.draft for item in batch.extras.values())
        decodes = whole(self.token(rows + extra))
        ones = batch.tokens.count(1)
        if ones == rows:
            return [decodes] * steps
        tokens = sum(batch.tokens) + extra
        factor = self.config.mixed_factor if ones or extra else 1.0
        return [max(whole(self.prompt(tokens) * factor), decodes), *[decodes] * (steps - 1)]

    def transfer_time(self, transfer: Transfer) -> int:
        return self.config.transfer_time(transfer)

    def describe(self) -> dict[str, Any]:
        """Where the points are from and where they end."""
        file = {"file": self.config.file} if self.config.file else {}
        beyond = {"extrapolates": self._beyond} if self._beyond else {}
        return {**file, **self.config.describe(), "mixed_factor": self.config.mixed_factor, **beyond}


def read_points(file: str, rows: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """``{"prompt": {tokens: ms}, "token": {requests: ms}}`` of a file.

    Raises:
        ConfigError: it cannot be read, or lacks something; names file, line and field.
    """
    found: dict[str, dict[int, list[float]]] = {phase: defaultdict(list) for phase in PHASES}
    for phase, tokens, ms in _json(file) if file.lower().endswith(".json") else _csv(file, rows):
        found[phase][tokens].append(ms)
    for phase, points in found.items():
        if not points:
            chosen = f" where {', '.join(f'{k} is {v}' for k, v in rows.items())}" if rows else ""
            raise ConfigError(
                f"no row has a time of phase {phase!r}{chosen}",
                where=f"cost.file: {file}",
                do="choose rows that exist (cost.rows), or measure that phase too",
            )
    return {phase: {n: median(ms) for n, ms in points.items()} for phase, points in found.items()}


def _csv(file: str, rows: Mapping[str, str]) -> Iterator[tuple[str, int, float]]:
    table = csv.DictReader(StringIO(read(file, "cost.file")))
    names = columns(table, f"cost.file: {file}, line 1")
    ours = {"phase", "tokens", "ms"}
    splitwise = not ours <= names
    missing = (_SPLITWISE if splitwise and names & _SPLITWISE else ours) - names | set(rows) - names
    if missing:
        raise ConfigError(
            f"missing columns: {', '.join(sorted(missing))}",
            where=f"cost.file: {file}, line 1",
            why=f"it has {', '.join(table.fieldnames or ()) or 'none'}",
            do="write phase, tokens, ms (or splitwise-sim's columns), and existing ones in cost.rows",
        )
    kinds = set()
    for place, row in cells(table, f"cost.file: {file}"):
        if any(row[column] != value for column, value in rows.items()):
            continue
        if not splitwise:
            yield (
                _phase(row["phase"], place),
                _count(row["tokens"], "tokens", place),
                number(row["ms"], "ms", place),
            )
            continue
        kinds.add(tuple(row.get(column) for column in ("model", "hardware", "tensor_parallel")))
        if len(kinds) > 1:
            named = "; ".join(", ".join(map(str, kind)) for kind in sorted(kinds, key=str))
            raise ConfigError(
                "rows of several models, devices or degrees of parallelism would be mixed",
                where=place,
                why=f"among them {named}",
                do="choose one: cost.rows={model: llama2-70b, hardware: a100-80gb, tensor_parallel: '8'}",
            )
        requests = _count(row["batch_size"], "batch_size", place)
        length = _count(row["prompt_size"], "prompt_size", place)
        yield "prompt", length * requests, number(row["prompt_time"], "prompt_time", place)
        yield "token", requests, number(row["token_time"], "token_time", place)


def _json(file: str) -> Iterator[tuple[str, int, float]]:
    try:
        loaded: Any = json.loads(read(file, "cost.file"), object_pairs_hook=_once)
    except ValueError as exc:
        raise ConfigError(
            "the file is no JSON of step times", where=f"cost.file: {file}", why=str(exc), do="mend it"
        ) from exc
    for phase in PHASES:
        points = loaded.get(f"{phase}_ms") if isinstance(loaded, dict) else None
        if not isinstance(points, dict):
            raise ConfigError(
                f"{phase}_ms is missing, or no mapping",
                where=f"cost.file: {file}",
                do='write {"prompt_ms": {"512": 93}, "token_ms": {"1": 43}}',
            )
        for tokens, ms in points.items():
            place = f"cost.file: {file}, {phase}_ms"
            yield phase, _count(tokens, "tokens", place), number(ms, str(tokens), place)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON, in which the last of several values of a key would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice in one mapping")
    return found


def _phase(text: str, place: str) -> str:
    if text not in PHASES:
        raise ConfigError(
            f"phase must be prompt or token (got {text!r})",
            where=f"{place}, field phase",
            do="name what the step ran: prompts, or one token of each request",
        )
    return text


def _count(text: object, field: str, place: str) -> int:
    return int(number(text, field, place, int))

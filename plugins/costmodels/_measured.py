"""What cost models share whose figures were measured on one model and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from csv import DictReader
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context
from servelab.core.engine.swap import Transfer


class MeasuredConfig(BaseModel):
    """Settings of cost models with measured figures."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    measured_model: str | None = Field(
        None, description="model the figures were measured on; a run of another is refused. None: any"
    )
    measured_tp: int | None = Field(
        None, ge=1, description="devices per instance they were measured on (hardware.tp), likewise"
    )
    origin: str | None = Field(None, description="where the figures are from")
    transfer_ns: int = Field(20_000, ge=1, description="fixed price of a transfer, ns")
    link_bytes_per_s: float = Field(
        25e9, gt=0, description="bandwidth of transfers, bytes/s (PCIe 4.0 x16 reaches about 25e9 one way)"
    )

    def describe(self) -> dict[str, Any]:
        """Where the figures are from, for the run card."""
        stated = ("measured_model", "measured_tp", "origin")
        return {name: getattr(self, name) for name in stated if getattr(self, name) is not None}

    def transfer_time(self, transfer: Transfer) -> int:
        """Nanoseconds of a transfer that has its link to itself."""
        return self.transfer_ns + int(transfer.bytes / self.link_bytes_per_s * 1e9)


def check_measured_on(config: MeasuredConfig, ctx: Context) -> None:
    """The run is of the model and the number of devices that the figures were measured on.

    Raises:
        ConfigError: it is of others.
    """
    tp = ctx.hardware.tp if ctx.hardware else 1
    for field, setting, measured, have in (
        ("measured_model", "model", config.measured_model, ctx.model.name),
        ("measured_tp", "hardware.tp", config.measured_tp, tp),
    ):
        if measured is not None and measured != have:
            raise ConfigError(
                f"cost {ctx.name!r} has figures of {setting}={measured}, and the run is of {setting}={have}",
                where=f"cost.{field}",
                why="step times of one model or number of devices say little of another",
                do=f"choose {setting}={measured}, other figures, +cost=roofline, or cost.{field}=null to "
                "charge these all the same",
            )


def whole(ms: float) -> int:
    """Milliseconds as nanoseconds, at least 1."""
    return max(1, round(ms * 1e6))


def read(file: str, where: str) -> str:
    """Text of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"the file of step times cannot be read: {file}",
            where=where,
            why=getattr(exc, "strerror", None) or str(exc),
            do="give the path of a text file that exists, from the folder the run is started in",
        ) from exc


def columns(table: DictReader[str], place: str) -> set[str]:
    """Names of a CSV's columns.

    Raises:
        ConfigError: one is there twice, and the last would win.
    """
    names = list(table.fieldnames or ())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"the column {twice[0]!r} is there twice",
            where=place,
            why="only one of them can be read, and nothing says which",
            do="rename or remove one of them",
        )
    return set(names)


def cells(table: DictReader[str], place: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells of each row of a CSV.

    Args:
        table: the rows.
        place: the file, for errors.

    Raises:
        ConfigError: a row has more or fewer cells than the header, as one with a decimal comma.
    """
    width = len(table.fieldnames or ())
    for row in table:
        where = f"{place}, line {table.line_num}"
        # DictReader files the cells beyond the header under None, and fills up with None
        extra = row.pop(None, [])
        missing = list(row.values()).count(None)
        if extra or missing:
            raise ConfigError(
                f"a row of {width + len(extra) - missing} cells under a header of {width}",
                where=where,
                why="nothing says which cell belongs to which column",
                do="complete the row or delete it; decimals are written with a point, 93.5",
            )
        yield where, row


def number(text: object, field: str, place: str, kind: Callable[[str], float] = float) -> float:
    """A positive number of a file.

    Raises:
        ConfigError: it is none; names file, line and field.
    """
    try:
        value = kind(str(text))
        fine = 0 < value < float("inf")
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(
            f"{field} must be a {'whole ' if kind is int else ''}number above zero (got {text!r})",
            where=f"{place}, field {field}",
            why="a step runs at least one token and takes time",
            do="mend the value, or leave the row out",
        )
    return value

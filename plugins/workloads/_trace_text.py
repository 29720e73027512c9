"""Reading a trace line by line: whatever is wrong names the file, the line, the field and the remedy."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from servelab.core.api import WorkloadError
from servelab.core.errors import nearest

NS = 1_000_000_000
POINTER = "version https://git-lfs.github.com/spec/"
"""Begins the file that Git LFS leaves in the place of a large one."""
PACKED = {b"\x1f\x8b": "gunzip --keep", b"PK": "unzip"}
"""How compressed files begin, and what unpacks them."""
MOST_TOKENS = 100_000_000
"""Longest length that is believed."""

FEWEST, MOST = 500, 2_000
"""Rows that tell a real trace from uniform random numbers, at least and at most."""

T = TypeVar("T", bound=Sequence[int])


class Source:
    """A trace file, and the errors about it.

    Args:
        path: the file.
        remedy: where a good one comes from, for errors.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self.remedy = path, remedy
        self.line = 0
        """Line of the row that was read last, from 1."""

    def fault(self, what: str, field: str, why: str, do: str) -> WorkloadError:
        """The error about a field of the current line, or about the whole file before the first one."""
        where = [
            f"{self.path}",
            *[f"line {self.line}"] * (self.line > 0),
            *[f"field {field!r}"] * bool(field),
        ]
        return WorkloadError(what, where=", ".join(where), why=why, do=do)

    def lines(self) -> Iterator[str]:
        """The lines with their ends.

        Raises:
            WorkloadError: it cannot be read, is empty, binary or compressed, or is a Git LFS pointer or a web
                page.
        """
        self.line = 0
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                for line in file:
                    self.line += 1
                    if self.line == 1 and line.startswith(POINTER):
                        raise self.fault(
                            "this is a Git LFS pointer, not the trace",
                            "",
                            "the file was copied from a repository without its large files",
                            self.remedy,
                        )
                    if self.line == 1 and line.lstrip().startswith("<"):
                        raise self.fault(
                            "this is a web page, not the trace",
                            "",
                            f"it begins with {line.strip()[:40]!r}",
                            self.remedy,
                        )
                    yield line
        except OSError as exc:
            raise WorkloadError(
                "the trace cannot be read",
                where=f"{self.path}",
                why=exc.strerror or str(exc),
                do=f"check workload.path; {self.remedy}",
            ) from exc
        except UnicodeDecodeError as exc:
            raise self._no_text() from exc
        if not self.line:
            raise self.fault("the trace is empty", "", "it has no line", self.remedy)

    def _no_text(self) -> WorkloadError:
        """The error about the first line that is not UTF-8: reading stops up to a buffer before it."""
        self.line, why = 0, ""
        with self.path.open("rb") as file:
            for line in file:
                for begin, unpack in PACKED.items():
                    if not self.line and line.startswith(begin):
                        return self.fault(
                            "the trace is compressed",
                            "",
                            "text is read",
                            f"{unpack} {self.path}, and state that file",
                        )
                self.line += 1
                try:
                    line.decode()
                except UnicodeDecodeError as exc:
                    why = f"byte {exc.start + 1} of the line is 0x{line[exc.start]:02x}, which is not UTF-8"
                    break
        return self.fault("this is not a text file", "", why, self.remedy)

    def table(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[list[str]]:
        """Cells of each row of a csv file, in the order of ``required`` then ``optional``; an optional column
        that the file lacks gives ``""``. Columns with other names are left out.

        Raises:
            WorkloadError: a column or all rows are missing, or a row has another number of cells than the
                header.
        """
        rows, begin = csv.reader(self.lines(), strict=True), 1
        try:
            header = [cell.strip() for cell in next(rows, [])]
            for name in required:
                if name not in header:
                    raise self.fault(
                        f"the trace has no column {name!r}",
                        name,
                        f"its header is {', '.join(header)[:200]!r}",
                        f"{_columns(name, header)}; {self.remedy}",
                    )
            for name in (*required, *optional):
                if header.count(name) > 1:
                    raise self.fault(
                        f"the column {name!r} is there twice",
                        name,
                        "only one of them can be read, and nothing says which",
                        "rename or remove one of them",
                    )
            width = len(header)
            places = [header.index(name) for name in required]
            more = [header.index(name) if name in header else width for name in optional]
            places += more
            full = False
            for row in rows:
                begin = self.line + 1
                if len(row) != width:
                    if not row:
                        continue  # an empty line, as at the end of a file
                    raise self.fault(
                        f"a row of {len(row)} cells under a header of {width}",
                        "",
                        f"the line is {','.join(row)[:100]!r}",
                        "complete the line or delete it: the file may be cut off there",
                    )
                row.append("")
                full = True
                yield [row[place] for place in places]
        except csv.Error as exc:
            self.line = begin  # where the row begins: a quote that stays open swallows lines
            raise self.fault(
                "a row is not csv", "", f"{exc}", f"close or remove its quotation mark; {self.remedy}"
            ) from exc
        if not full:
            raise self.fault("the trace has no rows", "", "it ends after its header", self.remedy)

    def whole(self, text: str, field: str) -> int:
        """A number of tokens, 0 or more. ``12.0``, as pandas writes columns with gaps, is 12."""
        value: Decimal | int
        if not text.isdecimal():
            value = self._number(text, field)
            if value <= MOST_TOKENS and value != int(value):
                raise self.fault(f"{text!r} is no whole number", field, "tokens are counted", _MEND)
        else:
            value = Decimal(text) if len(text) > 9 else int(text)
        if value > MOST_TOKENS:
            raise self.fault(
                f"{text:.30} is no believable number of tokens", field, f"the most is {MOST_TOKENS}", _MEND
            )
        return int(value)

    def seconds(self, text: str, field: str) -> int:
        """A time in seconds, 0 or later, as nanoseconds."""
        if text.isdecimal() and len(text) < 10:
            return int(text) * NS
        value = self._number(text, field)
        if value > 10**9:
            raise self.fault(
                f"{text} is no time in seconds from the start", field, "it is more than 30 years", _MEND
            )
        return round(value * NS)

    def served(self, prompt: int, output: int, fields: tuple[str, str]) -> None:
        """Raise if a request has no prompt or no output, and say in which of the two fields."""
        for length, what, field in ((prompt, "prompt", fields[0]), (output, "output", fields[1])):
            if not length:
                raise self.fault(
                    f"a request of 0 {what} tokens",
                    field,
                    "no row of the published traces has one, and it cannot be served",
                    "delete the row",
                )

    def in_order(self, time_ns: int, last_ns: int, field: str, text: str) -> None:
        """Raise if a time is before the one of the row above."""
        if time_ns < last_ns:
            raise self.fault(
                f"{text} is earlier than the row above",
                field,
                "rows come in order of time; equal times are fine",
                f"sort the rows by {field}, keeping the header and the order of equal times (sort --stable)",
            )

    def _number(self, text: str, field: str) -> Decimal:
        try:
            value = Decimal(text.strip())
        except InvalidOperation:
            value = Decimal("nan")
        if not value.is_finite():
            said = repr(text) if text.strip() else "an empty cell"
            raise self.fault(f"{said} is no number", field, "the column holds numbers", _MEND)
        if value < 0:
            raise self.fault(f"{text} is negative", field, "the least is 0", _MEND)
        return value


_MEND = "correct the cell or delete the row"


def _columns(wanted: str, header: Sequence[str]) -> str:
    """The sentence that helps after a column that is not there."""
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        return "separate cells with commas"
    near, mark, _ = nearest(wanted, header).partition("?")
    return f"{near + '? ' if mark else ''}rename the column that holds it to {wanted}"


def believable(source: Source, rows: Iterator[T], columns: Iterable[tuple[str, int]]) -> Iterator[T]:
    """The same rows, unless the first ones are uniform random numbers: such files go round as traces.

    Args:
        source: whose rows.
        rows: sequences of numbers.
        columns: names and places of the columns that are looked at.
    """
    head = list(islice(rows, MOST))
    line = source.line
    for name, place in columns:
        values = [row[place] for row in head if row[place]]
        if len(values) >= FEWEST and looks_uniform(values):
            source.line = 2
            raise source.fault(
                f"the column {name!r} looks made up",
                name,
                f"its first {len(values)} lengths are spread evenly from {min(values)} to {max(values)}; "
                "lengths of real requests are mostly short, with a long tail",
                f"{source.remedy}; lengths that are meant to be even: workload=synthetic with law uniform",
            )
    source.line = line
    return chain(head, rows)


def looks_uniform(values: Sequence[int]) -> bool:
    """Whether a Kolmogorov-Smirnov test at 1 % has nothing against equally likely values."""
    ordered = sorted(values)
    low, high, n = ordered[0], ordered[-1], len(ordered)
    if high - low < 20:
        return False  # too coarse to say
    span = high - low + 1
    most = max(abs(bisect_right(ordered, value) / n - (value - low + 1) / span) for value in set(ordered))
    return most < 1.63 / math.sqrt(n)

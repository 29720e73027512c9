"""How far each family's logits are from transformers', as docs/reference/model_families.md states it.

``python -m tests.torch.family_errors --write`` measures and puts the table in place. The numbers vary a
little with the processor; the tests hold them to 1e-9 and 1e-4 of the largest logit.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tests.torch.models import FAMILIES, decoder, exact, family
from tests.torch.sessions import LENGTH, Session, answer, ids_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "model_families.md"
CHUNKS = (0, 37, 38, 77, 140, *range(141, LENGTH + 1))
"""Where the prompt is cut: chunks, then one token at a time."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The largest difference of any logit, and the largest logit."""

    error: float
    largest: float

    @property
    def relative(self) -> float:
        return self.error / self.largest


def measured(name: str, dtype: torch.dtype) -> Measured:
    """One prompt of ``LENGTH`` tokens in ``CHUNKS`` over scattered pages of 4, against all of it at once."""
    model = family(name)
    if dtype is torch.float64:
        model, d = exact(model)
    else:
        d = decoder(model, dtype)
    ids, session = ids_of(LENGTH), Session(d)
    expected = answer(model, ids)
    parts = [session.logits((0, ids[a:b]))[0] for a, b in pairwise(CHUNKS)]
    got = torch.cat(parts)
    assert got.dtype == expected.dtype == dtype and expected.std() > 0.1
    return Measured(float((got - expected).abs().max()), float(expected.abs().max()))


def table() -> str:
    """Markdown."""
    rows = ["| model | largest logit | float64 | float32 |", "|---|---|---|---|"]
    for name in FAMILIES:
        exact_, single = measured(name, torch.float64), measured(name, torch.float32)
        rows.append(f"| {name} | {exact_.largest:.3g} | {exact_.error:.1e} | {single.error:.1e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    found = table()
    print(found)
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- errors: begin -->\n).*?(<!-- errors: end -->)", re.S)
        PAGE.write_text(pattern.sub(lambda m: f"{m[1]}{found}\n{m[2]}", page), encoding="utf-8")

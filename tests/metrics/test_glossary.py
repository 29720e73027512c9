"""Every key of the result is in the glossary, and the glossary names no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.metrics.logs import arrived, three_requests

from servelab.core.metrics import SummaryOptions, Timeline, summarize

GLOSSARY = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from keys(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item, f"{path}[]")
    else:
        path = re.sub(r"_(ttft|tpot|itl|e2el)_ms$", "_{M}_ms", path)
        path = re.sub(r"\bp[\d.]+_", "p{P}_", path)
        yield re.sub(r"(by_class\.).*", r"\1{class}", path)


def test_glossary_and_result_have_the_same_keys() -> None:
    timeline = Timeline()
    for record in three_requests():
        if record.t_ns == 0 and record.ev == "arrived":
            timeline.feed(arrived(0, "e", e2el=1))
        timeline.feed(record)
    result = set(keys(summarize(timeline, SummaryOptions(percentiles=(50, 99.9)))))
    section = GLOSSARY.read_text().split("## Keys of the result")[1].split("\n## ")[0]
    documented = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert result == set(documented)

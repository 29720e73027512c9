"""Mooncake: long-context requests whose hashes say which prompts begin alike.

Source: Qin et al., Mooncake (FAST 2025, arXiv 2407.00079; kvcache-ai/Mooncake, FAST25-release, Apache-2.0).

Mechanism: the rows of the jsonl are replayed: timestamp (ms), input_length, output_length, hash_ids. A hash
stands for a block of 512 tokens and all blocks before it: equal ids are equal prefixes. Requests carry them
in ``features["block_hashes"]`` (with ``features["block_tokens"]``), and token ids made of them, so that any
prefix store finds the same prefixes. Stamps that were written in ticks of some seconds are spread over their
tick, or bursts would be artefacts.

Symbols: R -> request_rate; p -> share that thinning keeps; B -> block_tokens.

Deviations:
1. Where at least half of the gaps are 0, times inside a tick are drawn uniformly, in the order of the file;
   the tick is the median gap between different stamps. ``spread_ticks: false`` replays the stamps.
2. Tokens are made up: prompts that share no block share no token prefix but by chance.

Faithful when: ceil(input_length / B) hashes on every row; reuse by an infinite cache and by LRU caches of 1,
3, 10 and 50 million tokens is as measured on the published files; a hit is a prefix and never longer than
the prompt.

Tier: stable.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field

from servelab.core.api import Context
from servelab.plugins.workloads._ids import BlockIds
from servelab.plugins.workloads._reuse import reusable_tokens
from servelab.plugins.workloads._trace import Columns, Replay, Row, TraceConfig, sliced, taken
from servelab.plugins.workloads._trace_path import must_be_stated, trace_path
from servelab.plugins.workloads._trace_text import Source, believable

NS_PER_MS = 1_000_000
TIME, PROMPT, OUTPUT, HASHES = "timestamp", "input_length", "output_length", "hash_ids"
FIELDS = (TIME, PROMPT, OUTPUT, HASHES)
REMEDY = "fetch the publisher's: servelab data fetch mooncake_conversation (or mooncake_toolagent, ...)"


class MooncakeConfig(TraceConfig):
    """Settings of the ``mooncake`` workload."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="jsonl of Mooncake: a file, cache:FILE, or the name of a fetched data set "
        "(mooncake_conversation, mooncake_toolagent, mooncake_synthetic). Must be stated.",
    )
    block_tokens: int = Field(
        default=512, ge=1, le=1_000_000, description="Tokens of a block, B. The trace's: 512."
    )
    spread_ticks: bool = Field(
        default=True,
        description="Where most stamps are equal to the one before, spread requests uniformly over the tick.",
    )
    lru_tokens: tuple[int, ...] = Field(
        default=(1_000_000, 3_000_000, 10_000_000, 50_000_000),
        description="Sizes in tokens of one least-recently-used pool, for which ``describe`` tells what "
        "share of prompt tokens it would reuse.",
    )


class Mooncake(Replay):
    """Open loop. The file is read at construction; 28 bytes a request and 8 a block.

    Raises:
        ConfigError: no path.
        WorkloadError: the file, the slice, or a request's length.
    """

    def __init__(self, config: MooncakeConfig, ctx: Context) -> None:
        self.root = ctx.rng.getrandbits(64)
        path = trace_path(must_be_stated(config.path, "mooncake", "mooncake_conversation"), REMEDY)
        self._block, self._lru = config.block_tokens, config.lru_tokens
        self._hashes, self._starts = array("q"), array("q", [0])
        """Hashes of all rows of the file, and where each row's begin; a tag is the number of the row."""
        read = self._read(path)
        tick_ns = tick(read.times) if config.spread_ticks else None
        begin_ns = read.times[0] if read else 0
        if tick_ns is not None:
            read.times = spread(read.times, tick_ns, self._stream("ticks"))
        rows = zip(read.times, read.prompts, read.outputs, read.tags, strict=True)
        columns, done = taken(sliced(rows, config, begin_ns), config, self._stream("thin"))
        done |= {
            "traffic": f"Mooncake, {path.name}",
            "tick_ms": None if tick_ns is None else tick_ns / NS_PER_MS,
        }
        super().__init__(config, ctx, columns, done)
        self._done["reuse"] = self._reuse()

    def hashes(self, place: int) -> Sequence[int]:
        """One per block of the request's prompt."""
        row = self._columns.tags[place]
        blocks = ceil(self._columns.prompts[place] / self._block)
        return self._hashes[self._starts[row] : self._starts[row] + blocks]

    def about(self, place: int) -> Mapping[str, Any]:
        features = {"block_hashes": tuple(self.hashes(place)), "block_tokens": self._block}
        return {"features": features}

    def ids(self, place: int, length: int) -> Sequence[int]:
        key = f"{self.root}/block"
        return BlockIds(key, tuple(self.hashes(place)), self._block, length, self._vocab)

    def scale_prompts(self, by: float) -> None:
        """Blocks become shorter or longer, and keep their number: what is shared stays shared."""
        prompts, whole = self._columns.prompts, self._block
        self._block = max(1, round(whole * by))
        for place, tokens in enumerate(prompts):
            full = ceil(tokens / whole) - 1
            rest = max(1, min(self._block, round((tokens - full * whole) * by)))
            prompts[place] = full * self._block + rest

    def _read(self, path: Path) -> Columns:
        """All rows of the file."""
        source, read = Source(path, REMEDY), Columns()
        for row in believable(source, self._rows(source), ((PROMPT, 1), (OUTPUT, 2))):
            read.add(*row)
        return read

    def _rows(self, source: Source) -> Iterator[Row]:
        last = 0
        for number, line in enumerate(line for line in source.lines() if line.strip()):
            row = _object(source, line)
            time_ms, prompt, output = (_count(source, row, name) for name in (TIME, PROMPT, OUTPUT))
            source.in_order(time_ms, last, TIME, str(time_ms))
            last = time_ms
            source.served(prompt, output, (PROMPT, OUTPUT))
            hashes, blocks = row[HASHES], ceil(prompt / self._block)
            whole = isinstance(hashes, list) and all(type(h) is int and 0 <= h < 1 << 63 for h in hashes)
            if not whole or len(hashes) != blocks:
                raise source.fault(
                    f"{len(hashes)} block hashes for {prompt} tokens"
                    if whole
                    else "the block hashes are no list of whole numbers",
                    HASHES,
                    f"each block of {self._block} tokens has one, which makes {blocks}",
                    f"set workload.block_tokens to that of the file, or {REMEDY}",
                )
            self._hashes.extend(hashes)
            self._starts.append(len(self._hashes))
            yield time_ms * NS_PER_MS, prompt, output, number

    def _reuse(self) -> dict[str, Any]:
        prompts = self._columns.prompts
        requests = [(prompts[i], self.hashes(i)) for i in range(len(prompts))]
        total = sum(prompts)
        return {
            "block_tokens": self._block,
            "blocks": len({one for _, hashes in requests for one in hashes}),
            "infinite": reusable_tokens(requests, self._block) / total,
            "lru": {str(size): reusable_tokens(requests, self._block, size) / total for size in self._lru},
        }


def tick(times: Sequence[int]) -> int | None:
    """Median gap between different stamps, where at least half of all gaps are 0; None: stamps are exact."""
    gaps = [after - before for before, after in pairwise(times)]
    apart = sorted(gap for gap in gaps if gap)
    return apart[len(apart) // 2] if apart and 2 * len(apart) <= len(gaps) else None


def spread(times: Sequence[int], tick_ns: int, draws: Random) -> array[int]:
    """Requests of one stamp uniformly over the tick that begins with it, in order, none beyond the next."""
    found = array("q")
    groups = [(stamp, sum(1 for _ in same)) for stamp, same in groupby(times)]
    for i, (stamp, n) in enumerate(groups):
        width = min(tick_ns, groups[i + 1][0] - stamp) if i + 1 < len(groups) else tick_ns
        found.extend(sorted(stamp + int(draws.random() * width) for _ in range(n)))
    return found


def _object(source: Source, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise source.fault(
            "a line is not JSON",
            "",
            str(exc),
            "complete the line or delete it: the file may be cut off there",
        ) from exc
    if not isinstance(row, dict):
        raise source.fault(
            "a line is no JSON object", "", f"rows are one line each, with {', '.join(FIELDS)}", REMEDY
        )
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise source.fault(
            f"a row without {missing[0]!r}", missing[0], f"rows have {', '.join(FIELDS)}", REMEDY
        )
    return row


def _count(source: Source, row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if type(value) is not int or not 0 <= value < 1 << 31:
        said = "is negative" if isinstance(value, int) and value < 0 else "is no believable whole number"
        raise source.fault(
            f"{value!r:.30} {said}", name, "rows hold whole numbers", "correct it or delete the row"
        )
    return value

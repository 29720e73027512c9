"""The Mooncake traces: hashes, what they share, and ticks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.compose.conftest import MODEL

from servelab.core.api import Arrival, ConfigError, Context, WorkloadError
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.records import RequestFinished
from servelab.core.registry import Registry
from servelab.core.run_folder import RunFolder
from servelab.plugins.workloads._reuse import reusable_tokens
from servelab.plugins.workloads.mooncake import Mooncake, MooncakeConfig, spread, tick

FILE = Path(__file__).with_name("files") / "mooncake.jsonl"
MS = 1_000_000
Build = Callable[..., Mooncake]


@pytest.fixture
def mooncake(context: Callable[..., Context]) -> Build:
    def make(*, seed: int = 0, max_model_len: int = 200_000, **settings: Any) -> Mooncake:
        config = MooncakeConfig.model_validate({"path": str(FILE), **settings})
        return Mooncake(config, context(seed, max_model_len))

    return make


def requests(workload: Mooncake) -> list[Arrival]:
    return [item for item in workload.arrivals() if isinstance(item, Arrival)]


def prompts(workload: Mooncake) -> list[list[int]]:
    return [list(a.spec.prompt_ids or ()) for a in requests(workload)]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_rows_become_requests_with_their_hashes(mooncake: Build) -> None:
    found = requests(mooncake())
    assert [a.time_ns // MS for a in found] == [0, 40, 40, 90, 2000]
    assert [a.truth.output_tokens for a in found if a.truth] == [5, 7, 50, 9, 20]
    assert found[1].spec.features == {"block_hashes": (0, 1, 3), "block_tokens": 512}


def test_prompts_share_what_their_hashes_say(mooncake: Build) -> None:
    a, b, c, d, e = prompts(mooncake())
    assert [len(ids) for ids in (a, b, c, d, e)] == [1300, 1400, 600, 1030, 512]
    assert 1024 <= common(a, b) < 1034  # two blocks; a token more by chance, one in 259
    assert common(a, d) == 1030
    assert common(c, e) == 512
    assert common(a, c) < 10
    assert prompts(mooncake(seed=1))[0] != a


def test_reuse_by_hand(mooncake: Build) -> None:
    """The second finds two blocks, the fourth all of its own 1,030 tokens, the last its only block."""
    reuse = mooncake(lru_tokens=[1024]).describe()["reuse"]
    assert reuse["infinite"] == (1024 + 1030 + 512) / (1300 + 1400 + 600 + 1030 + 512)
    assert reuse["blocks"] == 6
    # of two blocks: 1, 2; then 1, 3; then 4, 5; then 1, 2: nothing is ever there when it is asked for
    assert reuse["lru"] == {"1024": 0}


def test_lru_drops_what_was_used_longest_ago() -> None:
    asked = [(1, [0]), (1, [1]), (1, [0]), (1, [2]), (1, [0]), (1, [1])]
    assert reusable_tokens(asked, 1, 2) == 2  # both later zeros; 1 went when 2 came
    assert reusable_tokens(asked, 1) == 3
    assert reusable_tokens([(3, [7, 8]), (3, [9, 8])], 2) == 0  # a hit is a prefix


def test_cut_and_scaled_prompts_keep_what_they_share(mooncake: Build) -> None:
    short = mooncake(max_model_len=800)
    assert [len(ids) for ids in prompts(short)] == [600, 600, 600, 600, 512]
    assert requests(short)[0].spec.features["block_hashes"] == (0, 1)
    toy = mooncake(prompt_scale=1 / 64)
    assert [a.spec.prompt_tokens for a in requests(toy)] == [20, 22, 9, 17, 8]
    assert toy.describe()["reuse"]["block_tokens"] == 8
    a, b, *_ = prompts(toy)
    assert common(a, b) >= 16
    assert toy.describe()["reuse"]["infinite"] == (16 + 17 + 8) / 76


def test_slices_keep_hashes_with_their_rows(mooncake: Build) -> None:
    part = requests(mooncake(start_s=0.04, num_requests=3))
    assert [a.spec.features["block_hashes"] for a in part] == [(0, 1, 3), (4, 5), (0, 1, 2)]


def test_ticks_are_found_and_spread(mooncake: Build, tmp_path: Path) -> None:
    stamps = [0] * 10 + [3000] * 10 + [6001] * 10 + [30_000] * 10
    line = '{{"timestamp": {}, "input_length": 5, "output_length": 3, "hash_ids": [{}]}}\n'
    path = tmp_path / "ticks.jsonl"
    path.write_text("".join(line.format(t, i) for i, t in enumerate(stamps)))
    workload = mooncake(path=str(path))
    times = [a.time_ns / MS for a in requests(workload)]
    assert workload.describe()["tick_ms"] == 3001
    assert times == sorted(times) and len(set(times)) == 40
    assert all(stamp <= times[i] < stamp + 3001 for i, stamp in enumerate(stamps))
    assert times[9] - times[0] > 1000 and times[39] - times[30] > 1000
    assert [a.spec.features["block_hashes"] for a in requests(workload)] == [(i,) for i in range(40)]
    kept = mooncake(path=str(path), spread_ticks=False)
    assert [a.time_ns / MS for a in requests(kept)] == stamps
    assert kept.describe()["tick_ms"] is None
    assert [a.time_ns for a in requests(mooncake(path=str(path)))] == [round(t * MS) for t in times]
    assert [a.time_ns for a in requests(mooncake(path=str(path), seed=1))] != [round(t * MS) for t in times]


def test_spread_is_uniform_in_the_tick() -> None:
    times = spread([0] * 20_000 + [1000], 3000, Random(1))
    assert max(times[:-1]) < 1000  # not beyond the next stamp
    times = spread([0] * 20_000, 3000, Random(1))
    assert sum(times) / 20_000 == pytest.approx(1500, abs=20)
    assert tick([0, 5, 5, 9]) is None
    assert tick([0, 0, 0, 3, 3, 6, 6, 10]) == 3


BAD = {
    "not json": ('{"timestamp": 0,\n', ["not JSON", "line 1"]),
    "no field": ('{"timestamp": 0, "input_length": 3, "output_length": 3}\n', ["without 'hash_ids'"]),
    "a list": ("[1, 2]\n", ["no JSON object", "line 1"]),
    "fraction": (
        '{"timestamp": 0.5, "input_length": 3, "output_length": 3, "hash_ids": [1]}\n',
        ["0.5 is no believable whole number", "'timestamp'"],
    ),
    "negative": (
        '{"timestamp": 0, "input_length": -3, "output_length": 3, "hash_ids": [1]}\n',
        ["-3 is negative", "'input_length'"],
    ),
    "no prompt": (
        '{"timestamp": 0, "input_length": 0, "output_length": 3, "hash_ids": []}\n',
        ["0 prompt tokens", "'input_length'"],
    ),
    "too few hashes": (
        '{"timestamp": 0, "input_length": 513, "output_length": 3, "hash_ids": [1]}\n',
        ["1 block hashes for 513 tokens", "makes 2", "'hash_ids'"],
    ),
    "hashes of text": (
        '{"timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": ["a"]}\n',
        ["no list of whole numbers"],
    ),
    "order": (
        '{"timestamp": 5, "input_length": 5, "output_length": 3, "hash_ids": [1]}\n'
        '{"timestamp": 4, "input_length": 5, "output_length": 3, "hash_ids": [1]}\n',
        ["4 is earlier", "line 2"],
    ),
    "pointer": ("version https://git-lfs.github.com/spec/v1\n", ["LFS pointer"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_line_and_field(mooncake: Build, tmp_path: Path, case: str) -> None:
    text, said = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError) as raised:
        mooncake(path=str(path))
    assert all(part in str(raised.value) for part in (*said, "bad.jsonl")), str(raised.value)


def test_a_path_must_be_stated(mooncake: Build) -> None:
    with pytest.raises(ConfigError) as raised:
        mooncake(path=None)
    assert "servelab data fetch mooncake_conversation" in str(raised.value)


def test_the_published_synthetic_trace(mooncake: Build, data: Path) -> None:
    """Figures of the workloads card, measured on the real file."""
    told = mooncake(path=str(data / "mooncake" / "synthetic_trace.jsonl")).describe()
    assert told["requests"] == 3_993
    assert told["duration_s"] == pytest.approx(1022, abs=0.5)
    assert told["prompt_tokens"]["mean"] == pytest.approx(15_326, abs=1)
    assert (told["prompt_tokens"]["p50"], round(told["prompt_tokens"]["p99"])) == (11_587, 66_456)
    assert told["output_tokens"]["mean"] == pytest.approx(149, abs=0.5)
    assert told["tick_ms"] is None
    reuse = told["reuse"]
    assert reuse["blocks"] == 43_924
    assert round(reuse["infinite"], 3) == 0.651
    assert [round(share, 3) for share in reuse["lru"].values()] == [0.142, 0.315, 0.577, 0.651]


def test_the_published_conversations(mooncake: Build, data: Path) -> None:
    """Figures of the workloads card; the stamps are in ticks of 3 s, which make a CV of 3 of their own."""
    path = data / "mooncake" / "conversation_trace.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the real traces here")
    told = mooncake(path=str(path)).describe()
    assert (told["requests"], told["tick_ms"]) == (12_031, 3000)
    assert told["iat_cv"] == pytest.approx(1, abs=0.02)
    assert mooncake(path=str(path), spread_ticks=False).describe()["iat_cv"] == pytest.approx(3.0, abs=0.05)
    assert round(told["prompt_tokens"]["mean"]) == 12_035
    reuse = told["reuse"]
    assert (reuse["blocks"], round(reuse["infinite"], 3)) == (182_790, 0.374)
    assert [round(share, 3) for share in reuse["lru"].values()] == [0.054, 0.138, 0.291, 0.371]


def test_a_prefix_store_reuses_what_the_hashes_say(tmp_path: Path) -> None:
    """The store sees tokens and pages of 16 alone. Requests come one after the other and find:
    two blocks; all whole pages of a prompt; a whole block but its last page, as one token must be computed.
    """
    path = tmp_path / "apart.jsonl"
    lines = [json.loads(line) for line in FILE.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({**one, "timestamp": 99_000 * i}) + "\n" for i, one in enumerate(lines))
    )
    raw = {
        "scheduler": {"name": "vllm_v1"},
        "kvcache": {"name": "paged", "page_tokens": 16},
        "prefix": {"name": "hash"},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted", "num_kv_pages": 2000},
        "workload": {"name": "mooncake", "path": str(path)},
        "task": {"name": "bench"},
        "model": {**MODEL, "vocab": 30_000, "max_position": 4096},
        "clock": {"name": "virtual"},
        "observers": [{"name": "jsonl"}],
    }
    registry = Registry.load()
    run = compose(validate(raw, registry), registry, run_dir=tmp_path)
    run.task.run(run)
    ended = [record for record in RunFolder.find(tmp_path).events() if isinstance(record, RequestFinished)]
    assert {record.request: record.cached_tokens for record in ended} == {
        "r0": 0,
        "r1": 1024,
        "r2": 0,
        "r3": 1024,
        "r4": 496,
    }

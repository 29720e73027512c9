"""The log: the coding is undone exactly, and every failure says what and where."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.metrics.logs import arrived, ended, started, step, three_requests

from servelab.core.bus import Bus
from servelab.core.context import Context
from servelab.core.errors import ConfigError, PluginCallError, ServeLabError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.logs import (
    MOST_DROPPED,
    Decoder,
    Encoder,
    decode_counts,
    decode_list,
    encode_counts,
    encode_list,
    read_log,
)
from servelab.core.metrics import LogError, Timeline, summarize
from servelab.core.records import Planned, Record, RequestFinished, RequestPreempted, RunStarted, StepDone
from servelab.plugins.observers.jsonl import JsonlConfig, JsonlObserver

names = st.sampled_from([f"r{i}" for i in range(8)]) | st.text(max_size=4)
times = st.integers(0, 10**15)
counts = st.integers(0, 5) | st.integers(0, 10**6)


def context(folder: Path | None) -> Context:
    model = ModelFacts(
        name="tiny", layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=16, vocab=32, max_position=64
    )
    limits = Limits(max_batch_tokens=64, max_batch_requests=8, max_model_len=64)
    return Context(
        kind="observer",
        name="jsonl",
        rng=random.Random(0),
        model=model,
        hardware=None,
        limits=limits,
        run_dir=folder,
    )


def write(folder: Path, records: list[Record], **settings: bool) -> None:
    observer = JsonlObserver(JsonlConfig(**settings), context(folder))
    bus = Bus([observer])
    for record in records:
        bus.emit(record)
    observer.close()


@st.composite
def steps(draw: st.DrawFn) -> StepDone:
    requests = draw(st.lists(names, max_size=6))
    size = len(requests)
    ends = draw(st.lists(times, max_size=4))
    ends_now = draw(st.booleans())
    return StepDone(
        t_ns=ends[-1] if ends and ends_now else draw(times),
        engine=draw(st.integers(0, 1)),
        lane=draw(st.integers(0, 1)),
        step=draw(counts),
        start_ns=draw(times),
        ends_ns=ends,
        requests=requests,
        tokens=draw(st.lists(counts, min_size=size, max_size=size)),
        emitted=draw(st.lists(counts, min_size=size, max_size=size)),
        waiting=draw(counts),
        running=draw(counts),
        free_pages=tuple(draw(st.lists(counts, max_size=3))),
        unusable_pages=tuple(draw(st.lists(counts, max_size=3))),
    )


def pairs() -> st.SearchStrategy[list[tuple[str, str]]]:
    return st.lists(st.tuples(names, st.sampled_from(["no room", "budget", ""])), max_size=5)


def planned(work: list[tuple[str, int]], **more: Any) -> Planned:
    return Planned(requests=[name for name, _ in work], tokens=[n for _, n in work], **more)


plans = st.builds(
    planned,
    t_ns=times,
    engine=st.integers(0, 1),
    lane=st.integers(0, 1),
    step=counts,
    work=st.lists(st.tuples(names, counts), max_size=6),
    preempted=st.lists(st.tuples(names, st.just("swap"), names), max_size=2),
    swapped_in=pairs(),
    rejected=pairs(),
    aborted=pairs(),
    deferred=pairs(),
    held=st.integers(1, 64),
    wake_at=st.none() | times,
)
others = st.one_of(
    st.builds(RequestPreempted, t_ns=times, request=names, mode=names, reason=names, lost_tokens=counts),
    st.builds(
        RequestFinished,
        t_ns=times,
        engine=st.integers(0, 1),
        request=names,
        outcome=st.sampled_from(["completed", "failed"]),
        reason=names,
        output_tokens=counts,
    ),
    st.builds(RunStarted, t_ns=times, info=st.dictionaries(names, st.none() | names | counts, max_size=3)),
)


@given(st.lists(steps() | plans | others, max_size=30))
def test_coding_is_undone_exactly(records: list[Record]) -> None:
    encode, decode = Encoder(), Decoder()
    lines = [json.dumps(encode(record)) for record in records]
    assert [decode(json.loads(line)) for line in lines] == records


@given(st.lists(names, max_size=8), st.lists(names, max_size=8))
def test_lists(old: list[str], new: list[str]) -> None:
    assert decode_list(old, encode_list(old, new)) == new


def plain_change(old: list[str], new: list[str]) -> Any:
    """How the format says a list is coded against its predecessor, item by item."""
    kept = [item for item in old if item in new]
    twice = len(set(old)) < len(old) or len(set(new)) < len(new)
    if old == new:
        return None
    if twice or not kept or kept != [item for item in new if item in old]:
        return new
    dropped = [i for i, item in enumerate(old) if item not in new]
    added = [[j, item] for j, item in enumerate(new) if item not in old]
    return {**({"del": dropped} if dropped else {}), **({"add": added} if added else {})}


few = st.lists(st.sampled_from("abcdefghijklmno"), max_size=15)


@given(few, few, st.booleans())
def test_changes_found_by_slices_are_those_found_item_by_item(
    old: list[str], new: list[str], as_batches: bool
) -> None:
    if as_batches:  # some leave, others come at the end
        old = sorted(set(old))
        new = [item for item in old if item in new] + sorted({*new} - {*old})
    assert json.dumps(encode_list(old, new)) == json.dumps(plain_change(old, new))


@pytest.mark.parametrize("gone", [0, 1, MOST_DROPPED, MOST_DROPPED + 1, 49, 50])
def test_many_may_leave_at_once(gone: int) -> None:
    old = [f"r{i}" for i in range(50)]
    dropped = old[: 2 * gone : 2] if gone <= 25 else old[:gone]
    new = [*(item for item in old if item not in dropped), "x", "y"]
    assert encode_list(old, new) == plain_change(old, new)


@given(st.lists(counts, max_size=8), counts)
def test_counts(values: list[int], usual: int) -> None:
    assert decode_counts(len(values), encode_counts(values, usual), usual) == values


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        ("abc", "abc", None),
        ("abc", "abcd", {"add": [[3, "d"]]}),
        ("abc", "xabc", {"add": [[0, "x"]]}),
        ("abc", "ac", {"del": [1]}),
        ("abcd", "xbcyd", {"del": [0], "add": [[0, "x"], [3, "y"]]}),
        ("abc", "cba", ["c", "b", "a"]),
        ("abc", "xyz", ["x", "y", "z"]),
        ("ab", "aab", ["a", "a", "b"]),
        ("ab", "", []),
    ],
)
def test_list_coding_by_hand(old: str, new: str, change: Any) -> None:
    assert encode_list(list(old), list(new)) == change


def test_files_give_the_records_back(tmp_path: Path) -> None:
    plan = Planned(
        t_ns=5,
        lane=0,
        step=1,
        requests=["a", "b"],
        tokens=[10, 1],
        preempted=[("c", "swap", "no pages")],
        swapped_in=[],
        rejected=[],
        aborted=[],
        deferred=[("d", "budget")],
        held=1,
    )
    events = three_requests()
    write(tmp_path, [*events[:4], plan, *events[4:]])
    assert list(read_log(tmp_path / "events.jsonl")) == events
    assert list(read_log(tmp_path / "plan.jsonl")) == [plan]


def test_repetition_costs_nothing(tmp_path: Path) -> None:
    batch = {f"request-{i}": (1, 64) for i in range(256)}
    again = [step(n * 64, [n * 64 + i + 1 for i in range(64)], batch, number=n * 64) for n in range(3)]
    write(tmp_path, [started(), *again, ended(192)])
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert list(read_log(tmp_path / "events.jsonl"))[1:4] == again
    assert "requests" in json.loads(lines[2])
    assert {"requests", "tokens", "emitted"}.isdisjoint(json.loads(lines[3]))
    assert len(lines[4]) < 1000


@pytest.mark.parametrize(("kept", "dropped"), [("events", "plans"), ("plans", "events")])
def test_each_file_can_be_left_out(tmp_path: Path, kept: str, dropped: str) -> None:
    files = {"events": "events.jsonl", "plans": "plan.jsonl"}
    write(tmp_path, [started(), ended(1)], **{dropped: False})
    assert [path.name for path in tmp_path.iterdir()] == [files[kept]]


def test_summary_is_the_same_live_and_from_the_file(tmp_path: Path) -> None:
    write(tmp_path, three_requests())
    live = summarize(Timeline().feed_all(three_requests()))
    assert summarize(Timeline().feed_all(read_log(tmp_path / "events.jsonl"))) == live


def cut(tmp_path: Path, keep: int) -> Path:
    write(tmp_path, [started(), arrived(0, "a"), ended(1)])
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-keep])
    return path


def test_a_truncated_last_line_is_reported_or_skipped(tmp_path: Path) -> None:
    path = cut(tmp_path, 7)
    with pytest.raises(LogError, match="ends in the middle of a line") as error:
        list(read_log(path))
    assert f"{path}, line 4" in error.value.where
    assert "allow_truncated=True" in error.value.do
    assert [record.ev for record in read_log(path, allow_truncated=True)] == ["run_started", "arrived"]


def test_a_last_line_that_lost_only_its_end_of_line_is_whole(tmp_path: Path) -> None:
    assert [record.ev for record in read_log(cut(tmp_path, 1))][-1] == "run_finished"


@pytest.mark.parametrize(
    "bad", ["{oops", '{"ev":"nonsense","t_ns":1}', '{"ev":"arrived","t_ns":1}', "[]", "3"]
)
def test_a_damaged_line_is_an_error_even_when_truncation_is_allowed(tmp_path: Path, bad: str) -> None:
    write(tmp_path, [started(), ended(1)])
    path = tmp_path / "events.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], bad, *lines[2:]]) + "\n")
    with pytest.raises(LogError, match="damaged line") as error:
        list(read_log(path, allow_truncated=True))
    assert error.value.where == f"{path}, line 3"


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(LogError, match="not a ServeLab log"):
        list(read_log(path))
    path.write_text('{"log": "servelab-events", "format": 99, "schema": 1}\n')
    with pytest.raises(LogError, match="another version"):
        list(read_log(path))


def test_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="nowhere to write"):
        JsonlObserver(JsonlConfig(), context(None))


def test_composing_alone_writes_nothing(tmp_path: Path) -> None:
    JsonlObserver(JsonlConfig(), context(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    observer = JsonlObserver(JsonlConfig(), context(tmp_path / "file"))
    with pytest.raises(ServeLabError, match="cannot be written") as error:
        observer.servelab_on_record(started())
    assert error.value.where and error.value.why and error.value.do


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_explained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be logged ends at once, and what closes its files has nothing to add."""
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode, **how: real(Path("/dev/full"), "w", **how))
    bus = Bus([JsonlObserver(JsonlConfig(), context(tmp_path))])
    with pytest.raises(PluginCallError, match="No space left on device") as error:
        bus.emit(started())
    assert "events.jsonl cannot be written" in str(error.value) and "free space" in error.value.do
    bus.emit(ended(1))


@pytest.mark.parametrize("name", ["events.jsonl", "plan.jsonl", "results.json"])
def test_a_used_folder_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError, match="over another run") as error:
        JsonlObserver(JsonlConfig(), context(tmp_path))
    assert error.value.where == str(tmp_path)
    assert name in error.value.why and error.value.do
    assert (tmp_path / name).read_text() == "old"


def test_two_runs_that_start_together_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = (JsonlObserver(JsonlConfig(), context(tmp_path)) for _ in range(2))
    first.servelab_on_record(started())
    with pytest.raises(ConfigError, match="over another run"):
        second.servelab_on_record(started())
    first.close()
    assert len(list(read_log(tmp_path / "events.jsonl"))) == 1


def flushed(path: Path) -> int:
    return sum(1 for _ in read_log(path, allow_truncated=True))


def test_the_log_of_a_killed_run_lacks_only_its_last_part(tmp_path: Path) -> None:
    observer = JsonlObserver(JsonlConfig(plans=False), context(tmp_path))
    for i in range(1500):
        observer.servelab_on_record(arrived(i, f"r{i}"))
    assert flushed(tmp_path / "events.jsonl") >= 1000
    observer.servelab_on_record(arrived(1_000_001_000, "late"))
    assert flushed(tmp_path / "events.jsonl") == 1501
    observer.close()


@pytest.mark.parametrize(("clock", "soon"), [("wall", True), ("virtual", False)])
def test_a_second_counts_only_where_it_is_real(tmp_path: Path, clock: str, soon: bool) -> None:
    observer = JsonlObserver(JsonlConfig(plans=False), context(tmp_path))
    observer.servelab_on_record(started(clock=clock))
    assert flushed(tmp_path / "events.jsonl") == 1
    observer.servelab_on_record(arrived(999, "a"))
    assert flushed(tmp_path / "events.jsonl") == 1
    observer.servelab_on_record(arrived(1000, "b"))
    assert flushed(tmp_path / "events.jsonl") == (3 if soon else 1)
    for i in range(997):
        observer.servelab_on_record(arrived(1001, f"r{i}"))
    before = flushed(tmp_path / "events.jsonl")
    observer.servelab_on_record(arrived(1001, "c"))
    assert (before, flushed(tmp_path / "events.jsonl")) == ((3, 3) if soon else (1, 1001))
    observer.close()
    assert flushed(tmp_path / "events.jsonl") == 1001


def test_what_follows_a_record_that_cannot_be_written_still_is(tmp_path: Path) -> None:
    observer = JsonlObserver(JsonlConfig(plans=False), context(tmp_path))
    records = [started(clock="wall"), arrived(1, "a"), arrived(2, b"b"), arrived(3, "c")]  # type: ignore[arg-type]
    for record in records:
        observer.servelab_on_record(record)
    with pytest.raises(ServeLabError, match="cannot be written") as error:
        observer.servelab_on_record(arrived(1000, "d"))
    assert error.value.where == "record 'arrived' at 2000000 ns"
    observer.close()
    assert [x.t_ns // 10**6 for x in read_log(tmp_path / "events.jsonl")] == [0, 1, 3, 1000]


def test_what_json_does_not_know_is_refused(tmp_path: Path) -> None:
    observer = JsonlObserver(JsonlConfig(), context(tmp_path))
    with pytest.raises(ServeLabError, match=r"cannot be written to events\.jsonl"):
        observer.servelab_on_record(started(folder=Path("x")))
    with pytest.raises(ServeLabError, match=r"cannot be written to events\.jsonl"):
        observer.servelab_on_record(started(ratio=float("nan")))
    observer.close()
    observer.close()

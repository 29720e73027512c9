"""The trace keeps to the rules of the Trace Event Format, and shows what the records say."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.commands.runs import Swapper, drawn, serve
from tests.metrics.logs import MS, admitted, arrived, ended, finished, preempted, started, step
from tests.observers.test_jsonl import context

from servelab.core.bus import Bus
from servelab.core.errors import ConfigError, PluginCallError, ServeLabError
from servelab.core.metrics import Timeline
from servelab.core.metrics.phases import OFF
from servelab.core.records import (
    QualityBegan,
    QualityMeasured,
    Record,
    RequestPreempted,
    StepDone,
    TransferStarted,
)
from servelab.plugins.observers.trace import TraceConfig, TraceObserver

Event = dict[str, Any]
ENGINE = 2
"""Process of engine 0."""


def trace(folder: Path, records: list[Record], **settings: int) -> list[Event]:
    bus = Bus([TraceObserver(TraceConfig(**settings), context(folder))])
    for record in records:
        bus.emit(record)
    return read(folder)


def read(folder: Path) -> list[Event]:
    found: list[Event] = json.loads((folder / "trace.json").read_text())
    check(found)
    return found


def check(events: list[Event]) -> None:
    """The rules of the format, for the events we use."""
    stacks: dict[tuple[Any, ...], list[tuple[str, float]]] = defaultdict(list)
    lanes: dict[tuple[int, int], float] = {}
    counters: dict[tuple[int, str], float] = {}
    named = {(e["pid"], e["name"]) for e in events if e["ph"] == "M"}
    for event in events:
        phase, pid = event["ph"], event["pid"]
        assert (pid, "process_name") in named
        if phase == "M":
            assert isinstance(event["args"], dict)
            continue
        assert event["ts"] >= 0 and event["name"]
        if phase == "X":
            assert event["dur"] >= 0
            key = pid, event["tid"]
            assert event["ts"] >= lanes.get(key, 0) - 1e-6, "slices of a thread must nest, ours never overlap"
            lanes[key] = event["ts"] + event["dur"]
        elif phase == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
            counters[pid, event["name"]] = event["ts"]
        elif phase in "bne":
            key = pid, event["cat"], event["id2"]["local"]
            stack = stacks[key]
            if phase == "b":
                assert not stack or event["ts"] >= stack[-1][1]
                stack.append((event["name"], event["ts"]))
            elif phase == "n":
                assert stack, "an instant belongs into a slice"
                assert event["ts"] >= stack[0][1]
            else:
                name, begun = stack.pop()
                assert name == event["name"], "ends close the innermost slice"
                assert event["ts"] >= begun
                if stack:
                    stack[-1] = (stack[-1][0], event["ts"])
        else:
            assert phase == "i" and event["s"] in "gpt"
    assert not any(stacks.values()), "every slice is closed"


def three() -> list[Record]:
    """``a`` runs; ``b`` is preempted and comes back; ``c`` never runs."""
    return [
        started(),
        arrived(0, "a", 30),
        admitted(0, "a"),
        arrived(1, "b", 20),
        arrived(2, "c", 20),
        step(0, [10], {"a": (30, 1)}, (60,)),
        admitted(10, "b"),
        step(10, [20.000001], {"a": (1, 1), "b": (20, 1)}, (40,), 1),
        preempted(20.5, "b", 20),
        step(20.5, [25, 30], {"a": (1, 2)}, (50,), 2),
        finished(30, "a", 4),
        admitted(30, "b", resumed=True),
        step(30, [40], {"b": (21, 1)}, (50,), 4),
        finished(40, "b", 2, preemptions=1),
        ended(41, "interrupted"),
    ]


def of(events: list[Event], **fields: Any) -> list[Event]:
    return [e for e in events if all(e.get(name) == value for name, value in fields.items())]


def track(events: list[Event], request: str) -> list[tuple[str, str, float]]:
    (first,) = of(events, ph="b", cat="request", name=request)
    return [(e["ph"], e["name"], e["ts"]) for e in of(events, cat="request", id2=first["id2"])]


def test_launches_and_counters(tmp_path: Path) -> None:
    events = trace(tmp_path, three())
    launches = of(events, ph="X", pid=ENGINE)
    assert [(e["tid"], e["ts"], e["dur"], e["name"]) for e in launches] == [
        (1, 0, 10000, "30 prompt tokens, batch 1"),
        (1, 10000, 10000.001, "20 prompt tokens, batch 2"),  # thousandths are nanoseconds
        (1, 20500, 9500, "decode, batch 1"),
        (1, 30000, 10000, "21 prompt tokens, batch 1"),
    ]
    assert launches[1]["args"] == {
        "step": 1, "steps": 1, "requests": 2, "tokens": 21, "prompt_tokens": 20, "prompts": {"b": 20},
        "emitted": 2,
    }  # fmt: skip
    assert (launches[2]["args"]["steps"], launches[2]["args"]["tokens"]) == (2, 2)
    free = of(events, ph="C", name="KV pool full")
    assert [(e["ts"], e["args"]["free pages"]) for e in free] == [
        (10000, 60), (20000.001, 40), (30000, 50), (40000, 50),
    ]  # fmt: skip
    assert [e["args"] for e in of(events, ph="C", name="requests")][1] == {"waiting": 0, "running": 2}
    assert [e["args"]["output tok/s"] for e in of(events, ph="C", name="lane 0")] == [100, 200, 210.526, 100]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in of(events, ph="M") if "name" in e["args"]}
    assert names == {
        (1, None): "run", (1, 0): "phases", (2, None): "engine 0", (2, 1): "lane 0",
    }  # fmt: skip


def test_the_track_of_a_request(tmp_path: Path) -> None:
    events = trace(tmp_path, three())
    assert track(events, "b") == [
        ("b", "b", 1000), ("b", "queued", 1000), ("e", "queued", 10000),
        ("b", "prefill", 10000), ("e", "prefill", 20000.001), ("b", "decode", 20000.001),
        ("n", "preempted: recompute", 20500), ("e", "decode", 20500),
        ("b", "preempted", 20500), ("e", "preempted", 30000),
        ("b", "recompute", 30000), ("e", "recompute", 40000),
        ("b", "decode", 40000), ("e", "decode", 40000), ("e", "b", 40000),
    ]  # fmt: skip
    (instant,) = of(events, ph="n")
    assert instant["args"] == {"mode": "recompute", "reason": "full", "lost_tokens": 20}
    (end,) = of(events, ph="e", name="b")
    assert end["args"] == {"outcome": "completed", "reason": "stop", "output_tokens": 2}
    assert track(events, "c")[-2:] == [("e", "queued", 41000), ("e", "c", 41000)]  # by the end of the run
    (serving,) = of(events, name="serving")
    assert (serving["ts"], serving["dur"], serving["args"]) == (0, 41000, {"status": "interrupted"})


def test_quality_has_a_slice_of_its_own(tmp_path: Path) -> None:
    one = QualityMeasured(
        t_ns=60 * MS, label="w4", tokens=5, total=5, windows=1, kl_mean=0.25, kl_p99=1, kl_max=1,
        top1_agreement=1, perplexity=2, reference_perplexity=2, linear_bytes=1, reference_linear_bytes=2,
    )  # fmt: skip
    began = QualityBegan(t_ns=50 * MS, labels=["w4"], total=5)
    events = trace(tmp_path, [*three()[:-1], began, one, ended(70)])
    slices = [(e["name"], e["ts"], e["dur"]) for e in of(events, ph="X", pid=1)]
    assert slices == [("serving", 0, 50000), ("quality", 50000, 20000)]
    assert [e["args"] for e in of(events, name="mean KL in nats")] == [{"w4": 0.25}]


def test_a_transfer_under_way_ends_with_the_run(tmp_path: Path) -> None:
    move = TransferStarted(t_ns=39 * MS, transfer=26, request="b", direction="out", pages=2, bytes=64)
    events = trace(tmp_path, [*three()[:-1], move, ended(41)])
    assert [(e["ph"], e["ts"], e["id2"]["local"], e["name"]) for e in of(events, cat="transfer")] == [
        ("b", 39000, "0x1a", "swap out b"), ("e", 41000, "0x1a", "swap out b"),
    ]  # fmt: skip


def test_tracks_are_bounded_and_that_is_said(tmp_path: Path) -> None:
    events = trace(tmp_path / "two", three(), max_requests=2)
    assert {e["name"] for e in of(events, ph="b", cat="request") if e["name"] in "abc"} == {"a", "b"}
    (said,) = of(events, ph="i")
    assert (said["name"], said["ts"]) == ("no tracks from here on: max_requests is 2", 2000)
    none = trace(tmp_path / "none", three(), max_requests=0)
    assert not of(none, cat="request") and not of(none, ph="i") and len(of(none, ph="X")) == 5


def test_a_run_that_was_killed_leaves_a_readable_file(tmp_path: Path) -> None:
    observer = TraceObserver(TraceConfig(), context(tmp_path))
    for record in [*three()[:-1], arrived(2000, "late")]:
        observer.servelab_on_record(record)
    text = (tmp_path / "trace.json").read_text()  # flushed, as the run's time had moved on
    assert not text.endswith("]\n")
    found = json.loads(text + "]")
    assert found[-1]["name"] == "queued" and found[-1]["ts"] == 2_000_000
    observer.servelab_on_run_finished(ended(2000))


def test_an_empty_run(tmp_path: Path) -> None:
    assert [e["name"] for e in trace(tmp_path, [started(), ended(1)]) if e["ph"] == "X"] == ["serving"]
    observer = TraceObserver(TraceConfig(), context(tmp_path / "other"))
    observer.servelab_on_run_finished(ended(1))  # failed before its first record
    assert not (tmp_path / "other").exists()


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 1000), lanes=st.integers(1, 2), flights=st.integers(1, 2))
def test_any_legal_run(tmp_path_factory: pytest.TempPathFactory, seed: int, lanes: int, flights: int) -> None:
    run = serve(
        tmp_path_factory.mktemp("run"),
        scheduler=drawn(),
        seed=seed,
        executor={"num_kv_pages": 13, "num_host_pages": 30},
        workload={
            "request_rate": 300,
            "samples": 2,
            "cancel_fraction": 0.2,
            "patience_ms": {"law": "constant", "value": 60},
        },
        engine={"lanes": lanes, "max_in_flight": flights},
        observers=[{"name": "jsonl"}, {"name": "trace"}],
    )
    events, records = read(run.path), list(run.events())
    steps = [r for r in records if isinstance(r, StepDone)]
    assert [e["args"]["step"] for e in of(events, ph="X", pid=ENGINE)] == [r.step for r in steps]
    moves = [r for r in records if isinstance(r, TransferStarted)]
    assert len(of(events, ph="b", cat="transfer")) == len(moves)
    taken = [r for r in records if isinstance(r, RequestPreempted)]
    assert [e["args"]["reason"] for e in of(events, ph="n")] == [r.reason for r in taken]
    begun = [e["name"] for e in of(events, ph="b", cat="request")]
    assert sum(name in OFF.values() for name in begun) == len(taken)
    for name, facts in Timeline().feed_all(records).requests.items():
        own = track(events, name)
        assert own[0] == ("b", name, facts.arrival_ns / 1000)
        assert own[-1] == ("e", name, (facts.ended_ns or 0) / 1000)
        decodes = [ts for ph, what, ts in own if (ph, what) == ("b", "decode")]
        if facts.times and min(decodes, default=0) != facts.times[0] / 1000:
            assert "paused" in begun  # its first token came while it was paused


def test_swaps_have_a_track(tmp_path: Path) -> None:
    run = serve(
        tmp_path,
        scheduler=Swapper,
        executor={"num_kv_pages": 14, "num_host_pages": 40},
        workload={"request_rate": 2000},
        observers=[{"name": "trace"}, {"name": "jsonl"}],
    )
    events = read(run.path)
    moves = of(events, cat="transfer", ph="b")
    assert moves and {e["name"].split()[1] for e in moves} == {"out", "in"}
    assert all(e["args"]["pages"] > 0 and e["args"]["bytes"] > 0 for e in moves)
    names = [name for ph, name, _ in track(events, moves[0]["name"].split()[2]) if ph == "b"]
    assert names[2:] == ["prefill", "decode", "swap out", "swapped", "swap in", "decode"]


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("old")
    with pytest.raises(ConfigError, match="over another run") as error:
        TraceObserver(TraceConfig(), context(tmp_path))
    assert "trace.json" in error.value.why
    assert (tmp_path / "trace.json").read_text() == "old"


def test_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="nowhere to write"):
        TraceObserver(TraceConfig(), context(None))


def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    observer = TraceObserver(TraceConfig(), context(tmp_path / "file"))
    with pytest.raises(ServeLabError, match="cannot be written") as error:
        observer.servelab_on_record(started())
    assert error.value.where and error.value.why and error.value.do


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode, **how: real(Path("/dev/full"), "w", **how))
    bus = Bus([TraceObserver(TraceConfig(), context(tmp_path))])
    bus.emit(started())
    with pytest.raises(PluginCallError, match="No space left on device"):
        bus.emit(ended(1))

"""Records of output tokens: made only on request, whole, in order, each right after its step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from servelab.core.bus import Bus
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.events import Batch
from servelab.core.hookspecs import hookimpl
from servelab.core.logs import read_log
from servelab.core.plan import Outcome
from servelab.core.records import Record, RequestFinished, StepDone, TokensEmitted, from_dict, to_dict
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import Fcfs, ListWorkload, Rig, ToyCost, ToyExecutor, arrival, make_engine


class Everything:
    """Watches all records and asks for none."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)


class Asking(Everything):
    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        assert self.records[-1] is record


class Probable(ToyExecutor):
    """Says how likely each token of request ``a`` was."""

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        made = super().outcome(batch, i, steps, accept)
        if batch.requests[i].id != "a" or not made.tokens:
            return made
        return replace(made, logprobs=tuple({t: -0.5, t + 1: -1.25} for t in made.tokens))


def logged(rig: Rig) -> list[TokensEmitted]:
    return [x for x in rig.records if isinstance(x, TokensEmitted)]


def rig(executor: type[ToyExecutor] = ToyExecutor, *, token_log: bool = True, **parts: Any) -> Rig:
    made = Rig(make_engine(horizon=lambda batch, steps: made.executor.horizon(batch, steps), **parts))
    made.executor = executor(made.truths)
    made.engine.token_log = token_log
    return made


def test_nothing_is_logged_unless_somebody_asks() -> None:
    r = rig(token_log=False)
    r.arrive("a")
    r.drain()
    assert len(r.ends("a")) == 1
    assert logged(r) == []
    assert make_engine().token_log is False


def test_tokens_stand_between_their_step_and_the_end() -> None:
    r = rig()
    r.arrive("a", prompt=4, output=2)
    r.arrive("b", prompt=4, output=1)
    r.drain()
    kinds = [(x.ev, getattr(x, "request", "")) for x in r.records if x.ev in ("step", "tokens", "finished")]
    assert kinds == [
        ("step", ""), ("tokens", "a"),
        ("step", ""), ("tokens", "a"), ("tokens", "b"), ("finished", "a"), ("finished", "b"),
    ]  # fmt: skip
    before: StepDone | None = None
    for record in r.records:
        if isinstance(record, StepDone):
            before = record
        elif isinstance(record, TokensEmitted):
            assert before is not None
            assert (record.t_ns, record.engine) == (before.t_ns, before.engine)
            assert len(record.tokens) == before.emitted[before.requests.index(record.request)]
    assert [x.tokens for x in logged(r) if x.request == "a"] == [[0], [1]]


def test_a_prompt_in_chunks_brings_tokens_with_its_last_one_only() -> None:
    r = rig(scheduler=Fcfs(chunk=3))
    r.arrive("a", prompt=8, output=1)
    r.drain()
    steps = [x for x in r.records if isinstance(x, StepDone)]
    assert [x.emitted for x in steps] == [[0], [0], [1]]
    assert [(x.t_ns, x.tokens) for x in logged(r)] == [(steps[-1].t_ns, [0])]


def test_a_held_launch_brings_all_its_tokens_at_once() -> None:
    r = rig(scheduler=Fcfs(hold=8))
    a = r.arrive("a", prompt=4, output=4)
    r.drain()
    assert [x.tokens for x in logged(r)] == [[0], [1, 2, 3]]
    assert a.output == [0, 1, 2, 3]


def test_logprobs_come_with_the_tokens_they_belong_to() -> None:
    r = rig(Probable)
    r.arrive("a", prompt=4, output=3)
    r.arrive("b", prompt=4, output=3)
    r.drain()
    found: dict[str, Sequence[Any]] = {"a": [], "b": []}
    for x in logged(r):
        found[x.request].append((x.tokens, x.logprobs))
    assert found["a"] == [([t], [{t: -0.5, t + 1: -1.25}]) for t in range(3)]
    assert found["b"] == [([t], None) for t in range(3)]


def test_what_is_dropped_is_not_logged() -> None:
    """A request that was aborted while in flight emits nothing; nor does a cap let more through."""
    r = rig()
    r.arrive("a", output=5)
    r.abort("a")
    r.drain()
    assert logged(r) == []
    a = r.arrive("b", output=50, cap=2)
    r.drain()
    assert [t for x in logged(r) for t in x.tokens] == a.output == [0, 1]


@pytest.mark.parametrize("driver", [VirtualDriver, WallDriver])
@pytest.mark.parametrize("watcher", [Everything, Asking])
def test_whole_runs_log_tokens_when_an_observer_asks(driver: Any, watcher: type[Everything]) -> None:
    truths: dict[str, Any] = {}
    one = watcher()
    bus = Bus([one])
    executor = ToyExecutor(truths)
    engine = make_engine(horizon=executor.horizon)
    engine.token_log = bus.asks("tokens")
    driver(
        engines=[engine], executors=[executor], costs=[ToyCost()], truths=truths, emit=bus.emit,
        workload=ListWorkload([arrival("a", output=3), arrival("b", output=2, at=1500)]),
    ).run()  # fmt: skip
    tokens: dict[str, list[int]] = {}
    for record in one.records:
        if isinstance(record, TokensEmitted):
            tokens.setdefault(record.request, []).extend(record.tokens)
    assert tokens == ({"a": [0, 1, 2], "b": [0, 1]} if watcher is Asking else {})
    ends = {x.request: x.output_tokens for x in one.records if isinstance(x, RequestFinished)}
    assert ends == {"a": 3, "b": 2}


def test_bench_asks_for_its_observers_and_the_log_reads_them_back(tmp_path: Path) -> None:
    model = dict.fromkeys(("layers", "heads", "kv_heads"), 2) | dict.fromkeys(("hidden", "head_dim"), 16)
    raw = {
        "scheduler": "vllm_v1", "kvcache": "paged", "cost": "scripted", "task": "bench",
        "executor": {"name": "scripted", "placeholder": 7},
        "workload": {"name": "synthetic", "num_requests": 4},
        "model": {**model, "name": "toy", "ffn": 8, "vocab": 100, "max_position": 2048},
    }  # fmt: skip
    seen: dict[str, list[Record]] = {}
    for name, cls in (("all", Everything), ("asking", Asking)):
        registry, watcher, folder = Registry.load(), cls(), tmp_path / name
        folder.mkdir()
        registry.add("observer", PluginSpec(name="w", factory="a:b"), factory=lambda c, x, w=watcher: w)
        made = compose(validate({**raw, "observers": ["w", "jsonl"]}, registry), registry, run_dir=folder)
        made.task.run(made)
        seen[name] = watcher.records
        read = list(read_log(folder / "events.jsonl"))
        assert read[1:] == [x for x in watcher.records[1:] if x.ev != "planned"]
    without = [x for x in seen["asking"][1:] if not isinstance(x, TokensEmitted)]
    assert without == seen["all"][1:]  # asking changes nothing else
    tokens = [x for x in seen["asking"] if isinstance(x, TokensEmitted)]
    ends = [x for x in seen["asking"] if isinstance(x, RequestFinished)]
    for end in ends:
        made = [t for x in tokens if x.request == end.request for t in x.tokens]
        assert made == [7] * end.output_tokens


@pytest.mark.parametrize(
    "logprobs", [None, [], [{3: -0.25, 90: -2.5}, {4: 0.0}], [{0: float("-inf")}, {0: -1e-9}]]
)
def test_the_json_form_gives_numbers_back(logprobs: list[dict[int, float]] | None) -> None:
    record = TokensEmitted(t_ns=9, engine=1, request="a", tokens=[3, 4], logprobs=logprobs)
    written = json.loads(json.dumps(to_dict(record)))
    again = from_dict(written)
    assert isinstance(again, TokensEmitted)
    assert again == record
    for one in again.logprobs or ():
        assert {type(token) for token in one} == {int}
    assert ("logprobs" in written) == (logprobs is not None)
    assert from_dict(to_dict(record)) == record  # also without JSON between


def test_fields_at_their_default_are_left_out() -> None:
    record = TokensEmitted(t_ns=9, request="a", tokens=[3])
    assert to_dict(record) == {"ev": "tokens", "t_ns": 9, "request": "a", "tokens": [3]}

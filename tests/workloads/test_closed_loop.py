"""Clients that ask again when they are answered: by hand, and against a whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from typing import Any

import pytest
from pydantic import ValidationError

from servelab.core.api import Arrival, Context, WorkloadError
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.records import Ending, RequestFinished
from servelab.core.registry import Registry
from servelab.plugins.workloads.closed_loop import ClosedLoop, ClosedLoopConfig
from servelab.plugins.workloads.synthetic import Synthetic, SyntheticConfig

NS = 1_000_000_000
MS = 1_000_000
VARIED: dict[str, Any] = {"with_prompt_ids": False, "think_ms": {"law": "uniform", "min": 1, "max": 50}}
Serve = Callable[[Arrival], tuple[int, Ending]]
"""How long a request takes, and how it ends."""


@pytest.fixture
def build(context: Callable[..., Context]) -> Callable[..., ClosedLoop]:
    def make(*, seed: int = 0, max_model_len: int = 4096, **settings: Any) -> ClosedLoop:
        return ClosedLoop(ClosedLoopConfig.model_validate(settings), context(seed, max_model_len))

    return make


Build = Callable[..., ClosedLoop]


def ended(id: str, t_ns: int, outcome: Ending = "completed") -> RequestFinished:
    return RequestFinished(t_ns=t_ns, request=id, outcome=outcome, reason="", output_tokens=1)


def played(workload: ClosedLoop, serve: Serve) -> list[Arrival]:
    """Everything sent, in order of time, where each request is served by itself."""
    order, heap, sent = count(), list[Any](), list[Arrival]()
    for x in workload.arrivals():
        assert isinstance(x, Arrival)
        heappush(heap, (x.time_ns, next(order), x, None))
    while heap:
        now, _, x, outcome = heappop(heap)
        if outcome is None:
            sent.append(x)
            took, outcome = serve(x)
            heappush(heap, (now + took, next(order), x, outcome))
            continue
        for k in range(x.spec.n):
            for y in workload.react(ended(f"{x.spec.id}#{k}" if k else x.spec.id, now, outcome)):
                assert isinstance(y, Arrival) and y.time_ns >= now
                heappush(heap, (y.time_ns, next(order), y, None))
    return sent


def lasting(ns: int) -> Serve:
    return lambda x: (ns, "completed")


def by_length(x: Arrival) -> tuple[int, Ending]:
    assert x.truth is not None
    return x.truth.output_tokens * MS, "completed"


def content(x: Arrival) -> Any:
    return replace(x, time_ns=0)


# ------------------------------------------------------------------- by hand


def test_by_hand(build: Build) -> None:
    """Two clients, 10 s a request, 3 s of thinking, started 4 s apart; nothing is sent from 30 s on."""
    loop = build(clients=2, ramp_s=8, think_ms=3000, duration_s=30)
    sent = played(loop, lasting(10 * NS))
    assert [(x.spec.id, x.time_ns // NS) for x in sent] == [
        ("r0", 0), ("r1", 4), ("r2", 13), ("r3", 17), ("r4", 26),
    ]  # fmt: skip


def test_the_number_ends_the_run(build: Build) -> None:
    sent = played(build(clients=3, num_requests=7), lasting(NS))
    assert [x.spec.id for x in sent] == [f"r{i}" for i in range(7)]
    assert [x.time_ns // NS for x in sent] == [0, 0, 0, 1, 1, 1, 2]


def test_shares_end_one_by_one(build: Build) -> None:
    """Client 0 has numbers 0, 2, 4, 6 and is slow; client 1 is through its three long before."""
    slow: Serve = lambda x: (10 * NS if int(x.spec.id[1:]) % 2 == 0 else NS, "completed")  # noqa: E731
    own = played(build(clients=2, num_requests=7, deal="own"), slow)
    assert [(x.spec.id, x.time_ns // NS) for x in own] == [
        ("r0", 0), ("r1", 0), ("r3", 1), ("r5", 2), ("r2", 10), ("r4", 20), ("r6", 30),
    ]  # fmt: skip
    queue = played(build(clients=2, num_requests=7), slow)
    assert [x.spec.id for x in queue] == [f"r{i}" for i in range(7)]


def test_samples_of_a_prompt_are_waited_for(build: Build) -> None:
    loop = build(clients=1, num_requests=2, samples=3)
    (first,) = loop.arrivals()
    assert isinstance(first, Arrival) and first.spec.n == 3 and first.truth is not None
    assert len(first.truth.further) == 2
    assert list(loop.react(ended("r0#2", 5))) == list(loop.react(ended("r0", 6))) == []
    (second,) = loop.react(ended("r0#1", 7))
    assert (second.time_ns, second.spec.id) == (7, "r1")


def test_requests_of_others_and_of_an_ended_run_are_nothing_to_it(build: Build) -> None:
    loop = build(clients=1, num_requests=9)
    list(loop.arrivals())
    assert loop.react(ended("elsewhere", 5)) == ()
    assert loop.react(ended("r0", 5, "unfinished")) == ()
    assert loop.react(ended("r0", 6)) == ()


def test_arrivals_begin_a_run_anew(build: Build) -> None:
    loop = build(clients=3, num_requests=20, **VARIED)
    assert played(loop, by_length) == played(loop, by_length)


# -------------------------------------------------------------------- retries


def twice(outcome: Ending) -> Serve:
    """Every third request fails on its first two attempts."""

    def serve(x: Arrival) -> tuple[int, Ending]:
        number, _, attempt = x.spec.id[1:].partition(".")
        fails = int(number) % 3 == 0 and int(attempt or 0) < 2
        return (MS, outcome) if fails else (NS, "completed")

    return serve


@pytest.mark.parametrize("outcome", ["rejected", "aborted", "failed", "cancelled"])
def test_what_failed_is_sent_again(build: Build, outcome: Ending) -> None:
    loop = build(clients=1, num_requests=4, retry=True, retry_pause_ms=20)
    sent = played(loop, twice(outcome))
    assert [x.spec.id for x in sent] == ["r0", "r0.1", "r0.2", "r1", "r2", "r3", "r3.1", "r3.2"]
    again = [x for x in sent if x.spec.id.startswith("r0")]
    assert [x.time_ns // MS for x in again] == [0, 21, 42]
    for x in again:
        assert replace(x.spec, id="r0") == again[0].spec and x.truth == again[0].truth


def test_without_retry_the_client_goes_on(build: Build) -> None:
    sent = played(build(clients=1, num_requests=4), twice("rejected"))
    assert [x.spec.id for x in sent] == ["r0", "r1", "r2", "r3"]


def test_attempts_come_to_an_end(build: Build) -> None:
    loop = build(clients=1, num_requests=2, retry=True, max_attempts=3)
    sent = played(loop, lambda x: (0, "rejected"))
    assert [x.spec.id for x in sent] == ["r0", "r0.1", "r0.2", "r1", "r1.1", "r1.2"]
    assert [x.time_ns // MS for x in sent] == [0, 1, 2, 2, 3, 4]


def test_nothing_is_sent_again_after_the_end(build: Build) -> None:
    sent = played(build(clients=1, duration_s=0.01, retry=True), lambda x: (4 * MS, "aborted"))
    assert [x.time_ns // MS for x in sent] == [0, 5]


def test_one_failed_sample_is_a_failure(build: Build) -> None:
    loop = build(clients=1, num_requests=2, samples=2, retry=True)
    list(loop.arrivals())
    assert loop.react(ended("r0", 5, "aborted")) == ()
    (again,) = loop.react(ended("r0#1", 6))
    assert again.spec.id == "r0.1" and again.spec.n == 2


# ------------------------------------------------------- what is sent, whoever answers


@pytest.mark.parametrize("deal", ["queue", "own"])
@pytest.mark.parametrize("ends", [{"num_requests": 60}, {"duration_s": 3}])
def test_two_schedulers_are_asked_the_same(build: Build, deal: str, ends: dict[str, Any]) -> None:
    """Whatever a request takes, request ``j`` is the same."""
    settings = {**VARIED, "clients": 4, "deal": deal, "phases": [{"after": 20, "output_length": 7}], **ends}
    one = played(build(**settings), by_length)
    other = played(build(**settings), lambda x: (x.spec.prompt_tokens * MS, "completed"))
    mine, theirs = ({x.spec.id: content(x) for x in sent} for sent in (one, other))
    assert [x.spec.id for x in one] != [x.spec.id for x in other] or deal == "queue"
    assert all(mine[id] == theirs[id] for id in mine.keys() & theirs.keys())
    if "num_requests" in ends:
        assert mine.keys() == theirs.keys() == {f"r{i}" for i in range(60)}


def test_the_list_is_that_of_synthetic(build: Build, context: Callable[..., Context]) -> None:
    """One population: a closed loop can be compared with an open one."""
    settings: dict[str, Any] = {"num_requests": 30, "with_prompt_ids": False}
    loop = build(clients=5, **settings)
    open_loop = Synthetic(SyntheticConfig.model_validate(settings), context())
    asked = [content(x) for x in open_loop.arrivals() if isinstance(x, Arrival)]
    assert [content(x) for x in played(loop, lasting(NS))] == asked


@pytest.mark.parametrize("changed", ["prompt_length", "output_length", "max_new_tokens", "think_ms"])
def test_each_quantity_has_a_stream_of_its_own(build: Build, changed: str) -> None:
    settings = {**VARIED, "clients": 4, "num_requests": 40, "deal": "own"}
    before = played(build(**settings), lasting(NS))
    law = {"law": "uniform", "min": 100, "max": 200}
    after = {x.spec.id: x for x in played(build(**{**settings, changed: law}), lasting(NS))}
    moved = set[str]()
    for x in before:
        y = after[x.spec.id]
        moved |= {"prompt_length"} if x.spec.prompt_tokens != y.spec.prompt_tokens else set()
        moved |= {"output_length"} if x.truth != y.truth else set()
        moved |= {"max_new_tokens"} if x.spec.max_new_tokens != y.spec.max_new_tokens else set()
        moved |= {"think_ms"} if x.time_ns != y.time_ns else set()
    assert moved == {changed}


def test_token_ids_belong_to_the_request(build: Build) -> None:
    loop = build(clients=4, num_requests=12, prefix_tokens=5, prompt_length=20)
    sent = played(loop, lasting(NS))
    ids = [tuple(x.spec.prompt_ids or ()) for x in sent]
    assert {len(x) for x in ids} == {25} and len(set(ids)) == 12 and len({x[:5] for x in ids}) == 1
    again = {x.spec.id: tuple(x.spec.prompt_ids or ()) for x in played(loop, by_length)}
    assert again == {x.spec.id: i for x, i in zip(sent, ids, strict=True)}


# ---------------------------------------------------------------------- phases


def test_phases_by_time(build: Build) -> None:
    """Requests sent from 2.5 s on have the other law, whatever their numbers."""
    settings = {"output_length": 3, "phases": [{"after_s": 2.5, "output_length": 9}]}
    sent = played(build(clients=2, num_requests=12, **settings), lasting(NS))
    assert [x.truth.output_tokens for x in sent if x.truth] == [3] * 6 + [9] * 6
    ramped = played(build(clients=2, ramp_s=6, num_requests=6, **settings), lasting(NS))
    assert [(x.spec.id, x.truth.output_tokens) for x in ramped if x.truth] == [
        ("r0", 3), ("r2", 3), ("r3", 3), ("r1", 9), ("r4", 9), ("r5", 9),
    ]  # fmt: skip
    assert "prompt_tokens" not in build(clients=2, **settings).describe()


# ------------------------------------------------------------------ description


def test_description_is_of_what_is_known(build: Build) -> None:
    described = build(clients=2, num_requests=50, **VARIED).describe()
    sent = played(build(clients=2, num_requests=50, **VARIED), by_length)
    assert described["requests"] == 50 and described["clients"] == 2
    assert described["prompt_tokens"]["total"] == sum(x.spec.prompt_tokens for x in sent)
    until = build(clients=2, duration_s=5, **VARIED).describe()
    assert until["requests"] is None and until["list"]["requests"] == 1024
    assert until["settings"]["num_requests"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_requests": None}, "the run would never end"),
        ({"clients": 9, "num_requests": 8}, "8 requests do not occupy 9 clients"),
        ({"duration_s": 2, "ramp_s": 2}, "nothing is sent after duration_s=2"),
        ({"deal": "own", "phases": [{"after_s": 1}]}, "need one order of requests"),
        ({"think_ms": 0}, "greater than or equal to 1"),
    ],
)
def test_refused_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ClosedLoopConfig.model_validate(settings)


def test_requests_too_long_are_refused_before_the_run(build: Build) -> None:
    long = {"prompt_length": {"law": "lognormal", "median": 20, "sigma": 0.5, "max": 5000}, "clients": 1}
    build(num_requests=10, **long)  # none of the ten is so long
    with pytest.raises(WorkloadError, match="a request may be longer than the model allows"):
        build(duration_s=10, **long)
    with pytest.raises(WorkloadError, match="a request may be longer than the model allows"):
        build(num_requests=10, phases=[{"after_s": 1}], **long)
    sent = played(build(duration_s=1, over_length="clip", **{**long, "prompt_length": 5000}), lasting(NS))
    assert [x.spec.prompt_tokens for x in sent] == [3072]


# --------------------------------------------------------------------- whole runs


def run_of(scheduler: str = "vllm_v1", **workload: Any) -> list[Any]:
    """The records of a scripted run."""
    raw = {
        "scheduler": {"name": scheduler},
        "kvcache": "paged",
        "cost": "scripted",
        "executor": {"name": "scripted", "num_kv_pages": 300},
        "workload": {"name": "closed_loop", "with_prompt_ids": False, **workload},
        "task": "bench",
        "model": {
            "name": "tiny", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128,
            "vocab": 100, "max_position": 2048,
        },
    }  # fmt: skip
    registry = Registry.load()
    run = compose(validate(raw, registry), registry)
    records: list[Any] = []
    VirtualDriver(
        engines=[run.engine], executors=[run.executor], costs=[run.cost], workload=run.workload,
        truths=run.truths, emit=records.append,
    ).run()  # fmt: skip
    return records


def alive(records: list[Any]) -> list[tuple[int, int]]:
    """(time, live requests) after each change."""
    found, live = list[tuple[int, int]](), 0
    for r in records:
        if r.ev in ("arrived", "finished"):
            live += 1 if r.ev == "arrived" else -1
            found.append((r.t_ns, live))
    return found


@pytest.mark.parametrize("scheduler", ["vllm_v1", "aggressive", "conservative"])
def test_as_many_are_alive_as_there_are_clients(scheduler: str) -> None:
    changes = alive(run_of(scheduler, clients=12, num_requests=100))
    assert max(live for _, live in changes) == 12
    by_time = dict(changes)  # what is left at the end of each instant
    ends = [t for t, live in by_time.items() if live < 12]
    assert len(ends) <= 12  # the list is over: clients stop one after the other
    assert min(ends) == sorted(by_time)[-len(ends)]


def test_littles_law() -> None:
    """N = throughput * (mean latency + mean think time), up to the beginning and the end of the run."""
    n = 600
    records = run_of(clients=6, num_requests=n, think_ms=100)
    arrived = {r.request: r.t_ns for r in records if r.ev == "arrived"}
    finished = {r.request: r.t_ns for r in records if r.ev == "finished"}
    latency = sum(finished[id] - arrived[id] for id in arrived) / n / NS
    throughput = n * NS / max(finished.values())
    assert throughput * (latency + 0.1) == pytest.approx(6, rel=0.02)

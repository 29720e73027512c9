"""Several workloads at the same time: requests of each, told to each, in its own ids and time."""

from __future__ import annotations

import json
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count, pairwise
from typing import Any

import pytest
from tests.workloads.conftest import TOY

from servelab.core.api import SLO, Arrival, Cancel, Limits
from servelab.core.capabilities import select
from servelab.core.config import choice_of
from servelab.core.context import Context, seeded
from servelab.core.errors import ConfigError
from servelab.core.records import RequestFinished
from servelab.core.registry import Registry
from servelab.core.testing.parts import parts_like

NS = 1_000_000_000
OPEN: dict[str, Any] = {"name": "synthetic", "num_requests": 40, "with_prompt_ids": False}
LOOP: dict[str, Any] = {"name": "closed_loop", "clients": 3, "num_requests": 30, "with_prompt_ids": False}


def made(name: str, *, seed: int = 0, max_model_len: int = 4096, **settings: Any) -> Any:
    """A workload with its parts, as a run composes it."""
    registry = Registry.load()
    choice = choice_of("workload", {"name": name, **settings}, registry, "here")
    limits = Limits(max_batch_tokens=512, max_batch_requests=32, max_model_len=max_model_len)
    rng = seeded(seed, "workload", name)
    ctx = Context(kind="workload", name=name, rng=rng, model=TOY, hardware=None, limits=limits, seed=seed)
    ctx = replace(ctx, part=parts_like(ctx, registry, None))
    return registry.resolve("workload", name, "factory")(choice.config, ctx)


def mix(**components: Any) -> Any:
    return made("mix", components=components)


def played(workload: Any, took_ns: int = NS) -> list[Arrival]:
    """Everything sent, in order of time, where each request takes so long."""
    order, heap, sent = count(), list[Any](), list[Arrival]()
    for x in workload.arrivals():
        if isinstance(x, Arrival):
            heappush(heap, (x.time_ns, next(order), x, False))
    while heap:
        now, _, x, served = heappop(heap)
        if not served:
            sent.append(x)
            heappush(heap, (now + took_ns, next(order), x, True))
            continue
        ended = RequestFinished(t_ns=now, request=x.spec.id, outcome="completed", reason="", output_tokens=1)
        for y in workload.react(ended):
            assert y.time_ns >= now
            heappush(heap, (y.time_ns, next(order), y, False))
    return sent


def own(sent: list[Arrival], key: str) -> list[Arrival]:
    """The requests of a component, under the names that it gave them."""
    mine = [x for x in sent if x.spec.id.startswith(key + ".")]
    return [replace(x, spec=replace(x.spec, id=x.spec.id.removeprefix(key + "."))) for x in mine]


def test_the_requests_are_those_of_the_components() -> None:
    sent = played(mix(a={"workload": OPEN}, b={"workload": LOOP}))
    assert len(own(sent, "a")) == 40 and len(own(sent, "b")) == 30 and len(sent) == 70
    assert {x.spec.id for x in own(sent, "b")} == {f"r{i}" for i in range(30)}
    assert all(x.time_ns <= y.time_ns for x, y in pairwise(sent))


def test_components_do_not_know_of_each_other() -> None:
    """Adding one, changing one and their order leave the others' requests as they were."""
    alone = played(mix(b={"workload": OPEN}))
    for others in (
        {"a": {"workload": OPEN}, "b": {"workload": OPEN}},
        {"b": {"workload": OPEN}, "a": {"workload": {**OPEN, "output_length": 3}}, "c": {"workload": LOOP}},
    ):
        assert own(played(mix(**others)), "b") == own(alone, "b")
    both = played(mix(a={"workload": OPEN}, b={"workload": OPEN}))
    assert [x.spec.prompt_tokens for x in own(both, "a")] != [x.spec.prompt_tokens for x in own(both, "b")]


def test_items_of_one_time_come_in_the_order_of_components() -> None:
    burst = {**OPEN, "num_requests": 2, "request_rate": "inf"}
    ids = [x.spec.id for x in mix(z={"workload": burst}, a={"workload": burst}).arrivals()]
    assert ids == ["z.r0", "z.r1", "a.r0", "a.r1"]


def test_labels_are_put_on_every_request() -> None:
    labels = {"request_class": "offline", "tenant": "t", "priority": -3, "ttft_ms": 7, "tbt_ms": 2}
    classes = [{"name": "own", "priority": 5, "e2el_ms": 9}]
    workload = mix(
        a={"workload": LOOP, **labels}, b={"workload": {**OPEN, "classes": classes}, "tenant": "u"}
    )
    sent = played(workload)
    for x in own(sent, "a"):
        assert (x.spec.request_class, x.spec.tenant, x.spec.priority) == ("offline", "t", -3)
        assert x.spec.slo == SLO(ttft_ns=7_000_000, tbt_ns=2_000_000)
    for x in own(sent, "b"):
        assert (x.spec.request_class, x.spec.tenant, x.spec.priority) == ("own", "u", 5)
        assert x.spec.slo == SLO(e2el_ns=9_000_000)


def test_a_beginning_and_a_speed_of_its_own() -> None:
    """u = (t - start) * scale, by hand: 40 requests at 8/s, from 2 s on and four times as fast."""
    even = {**OPEN, "process": "constant", "request_rate": 8}
    sent = played(mix(a={"workload": even, "start_s": 2, "rate_scale": 4}))
    assert [x.time_ns for x in sent] == [2 * NS + i * NS // 32 for i in range(1, 41)]


def test_a_closed_loop_in_its_own_time() -> None:
    """Two seconds of thinking last one, and its end at 10 s of its time is at 3 + 5 s of the run."""
    loop = {"name": "closed_loop", "clients": 1, "duration_s": 10, "think_ms": 2000, "with_prompt_ids": False}
    sent = played(mix(a={"workload": loop, "start_s": 3, "rate_scale": 2}), took_ns=NS // 2)
    assert [x.time_ns / NS for x in sent] == [3, 4.5, 6, 7.5]


@pytest.mark.parametrize("scale", [0.3, 0.7, 3, 1e6])
def test_nothing_comes_before_what_it_follows(scale: float) -> None:
    """Whatever times are rounded to; ``played`` looks at every reaction."""
    sent = played(mix(a={"workload": LOOP, "start_s": 0.1, "rate_scale": scale}), took_ns=12_345_679)
    assert len(sent) == 30


def test_ends_of_strangers_are_nothing_to_it() -> None:
    workload = mix(a={"workload": LOOP})
    list(workload.arrivals())
    for id in ("r0", "b.r0", "a", "a.r99"):
        ended = RequestFinished(t_ns=5, request=id, outcome="completed", reason="", output_tokens=1)
        assert list(workload.react(ended)) == []


def test_cancellations_and_samples_keep_their_requests() -> None:
    leaving = {**OPEN, "cancel_fraction": 1, "patience_ms": 1, "samples": 2}
    items = list(mix(a={"workload": leaving, "rate_scale": 0.5}).arrivals())
    arrived = {x.spec.id: x.time_ns for x in items if isinstance(x, Arrival)}
    gone = [x for x in items if isinstance(x, Cancel)]
    assert len(gone) == 40
    assert all(0 <= x.time_ns - arrived[x.request_id] - 2_000_000 <= 2 for x in gone)


def test_mixes_nest() -> None:
    inner = {"name": "mix", "components": {"x": {"workload": OPEN}, "y": {"workload": LOOP}}}
    sent = played(mix(a={"workload": inner, "tenant": "t"}, b={"workload": LOOP}))
    assert {".".join(x.spec.id.split(".")[:-1]) for x in sent} == {"a.x", "a.y", "b"}
    assert len(own(sent, "a.y")) == 30


def test_description_names_the_components() -> None:
    described = mix(a={"workload": OPEN}, b={"workload": LOOP, "priority": 2}).describe()
    json.dumps(described, allow_nan=False)
    assert (described["requests"], described["cancellations"]) == (70, 0)
    assert described["components"]["b"]["clients"] == 3
    assert described["settings"]["components"]["b"]["workload"]["name"] == "closed_loop"
    until = {**LOOP, "num_requests": None, "duration_s": 3}
    assert mix(a={"workload": OPEN}, b={"workload": until}).describe()["requests"] is None


def test_what_it_provides_is_what_all_have_and_what_others_meet_is_what_any_has() -> None:
    registry = Registry.load()
    chosen = {"name": "mix", "components": {"a": {"workload": OPEN}, "b": {"workload": LOOP}}}
    (one,) = select([("workload", choice_of("workload", chosen, registry, "here"))], registry)
    assert one.provides == {"workload.prompt_ids", "workload.truth"}
    assert "workload.closed_loop" in one.may


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ({"a.b": {"workload": "synthetic"}}, "'a.b' cannot begin the ids"),
        ({"a": {"workload": "synthetic", "rate_scale": 0}}, r"components.a.rate_scale: .*greater than 0"),
        ({"a": {"workload": {"name": "synthetic", "n": 3}}}, r"components.a.workload.n: unknown field"),
        ({"a": {"workload": "nothing"}}, r"components.a.workload.name: unknown workload 'nothing'"),
        ({"a": {}}, r"components.a.workload: missing"),
        ({}, "components: .*at least 1"),
    ],
)
def test_refused_settings(components: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made("mix", components=components)

"""Lanes side by side, priced by the roofline: worked cases, and runs that use no more than there is."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest
from tests.costmodels.rooflines import device, ideal, model, roofline
from tests.costmodels.test_roofline_figures import composed, served

from servelab.core.engine.virtual import VirtualDriver
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Hold, StepPlan, Tokens
from servelab.core.records import Record, StepDone
from servelab.core.request import Arrival, Truth
from servelab.core.testing.cost import batch_of
from servelab.core.testing.fakes import ListWorkload, Script, ToyExecutor, arrival, make_engine, toy_limits

LLAMA2 = model("llama2_7b")


def one_each(view: StepView) -> StepPlan:
    for request in view.running:
        return StepPlan([request.next_token], hold=Hold(1000))
    for request in view.waiting:
        return StepPlan([Tokens(request, request.pending_tokens)])
    return StepPlan()


def ends_of(cost: Any, *items: Arrival, lanes: int = 2) -> dict[str, list[int]]:
    """When the steps of each request end, each on a lane of its own."""
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths)
    limits = toy_limits(tokens=4096, model_len=4096, lanes=lanes)
    engine = make_engine(
        Script(then=one_each), pages=5000, limits=limits, cost=cost, horizon=executor.horizon, model=LLAMA2
    )
    found: defaultdict[str, list[int]] = defaultdict(list)

    def emit(record: Record) -> None:
        if isinstance(record, StepDone):
            found[record.requests[0]] += record.ends_ns

    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(list(items)),
        truths=truths,
        emit=emit,
    ).run()
    return found


def test_decodes_side_by_side_on_a_perfect_device_take_turns() -> None:
    """Memory reads the weights all the time but for what multiplies: 0.03 % of a step."""
    cost = ideal(LLAMA2, device("a100_80g"))
    alone = sum(cost.price(batch_of([(1, k)]), 1)[0] for k in range(20))
    ends = ends_of(cost, arrival("a", 1, 20), arrival("b", 1, 20))
    assert ends["a"] == ends["b"]
    assert 2 * alone * 0.999 < ends["a"][-1] <= 2 * alone + 40
    assert len(ends_of(cost, arrival("a", 1, 20), arrival("b", 1, 20), lanes=1)["a"]) == 20


def test_a_prompt_beside_decodes_by_hand() -> None:
    """Llama-2-7B on an A100, no overheads, the greater of both times.

    The prompt of 2,048 takes 27.6 TFLOP, 88.6 ms, and 27.2 GB, 13.4 ms, of its 90.3 ms: loads of 0.98 and
    0.15. A decode reads 13.2 GB, 6.5 ms, and loads memory with 1. So both take 1.15 times as long.
    """
    cost = ideal(LLAMA2, device("a100_80g"))
    prompt, decode = cost.breakdown(batch_of([(2048, 0)])), cost.breakdown(batch_of([(1, 1)]))
    pace = 1 + prompt.lanes["memory"] / prompt.ns
    assert pace == pytest.approx(1 + 13.36 / 90.27, rel=1e-3)
    assert prompt.lanes["compute"] / prompt.ns + decode.lanes["compute"] / decode.ns < 1
    ends = ends_of(cost, arrival("prompt", 2048, 1), arrival("decodes", 1, 30))
    assert ends["prompt"][0] == pytest.approx(pace * prompt.ns, rel=2e-3)
    beside = sum(end <= ends["prompt"][0] for end in ends["decodes"])
    assert beside == int(ends["prompt"][0] / (pace * decode.ns))
    alone = beside * decode.ns + prompt.ns
    assert ends["prompt"][0] < 0.6 * alone, "in turn"


def test_overheads_are_time_for_others() -> None:
    """Two thirds of a step are the host's, the rest is memory's: it is free for the other lane."""
    cost = ideal(LLAMA2, device("a100_80g"))
    (bare,) = cost.price(batch_of([(1, 0)]), 1)
    slow = roofline(LLAMA2, device("a100_80g"), mfu=1, mbu=1, smoothness=99, op_ns=0, step_ns=2 * bare)
    ends = ends_of(slow, arrival("a", 1, 10), arrival("b", 1, 10))
    assert ends["b"][-1] == pytest.approx(2 * 10 * 2 * bare, rel=1e-3), "twice the host's time"


def test_drafts_keep_devices_busy() -> None:
    """What the quick sum does not cover is taken from the breakdown."""
    cost, rows = roofline(LLAMA2, device("a100_80g")), [(1, 50), (1, 900)]
    drafted = batch_of(rows, drafts=(4, 0))
    assert cost.busy(drafted) == {name: int(ns) for name, ns in cost.breakdown(drafted).lanes.items()}
    assert cost.busy(drafted)["compute"] > 2 * cost.busy(batch_of(rows))["compute"]


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"max_batch_tokens": 2048, "lanes": 2}},
        {"engine": {"max_batch_tokens": 2048, "lanes": 2, "max_in_flight": 2}},
        {
            "engine": {"max_batch_tokens": 2048, "lanes": 2},
            "router": "round_robin",
            "cluster": {"instances": 2},
        },
    ],
    ids=["two lanes", "planned ahead", "two instances"],
)
def test_no_run_uses_more_than_the_devices_have(changes: dict[str, Any]) -> None:
    """From the log alone, by instance: busy times of all steps fit in the time in which it worked, energy is
    that of the steps and within the devices' power, and steps do not overlap on their lane.
    """
    workload = {"name": "synthetic", "num_requests": 40, "request_rate": "inf"}
    run = composed(workload=workload, **changes)
    assert not run.info["stamps"]
    driver, records = served(run)
    steps = [record for record in records if isinstance(record, StepDone)]
    assert {record.lane for record in steps} == set(range(changes["engine"]["lanes"]))
    contexts: Counter[str] = Counter()
    busy: defaultdict[int, Counter[str]] = defaultdict(Counter)
    spans: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    joules = 0.0
    for record in steps:
        spans[record.engine, record.lane].append((record.start_ns, record.ends_ns[-1]))
        for k in range(len(record.ends_ns)):
            tokens = record.tokens if k == 0 else [1] * len(record.tokens)
            batch = batch_of([(n, contexts[r]) for n, r in zip(tokens, record.requests, strict=True)])
            batch.samples[:] = [True] * len(tokens)
            busy[record.engine].update(run.cost.busy(batch))  # type: ignore[attr-defined]
            joules += run.cost.energy(batch, 1)[0]  # type: ignore[attr-defined]
            contexts.update(dict(zip(record.requests, tokens, strict=True)))
    for engine, used in busy.items():
        mine = [span for (one, _), all_of in spans.items() if one == engine for span in all_of]
        worked = max(end for _, end in mine) - min(start for start, _ in mine)
        assert 0.8 * worked < max(used.values()) <= worked * (1 + 1e-9)
        price = sum(end - start for start, end in mine)
        assert price > 1.3 * worked, "nothing overlapped"
    for all_of in spans.values():
        assert all(a[1] <= b[0] for a, b in pairwise(all_of))
    assert driver._joules <= joules * (1 + 1e-9)
    assert driver._joules <= 340 * len(busy) * driver.now_ns * 1e-9
    assert driver._joules > 0.9 * joules

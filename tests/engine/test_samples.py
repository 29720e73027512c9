"""Several outputs of one prompt: one computes it, the others fork from it (``core/engine/samples.py``)."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.draws import seeds
from tests.engine.test_reuse import ids, store

from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import PluginError, WorkloadError
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.plan import Outcome
from servelab.core.records import (
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RunStarted,
    StepDone,
    TokensEmitted,
)
from servelab.core.request import Arrival, Cancel, Phase, RequestSpec, Truth, sample_id
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    RandomPlans,
    Rig,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    raises_in,
    step_by_step,
    toy_limits,
)
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config


def rig(scheduler: Any = None, **more: Any) -> Rig:
    more = {"checks": "full", "shares": True, "pages": 16, **more}
    return Rig(make_engine(scheduler or Fcfs(), **more))


def of(r: Rig, kind: type[Record], id: str) -> list[Any]:
    return [x for x in r.records if isinstance(x, kind) and x.request == id]  # type: ignore[attr-defined]


def vllm(**config: Any) -> VllmV1:
    limits = toy_limits()
    most = {"max_num_batched_tokens": limits.max_batch_tokens, "max_num_seqs": limits.max_batch_requests}

    class Limited:
        pass

    context: Any = Limited()
    context.limits = limits
    return VllmV1(VllmV1Config(**{**most, **config}), context)


# ------------------------------------------------------------------- the fork


def test_parallel_sampling_of_the_paged_paper() -> None:
    """Card kv_paged, faithful when (3), through the engine: pages of 4, a prompt of 6 drawn from twice."""
    r = rig()
    first = r.arrive("a", 6, 5, n=2)
    other = r.request("a#1")
    assert other.phase is Phase.FORKING and first.view.forks == 1
    r.finish()  # the prompt; both have a token now
    assert (first.generated, other.generated) == (1, 1)
    assert (first.output, other.output) == ([0], [1000])
    batch = r.flights[0][0]  # each writes its first token's KV
    assert [x.id for x in batch.requests] == ["a", "a#1"]
    assert len(batch.copies) == 1
    (pool, source, target) = batch.copies[0]
    (a,), (b,) = first.lease.tables, other.lease.tables
    assert pool == 0 and a[0] == b[0] and {a[1], b[1]} == {source, target}
    assert 16 - r.free()[0] == 3, "one shared page, two private ones"
    r.drain()
    assert r.free() == (16,)
    assert {x.request: x.output_tokens for x in r.ends()} == {"a": 5, "a#1": 5}
    r.engine.check_integrity()


def test_a_prompt_of_whole_pages_is_never_copied() -> None:
    r = rig()
    r.arrive("a", 8, 3, n=4)
    r.drain()
    assert not any(batch.copies for batch in r.batches)
    assert len(of(r, RequestForked, "a#3")) == 1 and len(r.ends()) == 4


def test_the_log_tells_each_sample_apart() -> None:
    r = rig()
    r.engine.token_log = True
    r.arrive("a", 6, 2, n=3, program="p", tenant="t")
    r.drain()
    arrived = [x for x in r.records if isinstance(x, RequestArrived)]
    assert [(x.request, x.parent, x.program, x.tenant) for x in arrived] == [
        ("a", None, "p", "t"),
        ("a#1", "a", None, "t"),
        ("a#2", "a", None, "t"),
    ]
    [admitted] = of(r, RequestAdmitted, "a#1")
    [forked] = of(r, RequestForked, "a#1")
    [prompt] = [x for x in r.records if isinstance(x, StepDone)][:1]
    assert not admitted.resumed and admitted.cached_tokens == 0
    assert (forked.parent, forked.shared_tokens, forked.reason) == ("a", 6, "")
    assert forked.t_ns == prompt.t_ns
    assert [x.tokens for x in of(r, TokensEmitted, "a#2")] == [[2000], [2001]]
    order = [x.ev for x in r.records]
    assert order.index("step") < order.index("forked") < order.index("finished")


def test_a_policy_sees_the_others_when_they_run() -> None:
    seen: list[tuple[list[str], list[str], int]] = []

    class Watch(Fcfs):
        def plan(self, view: Any) -> Any:
            seen.append(([x.id for x in view.waiting], [x.id for x in view.running], view.forking))
            return super().plan(view)

    r = rig(Watch(chunk=3))
    r.arrive("a", 6, 3, n=3)
    r.drain()
    assert seen[:3] == [(["a"], [], 0), ([], ["a"], 2), ([], ["a", "a#1", "a#2"], 0)]


def test_samples_that_end_with_the_prompt() -> None:
    r = rig()
    r.arrive("a", 6, 1, n=3)
    r.drain()
    assert [(x.request, x.output_tokens) for x in r.ends()] == [("a", 1), ("a#1", 1), ("a#2", 1)]
    assert r.free() == (16,) and len(r.batches) == 1


def test_lengths_of_their_own() -> None:
    truth = Truth(2, further=(5, 1))
    assert [truth.of(k).output_tokens for k in range(3)] == [2, 5, 1]
    assert Truth(3).of(7).output_tokens == 3
    spec = RequestSpec(id="a", prompt_tokens=6, max_new_tokens=9, n=3)
    assert {x.request: x.output_tokens for x in drive([Arrival(0, spec, truth)])} == {
        "a": 2,
        "a#1": 5,
        "a#2": 1,
    }


def drive(
    items: list[Arrival | Cancel], records: list[Any] | None = None, **more: Any
) -> list[RequestFinished]:
    records, truths = [] if records is None else records, dict[str, Truth]()
    executor = ToyExecutor(truths, foresight=more.pop("foresight", True))
    more = {"pages": 40, "shares": True, "checks": "full", **more}
    engine = make_engine(more.pop("scheduler", None) or Fcfs(), horizon=executor.horizon, **more)
    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[ToyCost()],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    engine.check_integrity()
    assert not truths, "truths of samples are left behind"
    return [x for x in records if isinstance(x, RequestFinished)]


# ---------------------------------------------------------- who cannot share


def test_no_place_in_the_batch_means_waiting() -> None:
    """Three places and four samples under a scheduler that does not count them: the last one waits, with its
    token, before those that never ran.
    """
    r = rig(limits=toy_limits(requests=3))
    r.arrive("a", 6, 4, n=4)
    r.arrive("b", 4, 4)
    r.finish()
    assert list(r.engine.waiting) == ["a#3", "b"]
    [forked] = of(r, RequestForked, "a#3")
    assert forked.shared_tokens == 0
    assert forked.reason == "3 requests run, as many as launches take (engine.max_batch_requests)"
    late = r.request("a#3")
    assert (late.generated, late.pending, late.lease.tables) == (1, 7, [[]])
    r.drain()
    assert [x.resumed for x in of(r, RequestAdmitted, "a#3")] == [False, True]
    assert {x.output_tokens for x in r.ends()} == {4}
    assert r.ends("a#3")[0].preemptions == 0


def test_a_kvcache_that_shares_nothing() -> None:
    r = rig(shares=False)
    r.arrive("a", 6, 4, n=3)
    r.drain()
    assert {x.reason for x in r.records if isinstance(x, RequestForked)} == {
        "the kvcache or the prefix store cannot share pages between samples"
    }
    assert len(r.ends()) == 3 and r.free() == (16,)


def test_vllm_counts_the_places_of_samples() -> None:
    """max_num_seqs=4: a prompt with three samples and one with two never run together."""
    r = rig(vllm(max_num_seqs=4, hold_steps=1), pages=40)
    r.arrive("a", 4, 4, n=3)
    r.arrive("b", 4, 4, n=2)
    r.arrive("c", 4, 4)
    while r.flights[0]:
        assert len(r.flights[0][0].requests) <= 4
        r.finish()
        assert len(r.engine.running) + r.engine.samples.forking <= 4
    assert len(r.ends()) == 6


def test_vllm_counts_the_places_of_those_it_admits_together() -> None:
    r = rig(vllm(max_num_seqs=4, hold_steps=1), pages=40)
    r.auto = False
    for name, n in (("a", 3), ("b", 2), ("c", 1)):
        r.arrive(name, 4, 4, n=n)
    r.schedule()
    assert [x.id for x in r.flights[0][0].requests] == ["a"], "with b there would be five"


def test_more_samples_than_places_run_when_alone() -> None:
    r = rig(vllm(max_num_seqs=2, hold_steps=1), pages=40)
    r.arrive("a", 4, 6, n=5)
    while r.flights[0]:
        assert len(r.flights[0][0].requests) <= 2
        r.finish()
    assert {x.output_tokens for x in r.ends()} == {6} and len(r.ends()) == 5


# -------------------------------------------------------------- ends and losses


def test_giving_up_a_request_gives_up_all_its_samples() -> None:
    for launches in (0, 1, 2):
        r = rig(Fcfs(chunk=4))
        r.arrive("a", 6, 9, n=3)
        for _ in range(launches):
            r.finish()
        r.abort("a")
        assert [x.outcome for x in r.ends()] == ["cancelled"] * 3
        r.drain()
        assert r.free() == (16,)
        r.engine.check_integrity()


def test_giving_up_when_the_first_has_ended() -> None:
    r = rig()
    r.truths |= {"a": Truth(2)}
    r.arrive("a", 6, 2, n=2)
    r.truths["a#1"] = Truth(9)
    r.finish()
    r.finish()
    assert [x.request for x in r.ends()] == ["a"]
    r.abort("a")
    assert [(x.request, x.outcome) for x in r.ends()] == [("a", "completed"), ("a#1", "cancelled")]


@pytest.mark.parametrize("launches", [0, 1, 2])
def test_one_sample_can_be_given_up(launches: int) -> None:
    r = rig(Fcfs(chunk=4))
    r.arrive("a", 6, 3, n=3)
    for _ in range(launches):
        r.finish()
    r.abort("a#1")
    r.engine.check_integrity()
    r.drain()
    assert [x.request for x in r.ends() if x.outcome == "completed"] == ["a", "a#2"]
    assert [x.outcome for x in r.ends("a#1")] == ["cancelled"]


def test_a_rejected_request_takes_its_samples_along() -> None:
    class Refuse(Fcfs):
        def plan(self, view: Any) -> Any:
            plan = super().plan(view)
            plan.work.clear()
            for request in view.waiting:
                plan.reject(request, "no")
            return plan

    r = rig(Refuse())
    r.arrive("a", 6, 3, n=3)
    assert [(x.outcome, x.reason) for x in r.ends()] == [("rejected", "no")] * 3
    r.engine.check_integrity()


def test_a_prompt_that_leaves_no_room() -> None:
    r = rig(limits=toy_limits(model_len=8))
    r.arrive("a", 8, 3, n=2)
    assert [x.outcome for x in r.ends()] == ["rejected"] * 2


def test_a_preempted_prompt_is_forked_when_it_is_computed_again() -> None:
    class Drop(Fcfs):
        dropped = False

        def plan(self, view: Any) -> Any:
            plan = super().plan(view)
            if view.step == 1 and not self.dropped:
                self.dropped = True
                plan.work.clear()
                plan.preempt(next(iter(view.running)), "recompute", "test")
            return plan

    r = rig(Drop(chunk=3))
    r.arrive("a", 6, 3, n=2)
    r.finish()
    assert r.engine.samples.forking == (1 if r.engine.running else 0)
    r.drain()
    assert [x.shared_tokens for x in of(r, RequestForked, "a#1")] == [6]
    assert len(of(r, RequestAdmitted, "a#1")) == 1, "its waiting ended once"
    assert len(r.ends()) == 2


def test_a_lost_instance_ends_everyone_once() -> None:
    r = rig(Fcfs(chunk=3))
    r.arrive("a", 6, 3, n=3)
    r.lose()
    assert [x.outcome for x in r.ends()] == ["failed"] * 3


@pytest.mark.parametrize("forks", [(), (Outcome((1,)),), (Outcome((1,)), Outcome())])
def test_an_executor_that_draws_too_little(forks: tuple[Outcome, ...]) -> None:
    r = rig()
    r.arrive("a", 4, 3, n=3)
    error = raises_in(lambda: r.finish(outcomes=[Outcome((0,), forks=forks)]))
    assert isinstance(error, PluginError) and "samples of the prompt of request a" in error.what


def test_bad_numbers_of_outputs() -> None:
    r = rig()
    for n in (0, -1):
        error = raises_in(lambda n=n: r.arrive("a", 4, 3, n=n))  # type: ignore[misc]
        assert isinstance(error, WorkloadError) and error.what == f"request 'a' asks for {n} outputs"
    r.arrive("b", 4, 3, n=2)
    error = raises_in(lambda: r.arrive("b#1", 4, 3))
    assert error.what == "request id 'b#1' arrived twice"


# ------------------------------------------------------------- with the rest


def test_samples_of_a_cached_prompt_share_the_cached_pages() -> None:
    r = rig(prefix=store())
    r.arrive("a", 9, 1, prompt_ids=ids(9))
    r.drain()
    r.arrive("b", 9, 3, prompt_ids=ids(9), n=3)
    r.finish()
    tables = [r.request(sample_id("b", k)).lease.tables[0] for k in range(3)]
    assert {tuple(t[:2]) for t in tables} == {tuple(tables[0][:2])}
    r.engine.check_integrity()
    r.drain()
    assert [x.cached_tokens for x in of(r, RequestAdmitted, "b")] == [8]
    assert r.engine.reuse is not None and r.engine.reuse.evictable(0) == 2
    r.engine.check_integrity()


def test_a_store_without_fork_lets_samples_compute_alone() -> None:
    class Plain:
        def __init__(self) -> None:
            self._inner = store()

        def __getattr__(self, name: str) -> Any:
            if name == "fork":
                raise AttributeError(name)
            return getattr(self._inner, name)

    r = rig(prefix=Plain())
    r.arrive("a", 9, 3, prompt_ids=ids(9), n=2)
    r.drain()
    assert "cannot share pages" in of(r, RequestForked, "a#1")[0].reason
    assert len(r.ends()) == 2


def test_metrics_count_a_prompt_once_and_every_output() -> None:
    spec = RequestSpec(id="a", prompt_tokens=6, max_new_tokens=9, n=3)
    records: list[Any] = [
        RunStarted(t_ns=0, info={"kv": {"pools": [{"id": "kv", "pages": 40, "page_tokens": 4}]}})
    ]
    drive([Arrival(5, spec, Truth(4, (2, 3)))], records)
    result = summarize(Timeline().feed_all(records), SummaryOptions(percentiles=(50,)))
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (3, 6, 9)
    timeline = Timeline().feed_all(records)
    assert len({timeline.requests[sample_id("a", k)].ttft_ns for k in range(3)}) == 1
    assert [timeline.requests[sample_id("a", k)].output_tokens for k in range(3)] == [4, 2, 3]
    assert timeline.requests["a#1"].parent == "a"


def test_memory_counts_a_shared_prompt_once_while_anyone_holds_it() -> None:
    """A prompt of 8 and three outputs of 2, 6 and 4: when the first ends, another counts the prompt, and the
    second output of the three takes only its own tokens along.
    """
    spec = RequestSpec(id="a", prompt_tokens=8, max_new_tokens=9, n=3)
    records: list[Any] = []
    drive([Arrival(0, spec, Truth(2, (6, 4)))], records)
    steps = [x for x in records if isinstance(x, StepDone)]
    timeline, stored = Timeline(), []
    for record in records:
        timeline.feed(record)
        if isinstance(record, StepDone):
            stored.append(timeline.engines[0].memory._total)
    # prompt; then one each of three; a has ended: two go on; a#2 after its fourth
    assert stored == [8, 11, 12, 14, 12, 13]
    assert [len(x.requests) for x in steps] == [1, 3, 2, 2, 1, 1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 16),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    pages=st.integers(8, 30),
    rows=st.integers(2, 6),
    chunk=st.sampled_from([3, 4, 64]),
)
@example(seed=30298, counts=[4, 1], pages=8, rows=5, chunk=64)  # a copy that the last owner does not make
def test_holding_changes_nothing(seed: int, counts: list[int], pages: int, rows: int, chunk: int) -> None:
    """Held launches, launches of one step and an executor without foresight tell the same story."""
    rng = Random(seed)
    items: list[Arrival | Cancel] = [
        Arrival(
            rng.randrange(20_000) + 20_000 * k,
            RequestSpec(id=f"r{k}", prompt_tokens=rng.randint(1, 12), max_new_tokens=rng.randint(1, 12), n=n),
            Truth(rng.randint(1, 10), tuple(rng.randint(1, 10) for _ in range(n - 1))),
        )
        for k, n in enumerate(counts)
    ]

    def run(hold: int, foresight: bool) -> list[tuple[Any, ...]]:
        records: list[Any] = []
        limits = toy_limits(requests=rows, model_len=24)
        drive(
            items,
            records,
            pages=pages,
            limits=limits,
            scheduler=Fcfs(hold=hold, chunk=chunk),
            foresight=foresight,
        )
        return [
            *step_by_step(records),
            *((x.request, x.t_ns, x.shared_tokens) for x in records if isinstance(x, RequestForked)),
        ]

    assert run(1, True) == run(64, True) == run(64, False)


def test_random_plans_with_samples_are_legal() -> None:
    for seed in seeds(30):
        r = rig(RandomPlans(Random(seed)), pages=20, limits=toy_limits(tokens=12, requests=4, model_len=24))
        for k in range(4):
            r.arrive(f"r{k}", 5 + k, 4, n=k) if k else r.arrive("r0", 3, 4)
        for _ in range(400):
            lanes = [lane for lane, flights in r.flights.items() if flights]
            if lanes:
                r.finish(lanes[0])
            elif r.engine.requests:
                r.tick()
        r.engine.check_integrity()


def test_samples_end_the_hold_that_ended_their_prompt() -> None:
    """The last token of a prompt looks like a decode, so a scheduler may hold it."""

    def run(hold: int) -> list[tuple[Any, ...]]:
        records: list[Record] = []
        items: list[Arrival | Cancel] = [arrival("r", 5, 6, n=2)]
        drive(
            items, records, pages=16, limits=toy_limits(), scheduler=Fcfs(hold=hold, chunk=4), foresight=True
        )
        return step_by_step(records)

    assert run(8) == run(1)

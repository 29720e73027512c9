"""The life of a request is told from the records: completely, in figures that add up, and in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.commands.runs import Swapper, drawn, serve, write
from tests.metrics.logs import MS, admitted, arrived, ended, finished, preempted, started, step

from servelab.core.errors import ServeLabError
from servelab.core.metrics import Timeline
from servelab.core.metrics.phases import WAITING
from servelab.core.records import (
    Planned,
    Record,
    StepDone,
    TransferEnded,
    TransferStarted,
    from_dict,
    to_dict,
)
from servelab.core.run_folder import RunFolder, RunFolderError
from servelab.plugins.commands.explain.command import main
from servelab.plugins.commands.explain.life import Life
from servelab.plugins.commands.explain.machine import as_json
from servelab.plugins.commands.explain.reader import read_life
from servelab.plugins.commands.explain.reasons import Reasons
from servelab.plugins.commands.explain.text import LANE, lane, tell
from servelab.plugins.commands.explain.words import WIDTH, duration

Out = pytest.CaptureFixture[str]


def planned(t: float, number: int, work: dict[str, int], **more: Any) -> Planned:
    lists: dict[str, Any] = {
        name: [] for name in ("preempted", "swapped_in", "rejected", "aborted", "deferred")
    }
    who: dict[str, Any] = {"requests": list(work), "tokens": list(work.values())}
    return Planned(t_ns=round(t * MS), lane=0, step=number, held=1, **who, **{**lists, **more})


def a_small_run() -> list[Record]:
    """``a`` runs; ``b`` waits for pages, is admitted, preempted for ``a``'s sake, and ends. Pages of 16."""
    return [
        started(settings=SURE),
        arrived(0, "a", 29),
        planned(0, 0, {"a": 29}),
        admitted(0, "a"),
        arrived(2, "b", 20, ttft=20, tpot=10),
        step(0, [10], {"a": (29, 1)}, (3,)),
        planned(10, 1, {"a": 1}, deferred=[("b", "needs 2 pages, 1 free")]),
        step(10, [15], {"a": (1, 1)}, (3,), 1),
        planned(15, 2, {"a": 1}, deferred=[("b", "needs 2 pages, 0 free")]),
        step(15, [20], {"a": (1, 1)}, (4,), 2),
        planned(20, 3, {"a": 1, "b": 20}),
        admitted(20, "b"),
        step(20, [30], {"a": (1, 1), "b": (20, 1)}, (2,), 3),
        planned(30, 4, {"a": 1}, preempted=[("b", "recompute", "full")]),
        preempted(30, "b", 20),  # whose own reason is "full"
        arrived(31, "c", 5),
        step(30, [35], {"a": (1, 1)}, (5,), 4),
        planned(35, 5, {"a": 1, "c": 5}, deferred=[]),
        admitted(35, "c"),
        step(35, [41], {"a": (1, 1), "c": (5, 1)}, (4,), 5),
        finished(41, "a", 6),
        finished(41, "c", 1),
        planned(41, 6, {"b": 21}),
        admitted(41, "b", resumed=True),
        step(41, [52], {"b": (21, 1)}, (4,), 6),
        planned(52, 7, {"b": 1}),
        step(52, [57, 62], {"b": (1, 2)}, (4,), 7),
        finished(62, "b", 4, preemptions=1),
        ended(62),
    ]


GOLDEN = """\
b of RUN: completed (stop)

  asked      prompt 20 tokens, output 4 of at most 64, class online
  SLO        missed: TTFT 28.00 ms > 20.00 ms, missed; TPOT 10.67 ms > 10.00 ms, missed
  life       60.00 ms: 30.0 % queued, 16.7 % prefill, 16.7 % decode, 18.3 % preempted, 18.3 %
             recompute
  |........................#############xxxxxxxxxxxxxxx%%%%%%%%%%%%%%==============|
   . queued  # prefill  = decode  x preempted  % recompute

+0 ms       Arrived, 2.00 ms into the run. 1 other was running (a).
            Waited 18.00 ms to be admitted, 30.0 % of its life.
            What 2 plans said in that time:
              10.00 ms in 2 plans: "needs 2 pages, 0 to 1 free"
               8.00 ms before the first of them
            Meanwhile 1 request was running and 3 to 4 of 100 KV pages were free at the ends of
            launches.
+18.00 ms   Admitted by the plan of step 3. 20 tokens of its prompt ran in one step of 10.00 ms, in
            a batch of 2.
+28.00 ms   First token: TTFT 28.00 ms.
+28.00 ms   Preempted by the plan of step 4, mode recompute: "full". The KV of 20 tokens was lost; 1
            output token had come.
            That plan went on with a. Counting tokens, a began a new page of 16 in it.
            Waited 11.00 ms to be admitted again, 18.3 % of its life.
            What 1 plan said in that time:
               6.00 ms in 1 plan: nobody was passed over, and this request was not named
               5.00 ms before the first of them
            Meanwhile 1 to 2 requests were running and 4 to 5 of 100 KV pages were free at the ends
            of launches. Admitted meanwhile: c. Of these, c had arrived later.
+39.00 ms   Admitted again by the plan of step 6. 21 tokens, its prompt and its output so far, ran
            in one step of 11.00 ms, alone.
+50.00 ms   Tokens again: 3 tokens in 10.00 ms.
            3 gaps between its tokens, 5.00 ms at the median; TPOT 10.67 ms. The slowest:
              22.00 ms (4.4 times the median, from +28.00 ms): it was preempted, 3 steps passed and
                          5 tokens of prompt ran for c; in the end a batch of 1
+60.00 ms   Completed: stop. 4 output tokens, 1 preemption.
"""


def test_the_story_of_a_small_run(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run())
    main([str(tmp_path), "b"])
    assert capsys.readouterr().out.replace(str(tmp_path), "RUN") == GOLDEN


SURE: dict[str, Any] = {"engine": {"lanes": 1, "max_in_flight": 1}, "spec": None}


@pytest.mark.parametrize(
    "info",
    [
        {},  # does not say that one launch at a time flies
        {"settings": SURE | {"engine": {"lanes": 2, "max_in_flight": 1}}},
        {"settings": SURE | {"engine": {"lanes": 1, "max_in_flight": 2}}},
        {"settings": SURE | {"spec": {"name": "ngram"}}},
        {"settings": SURE, "kv": {"pools": [{"id": "x", "page_tokens": 16}, {"id": "y", "page_tokens": 8}]}},
    ],
)
def test_pages_are_counted_only_where_they_can_be(tmp_path: Path, capsys: Out, info: dict[str, Any]) -> None:
    records = a_small_run()
    records[0] = started(**info)
    write(tmp_path, records)
    main([str(tmp_path), "b"])
    out = capsys.readouterr().out
    assert "That plan went on with a.\n" in out and "Counting tokens" not in out


def test_the_same_for_machines(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run())
    main([str(tmp_path), "b", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["phases_ns"] == {
        "queued": 18 * MS, "prefill": 10 * MS, "decode": 10 * MS, "preempted": 11 * MS, "recompute": 11 * MS,
    }  # fmt: skip
    assert told["slo"]["ttft"] == {"bound_ns": 20 * MS, "met": False}
    (gone,) = told["preemptions"]
    assert (gone["reason"], gone["plan"]["step"], gone["plan"]["work"]) == ("full", 4, [["a", 1]])
    assert told["stretches"][0]["reasons"] == [
        {
            "text": "needs 2 pages, 0 to 1 free",
            "of_this_request": True,
            "plans": 2,
            "ns": 10 * MS,
            "others": {},
        }
    ]
    assert told["stretches"][3]["overtakers"] == ["c"]
    assert [(gap["ns"], gap["steps"]) for gap in told["slowest_gaps"]] == [
        (22 * MS, 3), (5 * MS, 1), (5 * MS, 1),
    ]  # fmt: skip


def test_who_comes_back_overtakes_once(tmp_path: Path) -> None:
    records = a_small_run()
    (place,) = (
        i for i, r in enumerate(records) if r.ev == "finished" and r.t_ns == 41 * MS and r.request == "a"
    )  # type: ignore[attr-defined]
    run = write(
        tmp_path,
        [*records[:place], preempted(40, "c", 5), admitted(40.5, "c", resumed=True), *records[place:]],
    )
    (wait,) = (s for s in life_of(run, "b").stretches if s.phase == "preempted")
    assert (wait.admitted, wait.overtakers) == (["c", "c"], ["c"])


def test_other_engines_do_not_matter(tmp_path: Path) -> None:
    records = a_small_run()
    mixed = [records[0]]
    for record in records[1:]:  # engine 1 does the same half a millisecond later, with others
        mixed.append(record)
        twin = from_dict(json.loads(json.dumps(to_dict(record)).replace('"a"', '"x"').replace('"c"', '"y"')))
        twin.engine, twin.t_ns = 1, twin.t_ns + MS // 2
        if record.ev in ("arrived", "admitted", "step", "planned") and "b" not in str(
            getattr(record, "request", "")
        ):
            if isinstance(twin, StepDone):
                twin.requests, twin.free_pages, twin.running = (
                    ["x" if n == "b" else n for n in twin.requests],
                    (0,),
                    9,
                )
            mixed.append(twin)
    alone = as_json(life_of(write(tmp_path / "alone", records), "b"))
    assert as_json(life_of(write(tmp_path / "mixed", mixed), "b")) == alone


def test_reasons_that_differ_in_numbers_only_are_one() -> None:
    reasons = Reasons()
    reasons.begin(0)
    reasons.say(3, "no room: 12 of r12 pages, 5 free", own=True)
    reasons.say(5, "no room: 9 of r12 pages, 10 free", own=True)
    reasons.say(9, "batch full", own=True)
    reasons.say(9, "no room: 9 of r14 pages, 1 free", own=True)  # of another, so another reason
    reasons.say(10, "no room: 9 of r13 pages, 10 free", own=False, other="r13")
    reasons.close(30)
    assert [(one.text, one.plans, one.ns, one.own) for one in reasons] == [
        ("no room: 9 of r13 pages, 10 free", 1, 20, False),
        ("no room: 9 to 12 of r12 pages, 5 to 10 free", 2, 6, True),
        ("no room: 9 of r14 pages, 1 free", 1, 1, True),
        ("batch full", 1, 0, True),
    ]
    assert reasons.unanswered_ns == 3 and reasons.plans == 5


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ms"), (1, "0.001 us"), (1_500, "1.5 us"), (20_000, "0.02 ms"), (99_999_999, "100.00 ms"),
        (100_000_000, "100.0 ms"), (1_234_567_890, "1.235 s"), (61_500_000_000, "1 min 1.5 s"),
    ],
)  # fmt: skip
def test_durations(ns: int, text: str) -> None:
    assert duration(ns) == text


# ---------------------------------------------------------------- real runs


def life_of(run: RunFolder, request: str) -> Life:
    return read_life(request, run.events(), run.plans())


def check(run: RunFolder, life: Life) -> None:
    """Everything that must hold of every life."""
    facts = life.facts
    timeline = Timeline().feed_all(run.events())
    known = timeline.requests[facts.id]
    for name in ("state", "ttft_ns", "tpot_ns", "e2el_ns", "preemptions", "admitted_ns", "output_tokens"):
        assert getattr(facts, name) == getattr(known, name), name
    # its stretches tile its life
    assert life.stretches[0].start_ns == facts.arrival_ns
    assert life.stretches[-1].end_ns == life.end_ns == facts.ended_ns
    for before, after in zip(life.stretches, life.stretches[1:], strict=False):
        assert before.start_ns <= before.end_ns == after.start_ns
    # its output
    assert sum(stretch.tokens for stretch in life.stretches) == facts.output_tokens == facts.reported_tokens
    if facts.times:
        assert len(life.gaps) == len(facts.times) - 1
        assert sum(life.gaps) == facts.times[-1] - facts.times[0]
        assert [gap.ns for gap in life.slowest] == sorted(life.gaps, reverse=True)[: len(life.slowest)]
    # what plans said fills the waits
    for stretch in life.stretches:
        if stretch.phase in WAITING:
            reasons = stretch.reasons
            assert sum(one.ns for one in reasons) + reasons.unanswered_ns == stretch.ns
    assert [s.preemption for s in life.stretches if s.preemption] == life.preemptions
    # every preemption has its plan, which did not run it
    assert len(life.preemptions) == facts.preemptions
    for one in life.preemptions:
        assert one.plan is not None
        assert facts.id not in dict(one.plan.work)
    moved = [r.direction for r in run.events() if isinstance(r, TransferStarted) and r.request == facts.id]
    assert [move.direction for move in life.moves] == moved
    lines = list(tell(life, "RUN"))
    assert max(map(len, lines)) <= WIDTH
    assert json.loads(json.dumps(as_json(life)))["phases_ns"].keys() == {s.phase for s in life.stretches}
    if life.end_ns > facts.arrival_ns:
        assert len(lane(life)) == LANE


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 1000),
    lanes=st.integers(1, 2),
    flights=st.integers(1, 2),
    pages=st.integers(12, 20),
    samples=st.integers(1, 2),
)
def test_any_legal_plans(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lanes: int, flights: int, pages: int, samples: int
) -> None:
    run = serve(
        tmp_path_factory.mktemp("run"),
        scheduler=drawn(),
        seed=seed,
        executor={"num_kv_pages": pages, "num_host_pages": 30},
        workload={
            "request_rate": 300,
            "samples": samples,
            "cancel_fraction": 0.2,
            "patience_ms": {"law": "constant", "value": 60},
        },
        engine={"lanes": lanes, "max_in_flight": flights},
    )
    for request in Timeline().feed_all(run.events()).requests:
        check(run, life_of(run, request))


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Overloaded: one is swapped out and in, one gives up while it waits."""
    return serve(
        tmp_path_factory.mktemp("swapped"),
        scheduler=Swapper,
        executor={"num_kv_pages": 14, "num_host_pages": 40},
        workload={
            "request_rate": 2000,
            "cancel_fraction": 0.4,
            "patience_ms": {"law": "constant", "value": 30},
        },
        slo={"ttft_ms": 20, "tpot_ms": 6},
    )


def test_swapping_is_told(swapped: RunFolder, capsys: Out) -> None:
    life = life_of(swapped, "r3")
    check(swapped, life)
    assert lane(life).count(">") == lane(life).count("<") == 1  # however short
    assert [s.phase for s in life.stretches] == [
        "queued", "prefill", "decode", "swap out", "swapped", "swap in", "decode",
    ]  # fmt: skip
    main([str(swapped), "r3"])
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "cancelled (the client gave up)",
        "2 others were waiting (r1 and r2) already",
        'Preempted by the plan of step 2, mode swap: "0 pages are not enough for 4". No KV was lost',
        "That plan went on with r0, r1 and r2.",
        "Its KV, 3 pages, is, after 0.10 ms, on the host.",
        '"needs more than 3 pages", said of r4; this request was not named',
        'Its KV, 3 pages, began to come back: "pages are free again".',
        "Back on the device: 1 token",
        "Cancelled: the client gave up. 2 output tokens, 1 preemption.",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("kvcache", "parts"),
    [
        ("paged", ["It shares the KV of 9 tokens with r1. 7 further tokens in"]),
        (
            "contiguous",
            [
                "drawn when r1 had computed the prompt. It cannot share that: the kvcache or",
                "10 tokens, its prompt and its output so far, ran",
            ],
        ),
    ],
)
def test_a_further_sample_of_a_prompt(tmp_path: Path, capsys: Out, kvcache: str, parts: list[str]) -> None:
    run = serve(
        tmp_path,
        seed=3,
        kvcache={"name": kvcache},
        executor={"num_kv_pages": 64},
        workload={"num_requests": 2, "samples": 2, "request_rate": 500},
    )
    check(run, life_of(run, "r1#1"))
    main([str(tmp_path), "r1#1"])
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "a further sample of the prompt of r1",
        "Admitted with r1, which computes the prompt.",
        *parts,
    ):
        assert part in out


def test_a_client_that_gives_up_in_the_queue(swapped: RunFolder, capsys: Out) -> None:
    main([str(swapped), "r5"])
    out = " ".join(capsys.readouterr().out.split())
    assert "SLO missed: no TTFT, bound 20.00 ms, missed; no TPOT, bound 6.00 ms, undecided" in out
    assert "Cancelled: the client gave up" in out and "0 output tokens, 0 preemptions." in out


def test_a_long_life_keeps_to_its_columns(tmp_path: Path, capsys: Out) -> None:
    day = 86_400_000.0
    write(tmp_path, [started(), arrived(0, "a"), finished(day, "a", 0, "cancelled", "tired"), ended(day)])
    main([str(tmp_path), "a"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "+86,400.0 s Cancelled: tired before it ever ran. 0 output tokens, 0 preemptions."
    assert any("life       1440 min 0.0 s: 100.0 % queued" in line for line in lines)


def test_a_rejected_request(tmp_path: Path, capsys: Out) -> None:
    why = "prompt of 99 tokens leaves no room for output"
    write(tmp_path, [started(), arrived(1, "a"), finished(1, "a", 0, "rejected", why), ended(1)])
    main([str(tmp_path), "a"])
    out = " ".join(capsys.readouterr().out.split())
    assert f"a of {tmp_path}: rejected ({why})" in out
    assert "life 0 ms: of no length" in out
    assert f"Rejected: {why} before it ever ran. 0 output tokens, 0 preemptions." in out


# ---------------------------------------------------------------- logs that end early, or lack a part


def test_a_run_that_was_killed(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run())
    for name, keep in (("events.jsonl", -700), ("plan.jsonl", -60)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:keep])
    main([str(tmp_path), "b"])
    out = " ".join(capsys.readouterr().out.split())
    assert "b of" in out and "no end in the log" in out
    assert "The log ends here; the request was in phase" in out
    assert "note: the log has no end of the run: it was killed, or goes on" in out
    assert "SLO missed: TTFT 28.00 ms > 20.00 ms, missed" in out


def test_an_interrupted_run(tmp_path: Path, capsys: Out) -> None:
    records = [r for r in a_small_run() if r.t_ns <= 15 * MS]
    late = [finished(16, "b", 0, "unfinished", "interrupted"), ended(16, "interrupted", "Ctrl-C")]
    write(tmp_path, [*records, *late])
    main([str(tmp_path), "b"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Unfinished: interrupted before it ever ran." in out
    assert "note: the run itself ended as 'interrupted' (Ctrl-C)" in out


def test_without_a_plan_log(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run(), plans=False)
    main([str(tmp_path), "b"])
    out = " ".join(capsys.readouterr().out.split())
    assert "note: the run has no plan.jsonl" in out
    assert 'Preempted, mode recompute: "full"' in out  # the event has a reason of its own
    assert "it is not known who ran instead" in out and "What" not in out


def test_without_an_event_log(tmp_path: Path) -> None:
    write(tmp_path, a_small_run(), events=False)
    with pytest.raises(RunFolderError, match=r"no events\.jsonl"):
        main([str(tmp_path), "b"])


def test_transfers_of_others_and_of_the_dead_do_not_matter(tmp_path: Path) -> None:
    records = a_small_run()
    move = {"request": "a", "direction": "out", "pages": 1, "bytes": 1}
    records[9:9] = [
        TransferStarted(t_ns=15 * MS, transfer=0, **move),
        TransferEnded(t_ns=15 * MS, transfer=0),
    ]
    run = write(tmp_path, [*records[:-1], TransferEnded(t_ns=62 * MS, transfer=99), records[-1]])
    assert life_of(run, "b").moves == []
    assert life_of(run, "b").end_ns == 62 * MS


def test_plans_are_read_only_as_far_as_the_life_goes(tmp_path: Path) -> None:
    run = write(tmp_path, [*a_small_run(), planned(70, 9, {})])
    read: list[float] = []

    def watched() -> Any:
        for plan in run.plans():
            read.append(plan.t_ns / MS)
            yield plan

    read_life("c", run.events(), watched())
    assert read == [0, 10, 15, 20, 30, 35, 41, 52]  # the first after its end at 41 ends the reading


# ---------------------------------------------------------------- which request


def test_the_list(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run())
    main([str(tmp_path), "--list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["request", "a", "b", "c"]
    assert lines[2] == ["b", "online", "completed", "20", "4", "18.00", "28.00", "10.67", "60.00", "1"]
    assert lines[3] == ["c", "online", "completed", "5", "1", "4.00", "10.00", "-", "10.00", "0"]
    main([str(tmp_path), "--list", "--by", "tpot", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [one["request"] for one in found] == ["b", "a", "c"]  # c has none
    with pytest.raises(ServeLabError, match="cannot be sorted by 'tpto'") as error:
        main([str(tmp_path), "--list", "--by", "tpto"])
    assert "did you mean 'tpot'?" in error.value.do


def test_the_worst(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, a_small_run())
    main([str(tmp_path), "--worst", "preemptions"])
    assert capsys.readouterr().out.startswith("b of ")
    main([str(tmp_path), "--worst", "prompt"])
    assert capsys.readouterr().out.startswith("a of ")
    with pytest.raises(ServeLabError, match="no request has the most arrival"):
        main([str(tmp_path), "--worst", "arrival"])


def test_no_request_lists_some_and_says_how_to_go_on(tmp_path: Path, capsys: Out) -> None:
    write(tmp_path, [started(), *(arrived(i, f"r{i}") for i in range(25)), ended(30)])
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith("25 requests in ") and "  r19 " in out and "  r20 " not in out
    assert f"... and 5 more: servelab explain {tmp_path} --list" in out
    assert f"servelab explain {tmp_path} r0\n" in out


@pytest.mark.parametrize(
    ("name", "hint"), [("r12x", "did you mean r12"), ("zzz", "ids look like r0, r1, r2")]
)
def test_an_unknown_request(tmp_path: Path, name: str, hint: str) -> None:
    write(tmp_path, [started(), *(arrived(i, f"r{i}") for i in range(25)), ended(30)])
    with pytest.raises(ServeLabError, match=f"no request '{name}'") as error:
        main([str(tmp_path), name])
    assert error.value.why.startswith("25 requests arrived")
    assert error.value.do.startswith(hint)


def test_help(capsys: Out) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert "--worst" in capsys.readouterr().out

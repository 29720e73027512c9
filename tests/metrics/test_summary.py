"""The summary against logs worked out by hand (``logs.py``)."""

from typing import Any

import pytest
from tests.metrics.logs import (
    MS,
    admitted,
    arrived,
    ended,
    finished,
    started,
    step,
    three_requests,
)

from servelab.core.errors import ConfigError
from servelab.core.metrics import LogError, SummaryOptions, Timeline, summarize
from servelab.core.records import Record, RequestArrived


def summary(records: list[Record], **options: Any) -> dict[str, Any]:
    return summarize(Timeline().feed_all(records), SummaryOptions(**options) if options else None)


def test_three_requests_flat() -> None:
    s = summary(three_requests())
    assert s["duration"] == 0.21
    assert (s["completed"], s["failed"]) == (3, 0)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (60, 9)
    assert s["request_throughput"] == pytest.approx(3 / 0.21)
    assert s["output_throughput"] == pytest.approx(9 / 0.21)
    assert s["total_token_throughput"] == pytest.approx(69 / 0.21)
    assert s["max_output_tokens_per_s"] == 9.0
    assert s["max_concurrent_requests"] == 3  # a and b and, from 100, c
    # TTFT 110, 110, 60
    assert s["mean_ttft_ms"] == pytest.approx(280 / 3)
    assert s["median_ttft_ms"] == 110
    assert s["std_ttft_ms"] == pytest.approx((2 * (50 / 3) ** 2 / 3 + (100 / 3) ** 2 / 3) ** 0.5)
    assert s["p99_ttft_ms"] == 110
    # TPOT 12.5 and 45; c has one token and is left out
    assert s["mean_tpot_ms"] == s["median_tpot_ms"] == 28.75
    assert s["std_tpot_ms"] == 16.25
    assert s["p99_tpot_ms"] == pytest.approx(12.5 + 0.99 * 32.5)
    # ITL 10 10 10 10 20 80
    assert s["mean_itl_ms"] == pytest.approx(140 / 6)
    assert s["median_itl_ms"] == 10
    assert s["p99_itl_ms"] == pytest.approx(20 + 0.95 * 60)
    # E2EL 160, 200, 60
    assert s["mean_e2el_ms"] == pytest.approx(140)
    assert s["p99_e2el_ms"] == pytest.approx(160 + 0.98 * 40)


def test_three_requests_goodput() -> None:
    # a good: TTFT 110 <= 150, TPOT 12.5 <= 15. b missed: TPOT 45 > 15. c good: TTFT 60 <= 60, TPOT 0
    s = summary(three_requests())
    more = s["servelab"]
    assert s["request_goodput"] == pytest.approx(2 / 0.21)
    assert more["token_goodput"] == pytest.approx(6 / 0.21)
    assert (more["slo_good"], more["slo_judged"]) == (2, 3)
    assert more["slo_attainment"] == pytest.approx(2 / 3)
    assert more["slo_attainment_by_metric"] == {"ttft": 1.0, "tpot": pytest.approx(2 / 3)}
    assert more["slo_by_class"] == {
        "online": {
            "good": 2,
            "judged": 3,
            "attainment": pytest.approx(2 / 3),
            "attainment_by_metric": {"ttft": 1.0, "tpot": pytest.approx(2 / 3)},
            "request_goodput": pytest.approx(2 / 0.21),
            "token_goodput": pytest.approx(6 / 0.21),
        }
    }


def test_three_requests_rest() -> None:
    more = summary(three_requests())["servelab"]
    assert more["samples"] == {"ttft": 3, "tpot": 2, "itl": 6, "e2el": 3, "queueing": 3}
    assert more["length_capped_requests"] == 1
    assert (more["preemptions"], more["recomputed_tokens"], more["prefix_hit_tokens"]) == (1, 20, 4)
    # queueing: a 50, b 100, c 40
    assert more["median_queueing_ms"] == 50
    # 7 steps in 6 launches; requests per step 1 2 1 1 2 1 1, tokens 10 21 1 1 31 21 1
    assert more["batch"] == {
        "launches": 6,
        "steps": 7,
        "mean_requests": pytest.approx(9 / 7),
        "max_requests": 2,
        "mean_tokens": pytest.approx(86 / 7),
        "max_tokens": 31,
    }
    # used at launch ends: 10 from 110, 40 from 120, 20 from 140, 0 from 160, 30 from 200 to 210
    # (10 * 10 + 40 * 20 + 20 * 20 + 0 * 40 + 30 * 10) / 100 = 16
    assert more["kv_pages"] == [
        {
            "pool": "full",
            "pages": 100,
            "peak_pages": 40,
            "mean_pages": pytest.approx(16),
            "peak_use": 0.4,
            "mean_use": pytest.approx(0.16),
            # a 10 from 110; a 11, b 20 from 120; a 13 from 140; a 14, c 30 from 160; b 21 from 200
            "mean_stored_tokens": pytest.approx(29.5),
            "mean_awaited_tokens": 0,
            "mean_idle_tokens": pytest.approx(16 * 16 - 29.5),
            "mean_unusable_tokens": 0,
        }
    ]
    assert more["run"] == {"status": "ok", "reason": "", "partial": False, "engines": 1}


def outcomes(ttft: float | None = None) -> list[Record]:
    """One request of each fate, all arriving at 0; ``ok`` has TTFT 10, TPOT 10, E2EL 20."""
    names = ("ok", "rejected", "policy", "client", "broken", "open")
    return [
        started(),
        *(arrived(0, name, ttft=ttft) for name in names),
        finished(1, "rejected", 0, "rejected", "queue full"),
        step(0, [10], {"ok": (10, 1), "policy": (10, 1), "broken": (10, 1)}),
        finished(12, "policy", 1, "aborted", "too long"),
        finished(15, "client", 0, "cancelled", "gave up"),
        step(10, [20], {"ok": (1, 1), "policy": (1, 0), "broken": (1, 1)}),
        finished(20, "ok", 2),
        finished(30, "broken", 2, "failed", "instance lost"),
        ended(40, "interrupted", "stopped by the user"),
    ]


def test_every_fate_is_counted_once() -> None:
    s = summary(outcomes())
    assert s["servelab"]["requests"] == {
        "arrived": 6,
        "completed": 1,
        "failed": 1,
        "aborted": 1,
        "cancelled": 1,
        "rejected": 1,
        "unfinished": 1,
    }
    assert (s["completed"], s["failed"]) == (1, 4)
    assert (s["total_input_tokens"], s["total_output_tokens"]) == (10, 2)
    assert s["duration"] == 0.04  # a request is open, so to the end of the log
    assert s["servelab"]["samples"]["ttft"] == 1
    assert s["servelab"]["run"]["partial"]


def test_without_objectives_there_is_no_goodput() -> None:
    s = summary(outcomes())
    more = s["servelab"]
    assert (
        s["request_goodput"] is more["token_goodput"] is more["slo_attainment"] is more["slo_judged"] is None
    )
    assert more["slo_attainment_by_metric"] == more["slo_by_class"] == {}


@pytest.mark.parametrize(
    ("ttft", "misses", "good", "judged"),
    [
        # ok good; rejected, policy, broken missed; client and open waited 15 and 40 without a token
        (50, True, 1, 4),  # neither had broken the bound: undecided
        (20, True, 1, 5),  # open had
        (14, True, 1, 6),  # both had
        (14, False, 1, 5),  # rejections left out
        (9, True, 0, 6),
    ],
)
def test_attainment_by_fate(ttft: float, misses: bool, good: int, judged: int) -> None:
    more = summary(outcomes(ttft=ttft), rejections_are_misses=misses)["servelab"]
    assert (more["slo_good"], more["slo_judged"]) == (good, judged)
    assert more["slo_attainment_by_metric"]["ttft"] == good / judged


def gaps(tbt: float, fate: str) -> dict[str, Any]:
    """Tokens at 10, 20 and 50, so gaps of 10 and 30; the log ends at 70."""
    first = arrived(0, "a")
    first.slo_tbt_ns = int(tbt * MS)
    steps = [step(t - 1, [t], {"a": (1, 1)}) for t in (10, 20, 50)]
    ends: list[Record] = [] if fate == "open" else [finished(70 if fate == "cancelled" else 50, "a", 3, fate)]
    more: dict[str, Any] = summary([started(), first, *steps, *ends, ended(70)])["servelab"]
    return more


@pytest.mark.parametrize(
    ("tbt", "fate", "good", "judged"),
    [
        (30, "completed", 1, 1),  # inclusive
        (29.9, "completed", 0, 1),
        (29.9, "cancelled", 0, 1),  # one gap had been too long
        (30, "open", 0, 0),  # 20 since its last token: nothing is broken, nothing met
        (21, "open", 0, 1),
        (30, "aborted", 0, 1),
    ],
)
def test_every_gap_of_a_request_is_bounded(tbt: float, fate: str, good: int, judged: int) -> None:
    more = gaps(tbt, fate)
    assert (more["slo_good"], more["slo_judged"]) == (good, judged)
    assert more["slo_attainment_by_metric"] == {"tbt": good / judged if judged else None}


def test_waiting_for_the_next_token_breaks_the_bound_on_gaps() -> None:
    first = arrived(0, "a")
    first.slo_tbt_ns = 40 * MS
    records = [started(), first, step(9, [10], {"a": (10, 1)})]
    assert summary([*records, ended(50)])["servelab"]["slo_judged"] == 0  # 40: still within
    assert summary([*records, ended(51)])["servelab"]["slo_judged"] == 1
    assert summary([started(), first, ended(99)])["servelab"]["slo_judged"] == 0  # no token, no gap


def test_goodput_by_class() -> None:
    # a (online) good with 5 tokens; b (offline) misses TPOT; c (offline) good with 1 token
    records = three_requests()
    for record in records:
        if isinstance(record, RequestArrived) and record.request in "bc":
            record.request_class = "offline"
    classes = summary(records)["servelab"]["slo_by_class"]
    assert list(classes) == ["offline", "online"]
    assert classes["offline"] == {
        "good": 1,
        "judged": 2,
        "attainment": 0.5,
        "attainment_by_metric": {"ttft": 1.0, "tpot": 0.5},
        "request_goodput": pytest.approx(1 / 0.21),
        "token_goodput": pytest.approx(1 / 0.21),
    }
    assert (classes["online"]["good"], classes["online"]["token_goodput"]) == (1, pytest.approx(5 / 0.21))


def test_a_request_cut_off_by_the_end_of_the_run_is_unfinished() -> None:
    records = [
        arrived(0, "a"),
        finished(5, "a", 0, "unfinished", "interrupted"),
        ended(5, "interrupted", "ctrl-c"),
    ]
    counts = summary([started(), *records])["servelab"]["requests"]
    assert (counts["failed"], counts["unfinished"]) == (0, 1)


def test_a_request_that_states_nothing_is_not_judged() -> None:
    more = summary([started(), arrived(0, "a", ttft=5), arrived(0, "b"), ended(1)])["servelab"]
    assert more["slo_judged"] == 0  # a is open and its bound not broken
    assert more["slo_attainment"] is None


def speculation() -> list[Record]:
    """Chunks at 10, 30, 34 of 1, 4 and 2 tokens, then a hold of two steps of 3 at 40 and 46: N = 13."""
    return [
        started(),
        arrived(0, "a"),
        step(0, [10], {"a": (10, 1)}),
        step(10, [30], {"a": (1, 4)}),
        step(30, [34], {"a": (1, 2)}),
        step(34, [40, 46], {"a": (1, 6)}),
        finished(46, "a", 13),
        ended(46),
    ]


def test_speculative_steps_are_chunks() -> None:
    s = summary(speculation())
    assert s["total_output_tokens"] == 13
    assert s["mean_tpot_ms"] == 36 / 12
    assert s["servelab"]["samples"]["itl"] == 4  # 20 4 6 6
    assert s["mean_itl_ms"] == 9
    assert s["max_output_tokens_per_s"] == 13
    spread = summary(speculation(), itl_mode="spread")
    assert spread["servelab"]["samples"]["itl"] == 12  # 5 x4, 2 x2, 2 x3, 2 x3
    assert spread["mean_itl_ms"] == 3
    assert spread["servelab"]["itl_mode"] == "spread"


def test_tbt_attainment_only_if_asked() -> None:
    assert summary(speculation())["servelab"]["tbt_attainment"] is None
    more = summary(speculation(), tbt_bound_ns=6 * MS)["servelab"]
    assert (more["tbt_bound_ms"], more["tbt_attainment"]) == (6, 0.75)
    records = [started(settings={"slo": {"tbt_ms": 4}}), *speculation()[1:]]
    assert summary(records)["servelab"]["tbt_bound_ms"] == 4  # the run's own: gaps 20 4 6 6
    assert summary(records)["servelab"]["tbt_attainment"] == 0.25
    assert summary(records, tbt_bound_ns=6 * MS)["servelab"]["tbt_bound_ms"] == 6
    assert summary(records, tbt_bound_ns=0)["servelab"]["tbt_bound_ms"] == 0


def test_busiest_second_counts_from_the_first_arrival() -> None:
    # arrival at 500; tokens at 1400, 1499 | 1500, 1600, 2499 | 2500: seconds 500..1500, 1500..2500, 2500..
    records = [started(), arrived(500, "a"), arrived(100, "never")]
    times = [1400, 1499, 1500, 1600, 2499, 2500]
    records += [step(t - 1, [t], {"a": (1, 1)}) for t in times]
    s = summary([*records, finished(2500, "a", 6), ended(2500)])
    assert s["max_output_tokens_per_s"] == 3


def test_busiest_second_of_unequal_chunks() -> None:
    records = [started(), arrived(0, "a"), step(0, [999], {"a": (1, 3)}), step(999, [1000], {"a": (1, 5)})]
    assert summary([*records, finished(1000, "a", 8), ended(1000)])["max_output_tokens_per_s"] == 5


def test_nothing_measured_is_none_and_never_zero() -> None:
    s = summary([started(), ended(0)])
    assert s["duration"] == 0
    for key in ("request_throughput", "output_throughput", "mean_ttft_ms", "p99_itl_ms", "std_tpot_ms"):
        assert s[key] is None, key
    assert s["servelab"]["kv_pages"][0]["peak_pages"] is None


def test_percentile_keys() -> None:
    s = summary(three_requests(), percentiles=(50.0, 99.9))
    assert s["p50_e2el_ms"] == s["median_e2el_ms"] == 160
    assert "p99.9_ttft_ms" in s and "p99_ttft_ms" not in s
    with pytest.raises(ConfigError, match=r"percentile 101 is outside"):
        SummaryOptions(percentiles=(101,))
    with pytest.raises(ConfigError, match="cannot be negative"):
        SummaryOptions(tbt_bound_ns=-1)


def test_several_engines_keep_their_own_pages() -> None:
    records = [
        started(),
        arrived(0, "a"),
        arrived(0, "b"),
        step(0, [10], {"a": (10, 1)}, free=(70,), engine=0),
        step(0, [10], {"b": (10, 1)}, free=(50,), engine=1),
        step(10, [30], {"b": (1, 1)}, free=(100,), engine=1),
        step(10, [40], {"a": (1, 1)}, free=(100,), engine=0),
        finished(30, "b", 2),
        finished(40, "a", 2),
        ended(40),
    ]
    more = summary(records)["servelab"]
    assert more["run"]["engines"] == 2
    assert more["kv_pages"][0]["peak_pages"] == 50
    assert more["kv_pages"][0]["mean_pages"] == pytest.approx((30 * 30 + 50 * 20) / 50)


def test_a_log_cut_off_in_the_middle_still_has_figures() -> None:
    s = summary(three_requests()[:13])  # up to the end of a
    assert s["completed"] == 1
    assert s["duration"] == 0.16
    assert s["servelab"]["requests"]["unfinished"] == 2
    assert s["servelab"]["run"] == {
        "status": "unknown",
        "reason": "the log has no end of run",
        "partial": True,
        "engines": 1,
    }


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([step(0, [1], {"x": (1, 1)})], "request x is named before it arrived"),
        ([step(0, [1, 2], {"x": (1, 2)})], "request x is named before it arrived"),
        ([admitted(0, "x")], "request x is named before it arrived"),
        ([arrived(0, "x"), arrived(1, "x")], "request x arrives twice"),
        ([arrived(0, "x"), finished(1, "x", 0), finished(2, "x", 0)], "request x ends twice"),
        ([arrived(0, "x"), step(0, [1, 2], {"x": (1, 3)})], "emitted 3 tokens in 2 equal steps"),
        ([arrived(0, "x"), step(0, [1, 2], {"x": (1, 1)})], "emitted 1 tokens in 2 equal steps"),
        ([arrived(0, "x"), finished(1, "x", 4)], "disagrees with itself about the output of request x"),
    ],
)
def test_contradictions_are_refused(records: list[Record], message: str) -> None:
    with pytest.raises(LogError, match=message):
        summary(records)


def test_an_end_may_come_before_the_step_that_caused_it() -> None:
    records = three_requests()
    records[-3], records[-2] = records[-2], records[-3]
    assert records[-2].ev == "step"
    assert summary(records) == summary(three_requests())


def test_token_times_are_compact() -> None:
    timeline = Timeline().feed_all([arrived(0, f"r{i}") for i in range(256)])
    batch = {f"r{i}": (1, 64) for i in range(256)}
    for n in range(10):
        timeline.feed(step(n * 64, [n * 64 + i + 1 for i in range(64)], batch))
    facts = timeline.requests["r0"]
    assert len(facts.times) == 640
    assert facts.times.itemsize == 8
    assert facts.sizes is None

"""Other tools' names and rules, against a log worked out by hand (``tests/metrics/logs.py``)."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from tests.metrics.logs import arrived, ended, finished, started, step, three_requests
from tests.metrics.schema import result_of

from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.metrics import Distribution, Timeline
from servelab.core.records import Record
from servelab.core.run_folder import RunFolderError
from servelab.plugins.commands import TABLE
from servelab.plugins.commands._aiperf import aiperf
from servelab.plugins.commands._guidellm import (
    PERCENTILES,
    concurrency_distribution,
    distribution,
    guidellm,
    merged,
    rate_distribution,
)
from servelab.plugins.commands.export import export, main


def fates() -> list[Record]:
    """``ok`` has TTFT 10, TPOT 10, E2EL 20; the others end in every other way."""
    names = ("ok", "rejected", "policy", "client", "broken", "open")
    return [
        started(),
        *(arrived(0, name, e2el=25) for name in names),
        finished(1, "rejected", 0, "rejected", "queue full"),
        step(0, [10], {"ok": (10, 1), "policy": (10, 1), "broken": (10, 1)}),
        finished(12, "policy", 1, "aborted", "too long"),
        finished(15, "client", 0, "cancelled", "gave up"),
        step(10, [20], {"ok": (1, 1), "policy": (1, 0), "broken": (1, 1)}),
        finished(20, "ok", 2),
        finished(30, "broken", 2, "failed", "instance lost"),
        ended(40, "interrupted", "stopped by the user"),
    ]


def speculation() -> list[Record]:
    """Chunks at 10, 30 and 34 of 1, 4 and 2 tokens."""
    steps = [step(0, [10], {"a": (9, 1)}), step(10, [30], {"a": (1, 4)}), step(30, [34], {"a": (1, 2)})]
    return [started(), arrived(0, "a"), *steps, finished(34, "a", 7), ended(34)]


def bench(records: list[Record]) -> dict[str, Any]:
    (one,) = guidellm(Timeline().feed_all(records))["benchmarks"]
    return one  # type: ignore[no-any-return]


def done(records: list[Record], metric: str) -> dict[str, Any]:
    return bench(records)["metrics"][metric]["successful"]  # type: ignore[no-any-return]


# ------------------------------------------------------------------ GuideLLM


def test_guidellm_time_per_output_token_includes_the_first() -> None:
    # (tn - t0) / N: a 160 / 5 = 32, b 200 / 3, c 60 / 1; weights 5, 3, 1
    found = done(three_requests(), "time_per_output_token_ms")
    assert found["mean"] == approx((160 + 200 + 60) / 9)
    assert (found["count"], found["min"], found["max"]) == (9, 32.0, approx(200 / 3))
    assert (found["median"], found["mode"]) == (32.0, 32.0)  # five of nine
    assert found["percentiles"]["p75"] == approx(200 / 3)  # 32 and 60 are six of nine
    assert found["total_sum"] == approx(420)


def test_guidellm_inter_token_latency_is_our_tpot() -> None:
    # a 12.5 with weight 4, b 45 with weight 2, c has one token
    found = done(three_requests(), "inter_token_latency_ms")
    assert (found["mean"], found["count"], found["median"]) == (approx(140 / 6), 6, 12.5)
    assert found["variance"] == approx((4 * (12.5 - 140 / 6) ** 2 + 2 * (45 - 140 / 6) ** 2) / 6)
    assert found["std_dev"] == approx(found["variance"] ** 0.5)


def test_guidellm_units_and_counts() -> None:
    latency = done(three_requests(), "request_latency")  # seconds
    assert (latency["mean"], latency["median"], latency["max"]) == (approx(0.14), 0.16, 0.2)
    ttft = done(three_requests(), "time_to_first_token_ms")
    assert (ttft["mean"], ttft["count"], ttft["percentiles"]["p25"]) == (approx(280 / 3), 3, 60.0)
    assert done(three_requests(), "prompt_token_count")["total_sum"] == approx(60)
    assert done(three_requests(), "output_token_count")["total_sum"] == approx(9)
    assert done(three_requests(), "total_token_count")["max"] == 31.0
    assert done(three_requests(), "request_streaming_iterations_count")["max"] == 5.0


def test_guidellm_rates_and_concurrency_over_time() -> None:
    # ends at 160, 160 and 210 of 0 to 210: 0 until 80, then 2 for 105, then 1 for 25 ms
    rate = done(three_requests(), "requests_per_second")
    assert (rate["mean"], rate["count"]) == (approx(3 / 0.21), 3)
    assert (rate["min"], rate["median"], rate["max"]) == (0.0, approx(2 / 0.105), approx(1 / 0.025))
    # a 0..160, b 10..210, c 100..160: 1 for 10 + 50, 2 for 90, 3 for 60
    level = done(three_requests(), "request_concurrency")
    assert (level["mean"], level["median"], level["max"], level["count"]) == (approx(2.0), 2.0, 3.0, 3)
    assert done(three_requests(), "output_tokens_per_second")["mean"] == approx(9 / 0.21)
    assert done(three_requests(), "prompt_tokens_per_second")["mean"] == approx(60 / 0.21)
    assert done(three_requests(), "tokens_per_second")["mean"] == approx(69 / 0.21)


def test_guidellm_chunks_of_several_tokens() -> None:
    found = done(speculation(), "output_tokens_per_iteration")
    assert (found["count"], found["mean"], found["max"]) == (3, approx(7 / 3), 3.0)  # 1, then 6 over two
    assert done(speculation(), "iter_tokens_per_iteration")["mean"] == 3.0
    assert done(speculation(), "inter_token_latency_ms")["mean"] == 4.0  # 24 ms for 6 tokens


def test_guidellm_splits_by_status() -> None:
    one = bench(fates())
    totals = {"successful": 1, "incomplete": 2, "errored": 3, "total": 6}
    assert one["metrics"]["request_totals"] == one["scheduler_metrics"]["requests_made"] == totals
    latency = one["metrics"]["request_latency"]
    assert {status: found["count"] for status, found in latency.items()} == totals
    assert latency["incomplete"]["max"] == 0.04  # open to the end of the log
    assert latency["errored"]["min"] == 0.001
    ttft = one["metrics"]["time_to_first_token_ms"]
    assert [ttft[status]["count"] for status in totals] == [1, 0, 2, 3]  # those that have a token
    assert ttft["incomplete"]["mean"] == 0.0  # GuideLLM's word for nothing
    assert (one["start_time"], one["end_time"], one["duration"]) == (0.0, 0.04, 0.04)


def test_guidellm_goodput_by_its_rules() -> None:
    # ok within 25 ms; three errored are misses; incomplete ones are left out
    metrics = bench(fates())["metrics"]
    assert (metrics["slo_attainment"], metrics["slo_determined_requests"]) == (0.25, 4)
    assert metrics["request_goodput"]["successful"]["mean"] == approx(1 / 0.04)
    # requests that state different bounds have no common attainment there
    assert bench(three_requests())["metrics"]["slo_attainment"] is None
    # a request of one token has no inter-token latency: undetermined there, good here
    single = [started(), arrived(0, "a", tpot=5), step(0, [9], {"a": (9, 1)}), finished(9, "a", 1), ended(9)]
    assert bench(single)["metrics"]["slo_determined_requests"] == 0


def test_guidellm_report_says_who_wrote_it() -> None:
    report = guidellm(Timeline().feed_all(three_requests()))
    assert report["metadata"]["version"] == 2
    assert report["metadata"]["guidellm_version"].startswith("servelab")


def test_nearest_rank_and_linear_percentiles_differ() -> None:
    found = distribution([(value, 1) for value in (1, 2, 3, 4)])
    assert found["percentiles"]["p50"] == found["median"] == 2.0  # 2.5 with interpolation
    assert Distribution.of([1, 2, 3, 4]).percentile(50) == 2.5


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_unweighted_percentiles_are_of_the_nearest_rank(values: list[int]) -> None:
    found = distribution([(value, 1) for value in values])
    plain = Distribution.of(values)
    for name, share in PERCENTILES.items():
        rank = max(ceil(Fraction(str(share)) * len(values)), 1)
        assert found["percentiles"][name] == sorted(values)[rank - 1], name
    assert found["mean"] == approx(plain.mean()) and found["std_dev"] == approx(plain.std())
    assert (found["count"], found["total_sum"]) == (len(values), approx(sum(values)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=12))
def test_a_weight_is_a_number_of_equal_samples(weighted: list[tuple[int, int]]) -> None:
    many = [(value, 1) for value, weight in weighted for _ in range(weight)]
    assert distribution(weighted) == distribution(many)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=20))
def test_rates_over_time_add_up(events: list[tuple[float, int]]) -> None:
    found = rate_distribution(events, 0.0, 10.5)
    assert found["count"] == sum(amount for _, amount in events)
    assert found["mean"] * 10.5 == approx(found["count"])


def test_events_close_together_are_one() -> None:
    assert merged([(1.00005, 1), (1.0, 2), (1.00015, 4)]) == [(1.0, 3), (1.00015, 4)]
    assert concurrency_distribution([(0.0, 1.0), (1.0, 2.0)], 0.0, 2.0)["max"] == 1.0


# ------------------------------------------------------------------ AIPerf


def test_aiperf_inter_token_latency_is_our_tpot() -> None:
    found = aiperf(Timeline().feed_all(three_requests()))
    itl = found["inter_token_latency"]
    assert (itl["unit"], itl["avg"], itl["count"], itl["std"]) == ("ms", 28.75, 2, 16.25)
    assert itl["p99"] == approx(12.5 + 0.99 * 32.5)  # linear
    chunks = found["inter_chunk_latency"]  # 10, 10, 10, 20; 80, 10
    assert (chunks["avg"], chunks["count"], chunks["sum"], chunks["p50"]) == (
        approx(140 / 6),
        6,
        approx(140),
        10,
    )


def test_aiperf_metrics_by_hand() -> None:
    found = aiperf(Timeline().feed_all(three_requests()))
    blocks = {
        "time_to_first_token": ("ms", 280 / 3),
        "time_to_second_token": ("ms", 45),  # 10 and 80
        "request_latency": ("ms", 140),  # milliseconds, not GuideLLM's seconds
        "decode_duration": ("ms", (50 + 90 + 0) / 3),
        "output_token_throughput_per_user": ("tokens/sec/user", (1000 / 12.5 + 1000 / 45) / 2),
        "e2e_output_token_throughput": ("tokens/sec/user", (5 / 0.16 + 3 / 0.2 + 1 / 0.06) / 3),
        "prefill_throughput_per_user": ("tokens/sec/user", (10 / 0.11 + 20 / 0.11 + 30 / 0.06) / 3),
        "output_sequence_length": ("tokens", 3),
        "input_sequence_length": ("tokens", 20),
    }
    for name, (unit, avg) in blocks.items():
        assert (found[name]["unit"], found[name]["avg"]) == (unit, approx(avg)), name
        assert {"p1", "p99", "min", "max", "std", "count", "sum"} <= found[name].keys()
    values = {
        "request_count": ("requests", 3),
        "request_throughput": ("requests/sec", 3 / 0.21),
        "output_token_throughput": ("tokens/sec", 9 / 0.21),
        "input_token_throughput": ("tokens/sec", 60 / 0.21),
        "total_token_throughput": ("tokens/sec", 69 / 0.21),
        "benchmark_duration": ("sec", 0.21),
        "total_isl": ("tokens", 60),
        "total_osl": ("tokens", 9),
        "good_request_count": ("requests", 2),
        "goodput": ("requests/sec", 2 / 0.21),
    }
    for name, (unit, value) in values.items():
        assert found[name] == {"unit": unit, "avg": approx(value)}, name
    assert "error_request_count" not in found and not found["was_cancelled"]


def test_aiperf_counts_completed_requests_only() -> None:
    found = aiperf(Timeline().feed_all(fates()))
    assert (found["request_count"]["avg"], found["error_request_count"]["avg"]) == (1, 3)
    assert (found["request_latency"]["count"], found["benchmark_duration"]["avg"]) == (1, 0.02)
    assert {"error_details": {"type": "rejected", "message": "queue full"}, "count": 1} in found[
        "error_summary"
    ]
    assert len(found["error_summary"]) == 3
    assert found["was_cancelled"]


def test_aiperf_leaves_out_what_it_cannot_say() -> None:
    found = aiperf(Timeline().feed_all([started(), arrived(0, "a"), ended(9)]))
    assert found["request_count"]["avg"] == 0
    assert not {"request_latency", "request_throughput", "goodput", "start_time"} & found.keys()


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    result_of(folder, observers=["jsonl", "report"], slo={"ttft_ms": 100})
    return folder


@pytest.mark.parametrize("to", ["guidellm", "aiperf"])
def test_a_run_is_exported_to_stdout_or_a_file(
    run: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(run), "--to", to])
    text = capsys.readouterr().out
    main([str(run), "--to", to, "--out", str(tmp_path / "out.json")])
    assert (tmp_path / "out.json").read_text() == text
    ours = json.loads((run / "results.json").read_text())
    found = json.loads(text)
    if to == "guidellm":
        (one,) = found["benchmarks"]
        assert one["metrics"]["request_totals"]["successful"] == ours["completed"]
        assert one["metrics"]["time_to_first_token_ms"]["successful"]["mean"] == approx(ours["mean_ttft_ms"])
        assert one["metrics"]["request_latency"]["successful"]["mean"] * 1000 == approx(ours["mean_e2el_ms"])
    else:
        assert found["inter_token_latency"]["avg"] == approx(ours["mean_tpot_ms"])
        assert found["inter_chunk_latency"]["p50"] == approx(ours["median_itl_ms"])
        assert found["goodput"]["avg"] == approx(ours["request_goodput"])
        assert found["start_time"] <= found["end_time"]


def test_a_file_that_is_there_stays(run: Path) -> None:
    before = (run / "results.json").read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        main([str(run), "--to", "aiperf", "--out", str(run / "results.json")])
    assert (run / "results.json").read_bytes() == before
    with pytest.raises(ServeLabError, match="cannot be written"):
        main([str(run), "--to", "aiperf", "--out", str(run / "nowhere" / "x.json")])


def test_a_folder_without_a_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run"):
        export(tmp_path, "aiperf")
    (tmp_path / "results.json").write_bytes((run / "results.json").read_bytes())
    with pytest.raises(RunFolderError, match=r"the run has no events\.jsonl"):
        export(tmp_path, "aiperf")


def test_a_run_that_served_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")  # killed at once
    with pytest.raises(ServeLabError, match="there is nothing to export"):
        export(tmp_path, "guidellm")


def test_a_run_that_was_killed_is_exported_too(run: Path, tmp_path: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(lines[:-6]) + lines[-6][:10])
    found = export(tmp_path, "aiperf")
    assert 0 < found["request_count"]["avg"] < 24 and found["was_cancelled"]


def test_the_command_line_knows_it() -> None:
    assert TABLE["export"][0] == f"{main.__module__}:{main.__name__}"


@pytest.mark.parametrize("argv", [["x"], ["x", "--to", "vllm"], ["--to", "aiperf"]])
def test_arguments_are_checked(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert "usage: servelab export" in capsys.readouterr().err

"""BurstGPT: what is drawn like it, and what is read from its file."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from servelab.core.api import Arrival, Context, WorkloadError
from servelab.plugins.workloads import _burstgpt_like as like
from servelab.plugins.workloads.burstgpt import BurstGPT, BurstGPTConfig

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
ROWS = """5,ChatGPT,100,20,120,Conversation log
5,GPT-4,200,0,200,Conversation log
7,ChatGPT,30,12,42,API log
8,ChatGPT,0,0,0,Conversation log
65,GPT-4,40,14,54,API log
125,ChatGPT,300,90,390,Conversation log
"""
V12 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,100,20,120,Conversation log
6.25,b,2,GPT-4,10,2,12,Conversation log
7,,0.5,ChatGPT,30,12,42,API log
90,a,1,ChatGPT,150,20,170,Conversation log
"""


@pytest.fixture
def burst(context: Callable[..., Context]) -> Callable[..., BurstGPT]:
    def make(*, seed: int = 0, max_model_len: int = 16_384, **settings: Any) -> BurstGPT:
        return BurstGPT(BurstGPTConfig.model_validate(settings), context(seed, max_model_len))

    return make


@pytest.fixture
def trace(tmp_path: Path) -> Callable[..., str]:
    def write(text: str = f"{HEADER}\n{ROWS}") -> str:
        path = tmp_path / "burst.csv"
        path.write_text(text)
        return str(path)

    return write


Burst = Callable[..., BurstGPT]
Write = Callable[..., str]


def requests(workload: BurstGPT) -> list[Arrival]:
    return [item for item in workload.arrivals() if isinstance(item, Arrival)]


def lengths(workload: BurstGPT) -> list[tuple[int, int]]:
    return [(a.spec.prompt_tokens, a.truth.output_tokens) for a in requests(workload) if a.truth]


def seconds(workload: BurstGPT) -> list[float]:
    return [a.time_ns / 1e9 for a in workload.arrivals()]


# --- BurstGPT-like -----------------------------------------------------------------------------------------

PUBLISHED = {
    "prompt_tokens": {"mean": 374, 50: 74, 90: 1291, 95: 1697, 99: 3023},
    "output_tokens": {"mean": 122, 50: 14, 90: 401, 95: 510, 99: 757},
}
"""Of the first 59,999 rows of the real file."""


def test_generated_lengths_follow_the_published_percentiles(burst: Burst) -> None:
    pairs = lengths(burst(num_requests=60_000))
    for k, wanted in enumerate(PUBLISHED.values()):
        ordered = sorted(pair[k] for pair in pairs)
        assert sum(ordered) / len(ordered) == pytest.approx(wanted["mean"], rel=0.15)
        for q in (50, 90, 95, 99):
            assert ordered[len(ordered) * q // 100] == pytest.approx(wanted[q], rel=0.15)
    both = sorted(map(sum, pairs))
    for q, total in {50: 99, 90: 1634, 95: 2099, 99: 3169}.items():
        assert both[len(both) * q // 100] == pytest.approx(total, rel=0.15)
    assert max(p for p, _ in pairs) <= like.LONGEST_REQUEST
    assert max(o for _, o in pairs) <= like.LONGEST_RESPONSE


def test_generated_shares_are_the_published_ones(burst: Burst) -> None:
    told = burst(num_requests=60_000).describe()
    assert told["log_types"]["conversation"] == pytest.approx(27_737, rel=0.02)
    assert told["service_models"]["GPT-4"] == pytest.approx(9_505, rel=0.03)
    assert told["traffic"] == "BurstGPT-like"
    assert "fitted" in told["constants"]["conversation requests"]


def test_conversations_are_longer_the_more_is_asked(burst: Burst) -> None:
    told = burst(num_requests=20_000, log_type="conversation").describe()
    assert told["log_types"] == {"conversation": 20_000}
    assert told["output_tokens"]["mean"] == pytest.approx(262, rel=0.03)
    pairs = lengths(burst(num_requests=20_000, log_type="conversation"))

    def median(low: int, high: int) -> float:
        answers = sorted(o for p, o in pairs if low <= p < high)
        return answers[len(answers) // 2]

    assert median(150, 250) == pytest.approx(72 + 0.209 * 200, rel=0.05)
    assert median(1900, 2100) == pytest.approx(72 + 0.209 * 2000, rel=0.05)


def test_three_million_output_tokens_of_ten_thousand_requests(burst: Burst) -> None:
    told = burst(
        num_requests=10_000, log_type="conversation", output_scale=1.15, max_model_len=4096
    ).describe()
    assert told["output_tokens"]["total"] == pytest.approx(3e6, rel=0.03)
    assert told["settings"]["output_scale"] == 1.15


def test_generated_times_end_at_n_over_rate_and_burst_in_windows(burst: Burst) -> None:
    workload = burst(num_requests=20_000, request_rate=5)
    times = [a.time_ns for a in workload.arrivals()]
    assert times[-1] == 4000 * 10**9
    told = workload.describe()
    assert told["iat_cv_60s"]["windows"] > 60
    # shapes are log-uniform in 0.1 to 2: the median one is sqrt(0.2), CV 1.5; a tenth are below 0.135, CV 2.7
    assert told["iat_cv_60s"]["p50"] == pytest.approx(0.2**-0.25, rel=0.15)
    assert told["iat_cv_60s"]["p90"] == pytest.approx(0.135**-0.5, rel=0.25)


def test_shape_one_is_poisson(burst: Burst) -> None:
    told = burst(num_requests=50_000, shape=[1, 1]).describe()
    assert told["iat_cv"] == pytest.approx(1, rel=0.03)
    assert told["iat_cv_60s"]["p50"] == pytest.approx(1, rel=0.03)


def test_one_setting_changes_one_quantity(burst: Burst) -> None:
    plain, faster = requests(burst()), requests(burst(request_rate=8))
    assert [a.spec for a in plain] == [a.spec for a in faster]
    assert [a.truth for a in plain] == [a.truth for a in faster]
    scaled = requests(burst(output_scale=2))
    assert [a.spec for a in plain] == [a.spec for a in scaled]
    assert [a.truth for a in plain] != [a.truth for a in scaled]
    fewer = requests(burst(num_requests=100))
    assert [a.truth for a in plain[:100]] == [a.truth for a in fewer]


def test_same_seed_same_bytes(burst: Burst) -> None:
    first, second = burst(seed=4, num_requests=50), burst(seed=4, num_requests=50)
    items = list(first.arrivals())
    assert all(len(list(a.spec.prompt_ids)) == a.spec.prompt_tokens for a in requests(first))
    assert pickle.dumps(items) == pickle.dumps(list(second.arrivals()))
    assert [list(a.spec.prompt_ids) for a in items] == [list(a.spec.prompt_ids) for a in requests(second)]
    assert items != list(burst(seed=5, num_requests=50).arrivals())


def test_requests_are_made_as_they_are_asked_for(burst: Burst) -> None:
    workload = burst(num_requests=100_000, with_prompt_ids=False)
    assert [a.spec.id for a in islice(workload.arrivals(), 3)] == ["r0", "r1", "r2"]
    assert next(iter(workload.arrivals())).spec.prompt_ids is None


@pytest.mark.parametrize(
    "settings",
    [
        {"duration_s": 5},
        {"failures": "drop"},
        {"rescale": "thin"},
        {"shape": [2, 1]},
        {"model": "GPT-5"},
        {"over_length": "drop", "max_prompt_tokens": 5},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BurstGPTConfig.model_validate(settings)


def test_laws_are_refused_on_a_file() -> None:
    with pytest.raises(ValidationError, match="gpt4_share"):
        BurstGPTConfig(path="x.csv", gpt4_share=0.5)


# --- the model's length ------------------------------------------------------------------------------------


def test_prompts_are_cut_without_a_look_at_the_output(burst: Burst) -> None:
    workload = burst(num_requests=5_000, max_model_len=1024)
    told = workload.describe()["over_length"]
    assert told["max_prompt_tokens"] == 768
    assert 0 < told["prompts_cut"] <= told["requests"]
    assert max(p + o for p, o in lengths(workload)) == 1024
    # policies see the prompt: its cut must not tell the output
    for (before, _), (after, _) in zip(lengths(burst(num_requests=5_000)), lengths(workload), strict=True):
        assert after in (before, 768)


def test_too_long_requests_are_dropped_or_refused_on_request(burst: Burst) -> None:
    whole = burst(num_requests=2_000)
    short = burst(num_requests=2_000, max_model_len=1024, over_length="drop")
    fit = [pair for pair in lengths(whole) if sum(pair) <= 1024]
    assert lengths(short) == fit
    assert short.describe()["over_length"]["requests"] == 2_000 - len(fit)
    with pytest.raises(WorkloadError, match="over_length"):
        burst(num_requests=2_000, max_model_len=1024, over_length="refuse")


# --- the file ----------------------------------------------------------------------------------------------


def test_rows_become_requests(burst: Burst, trace: Write) -> None:
    workload = burst(path=trace())
    assert seconds(workload) == [0, 0, 2, 3, 60, 120]
    assert lengths(workload) == [(100, 20), (200, 1), (30, 12), (1, 1), (40, 14), (300, 90)]
    told = workload.describe()
    assert told["failed_rows"] == {"rule": "one_token", "rows": 2}
    assert told["traffic"] == "BurstGPT, burst.csv"
    assert told["log_types"] == {"conversation": 4, "api": 2}
    assert requests(workload)[1].spec.features == {"log_type": "conversation", "service_model": "GPT-4"}
    assert json.dumps(told, allow_nan=False)


def test_failures_are_dropped_only_on_request(burst: Burst, trace: Write) -> None:
    workload = burst(path=trace(), failures="drop")
    assert lengths(workload) == [(100, 20), (30, 12), (40, 14), (300, 90)]
    assert workload.describe()["failed_rows"]["rows"] == 2


def test_sessions_become_programs(burst: Burst, trace: Write) -> None:
    workload = burst(path=trace(V12))
    specs = [a.spec for a in requests(workload)]
    assert [(s.program, s.turn, s.is_last_turn) for s in specs] == [
        ("s1", 0, False),
        ("s2", 0, True),
        (None, 0, True),
        ("s1", 1, True),
    ]
    assert seconds(workload) == [0, 1.25, 2, 85]
    told = workload.describe()
    assert (told["programs"], told["turns"]) == (2, 1.5)
    assert all(a.spec.program is None for a in requests(burst(path=trace(V12), sessions=False)))


def test_filters(burst: Burst, trace: Write) -> None:
    assert lengths(burst(path=trace(), log_type="api")) == [(30, 12), (40, 14)]
    assert lengths(burst(path=trace(), model="GPT-4")) == [(200, 1), (40, 14)]
    with pytest.raises(WorkloadError, match="GPT-4") as raised:
        burst(path=trace(), model="GPT4")
    assert "did you mean 'GPT-4'" in str(raised.value)


def test_numbers_as_pandas_writes_them(burst: Burst, trace: Write) -> None:
    path = trace(f"\ufeff{HEADER}\n5.0,ChatGPT,100.0,20.0,120.0,Conversation log\n\n")
    assert lengths(burst(path=path)) == [(100, 20)]


def test_a_trace_that_has_fewer_requests_than_asked_for_is_told(
    burst: Burst, trace: Write, caplog: pytest.LogCaptureFixture
) -> None:
    has = len(lengths(burst(path=trace())))
    assert len(lengths(burst(path=trace(), num_requests=has))) == has and not caplog.records
    assert len(lengths(burst(path=trace(), num_requests=has + 1))) == has
    (told,) = caplog.records
    assert f"the trace has {has} requests for workload.num_requests={has + 1}" in told.getMessage()


def test_slices(burst: Burst, trace: Write) -> None:
    assert seconds(burst(path=trace(), start_s=2, duration_s=58)) == [0, 1]
    assert seconds(burst(path=trace(), num_requests=3)) == [0, 0, 2]
    assert seconds(burst(path=trace(), start_s=2.5)) == [0.5, 57.5, 117.5]
    with pytest.raises(
        WorkloadError, match=r"no request is left of the trace\n  where: workload.start_s=1000\n"
    ):
        burst(path=trace(), start_s=1000)
    nobody = f"{HEADER}\n9,a,1,1,2,API log\n"
    with pytest.raises(
        WorkloadError, match=r"is left of the trace\n  where: workload.log_type=conversation\n"
    ):
        burst(path=trace(nobody), log_type="conversation")


def test_dividing_times_keeps_the_cv_and_thinning_keeps_the_times(burst: Burst, trace: Write) -> None:
    rows = [f"{t},ChatGPT,{10 + t % 7},5,{15 + t % 7},API log" for t in _bursty(4_000)]
    path = trace("\n".join([HEADER, *rows]))
    plain = burst(path=path)
    faster = burst(path=path, request_rate=40)
    told = faster.describe()
    assert told["realised_rate"] == pytest.approx(40)
    assert (told["rescaled_by"], told["factor"]) == ("times", 40 / plain.describe()["realised_rate"])
    assert told["iat_cv"] == pytest.approx(plain.describe()["iat_cv"], rel=1e-3)
    rate = plain.describe()["realised_rate"] / 4
    thin = burst(path=path, request_rate=rate, rescale="thin")
    kept = [(a.time_ns, a.spec.prompt_tokens) for a in requests(thin)]
    assert len(kept) == pytest.approx(1_000, abs=3 * (4_000 * 0.25 * 0.75) ** 0.5)
    assert set(kept) <= {(a.time_ns, a.spec.prompt_tokens) for a in requests(plain)}
    assert thin.describe()["iat_cv"] < plain.describe()["iat_cv"]
    with pytest.raises(WorkloadError, match="thinning cannot raise"):
        burst(path=path, request_rate=100, rescale="thin")


def _bursty(n: int) -> list[int]:
    """Ten at once, then silence, the silences growing."""
    return [5 + (i // 10) * 30 + (i // 10) ** 2 // 50 for i in range(n)]


def test_scaling_in_order(burst: Burst, trace: Write) -> None:
    times = seconds(burst(path=trace(), request_rate=1))
    assert all(a <= b for a, b in pairwise(times))
    assert times[-1] == 6


# --- bad files ---------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, list[str]]] = {
    "missing column": (ROWS, ["no column 'Timestamp'", "field 'Timestamp'"]),
    "unsorted": (f"{HEADER}\n9,a,1,1,2,API log\n8,a,1,1,2,API log\n", ["earlier", "line 3", "'Timestamp'"]),
    "negative time": (f"{HEADER}\n-9,a,1,1,2,API log\n", ["-9 is negative", "line 2", "'Timestamp'"]),
    "time is a word": (f"{HEADER}\nsoon,a,1,1,2,API log\n", ["'soon' is no number", "line 2"]),
    "time is infinite": (f"{HEADER}\ninf,a,1,1,2,API log\n", ["'inf' is no number", "line 2"]),
    "negative length": (f"{HEADER}\n9,a,-1,1,0,API log\n", ["-1 is negative", "'Request tokens'"]),
    "fraction": (f"{HEADER}\n9,a,1.5,1,2.5,API log\n", ["'1.5' is no whole number", "'Request tokens'"]),
    "empty cell": (f"{HEADER}\n9,a,,1,1,API log\n", ["an empty cell", "'Request tokens'"]),
    "huge": (f"{HEADER}\n9,a,1,1{'0' * 12},1,API log\n", ["no believable", "'Response tokens'"]),
    "astronomic": (f"{HEADER}\n9,a,1,1e999999,1,API log\n", ["no believable", "'Response tokens'"]),
    "wrong total": (f"{HEADER}\n9,a,1,1,2,API log\n9,a,3,4,8,API log\n", ["total is 8", "line 3", "3 + 4"]),
    "zero prompt": (f"{HEADER}\n9,a,0,4,4,API log\n", ["request of 0 tokens", "'Request tokens'"]),
    "log type": (f"{HEADER}\n9,a,1,1,2,API\n", ["unknown log type 'API'", "did you mean 'API log'"]),
    "no model": (f"{HEADER}\n9,,1,1,2,API log\n", ["without a model", "'Model'"]),
    "cut off": (f"{HEADER}\n9,a,1,1,2,API log\n10,a,1\n", ["a row of 3 cells", "line 3", "cut off"]),
    "pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        ["LFS pointer", "fetch"],
    ),
    "web page": ("\n<!doctype html>\n".lstrip(), ["a web page", "begins with '<!doctype html>'", "fetch"]),
    "column twice": (f"{HEADER},Model\n9,a,1,1,2,API log,b\n", ["'Model' is there twice", "line 1"]),
    "empty": ("", ["the trace is empty"]),
    "header only": (f"{HEADER}\n\n", ["the trace has no rows", "burst.csv", "ends after its header"]),
    "semicolons": (HEADER.replace(",", ";"), ["no column 'Timestamp'", "separate cells with commas"]),
    "capitals": (
        f"{HEADER.upper()}\n",
        ["no column 'Timestamp'", "did you mean 'TIMESTAMP'", "to Timestamp;"],
    ),
    "open quote": (
        f'{HEADER}\n9,a,1,1,2,API log\n9,"a,1,1,2,API log\n' + "9,a,1,1,2,API log\n" * 9,
        ["a row is not csv", "line 3", "quotation mark"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_line_and_field(burst: Burst, trace: Write, case: str) -> None:
    text, said = BAD[case]
    with pytest.raises(WorkloadError) as raised:
        burst(path=trace(text))
    message = str(raised.value)
    assert all(part in message for part in said), message
    assert raised.value.do


def test_uniform_random_lengths_are_refused(burst: Burst, trace: Write) -> None:
    lengths = [(7919 * i) % 500 + 10 for i in range(600)]  # evenly spread
    rows = [f"{i},ChatGPT,{n},{20 + i % 3},{n + 20 + i % 3},API log" for i, n in enumerate(lengths)]
    with pytest.raises(WorkloadError, match="looks made up") as raised:
        burst(path=trace("\n".join([HEADER, *rows])), num_requests=5)
    assert "'Request tokens'" in str(raised.value) and "workload=synthetic" in raised.value.do


def test_generated_lengths_do_not_look_made_up(burst: Burst, trace: Write) -> None:
    pairs = lengths(burst(num_requests=600))
    rows = [f"{i},ChatGPT,{p},{o},{p + o},API log" for i, (p, o) in enumerate(pairs)]
    assert lengths(burst(path=trace("\n".join([HEADER, *rows])))) == pairs


def test_a_path_that_leads_nowhere(burst: Burst, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="there is no trace") as raised:
        burst(path=str(tmp_path / "nothing.csv"))
    assert "servelab data fetch burstgpt_1" in str(raised.value)
    assert "check the path" in raised.value.do
    with pytest.raises(WorkloadError, match="/dev/null is no regular file"):
        burst(path="/dev/null")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "not a text file\n  where: .*x.csv, line 1\n .*byte 1 of the line is 0xff"),
        (f"{HEADER}\n{ROWS}".encode() + b"9,\xe9,1,1,2,API log\n", "line 8\n .*byte 3 of the line is 0xe9"),
        (gzip.compress(HEADER.encode()), "the trace is compressed\n(.*\n)* .*gunzip --keep .*x.csv"),
        (b"", "the trace is empty\n  where: .*x.csv\n"),
    ],
    ids=["binary", "another encoding", "compressed", "empty"],
)
def test_what_is_no_text(burst: Burst, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(WorkloadError, match=said):
        burst(path=str(tmp_path / "x.csv"))


# --- the real file -----------------------------------------------------------------------------------------


def test_the_first_rows_of_the_published_file(burst: Burst, data: Path) -> None:
    path = str(data / "burstgpt" / "burstgpt_1_head54.csv")
    whole, served = burst(path=path), burst(path=path, failures="drop")
    assert lengths(served)[:3] == [(472, 18), (1087, 230), (417, 276)]
    assert seconds(whole)[:3] == [0, 40, 113]
    told = whole.describe()
    assert told["requests"] == 54
    assert told["failed_rows"]["rows"] == 54 - served.describe()["requests"] == 3
    assert told["log_types"] == {"conversation": 36, "api": 18}

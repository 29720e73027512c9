"""The Azure traces: what the csv says is what is replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servelab.core.api import Arrival, ConfigError, Context, WorkloadError
from servelab.plugins.workloads.azure import Azure, AzureConfig

FILE = Path(__file__).with_name("files") / "azure.csv"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
Build = Callable[..., Azure]


@pytest.fixture
def azure(context: Callable[..., Context]) -> Build:
    def make(*, seed: int = 0, max_model_len: int = 16_384, **settings: Any) -> Azure:
        return Azure(
            AzureConfig.model_validate({"path": str(FILE), **settings}), context(seed, max_model_len)
        )

    return make


def rows(workload: Azure) -> list[tuple[int, int, int]]:
    return [
        (a.time_ns, a.spec.prompt_tokens, a.truth.output_tokens)
        for a in workload.arrivals()
        if isinstance(a, Arrival) and a.truth
    ]


def test_stamps_are_exact_also_over_midnight_and_equal_ones_keep_their_order(azure: Build) -> None:
    assert rows(azure()) == [
        (0, 300, 40),
        (500_000_100, 20, 7),
        (500_000_100, 10, 9),
        (1_500_000_000, 900, 200),
        (4_750_000_000, 120, 61),
        (4_750_000_100, 2000, 13),
        (61_500_000_000, 77, 88),
    ]


def test_the_week_of_2024_writes_stamps_in_other_ways(azure: Build, tmp_path: Path) -> None:
    path = tmp_path / "week.csv"
    path.write_text(f"{HEADER}2024-05-10 00:00:00.009930+00:00,5,6\n2024-05-10 00:00:01+00:00,7,8\n")
    assert rows(azure(path=str(path))) == [(0, 5, 6), (990_070_000, 7, 8)]


def test_slices_and_rates(azure: Build) -> None:
    assert rows(azure(start_s=1, duration_s=3.75)) == [(500_000_000, 900, 200)]
    assert [row[0] for row in rows(azure(num_requests=4, request_rate=8))][-1] == 500_000_000


def test_a_path_must_be_stated(azure: Build) -> None:
    with pytest.raises(ConfigError) as raised:
        azure(path=None)
    assert "servelab data fetch azure_conv" in str(raised.value)


BAD = {
    "stamp": ("yesterday,1,1\n", ["'yesterday' is no time stamp", "line 2", "'TIMESTAMP'"]),
    "hour": ("2023-11-16 24:00:00,1,1\n", ["no time stamp"]),
    "day": ("2023-02-30 23:00:00,1,1\n", ["no time stamp"]),
    "order": ("2023-11-16 23:00:00.1,1,1\n2023-11-16 23:00:00.0,1,1\n", ["earlier", "line 3"]),
    "no prompt": ("2023-11-16 23:00:00,0,1\n", ["0 prompt tokens", "'ContextTokens'", "line 2"]),
    "no output": ("2023-11-16 23:00:00,1,0\n", ["0 output tokens", "'GeneratedTokens'"]),
    "word": ("2023-11-16 23:00:00,1,many\n", ["'many' is no number", "'GeneratedTokens'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_line_and_field(azure: Build, tmp_path: Path, case: str) -> None:
    text, said = BAD[case]
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + text)
    with pytest.raises(WorkloadError) as raised:
        azure(path=str(path))
    assert all(part in str(raised.value) for part in (*said, "bad.csv"))


def test_columns_of_another_trace_are_refused(azure: Build, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("arrival_time_s,input_tokens,output_tokens\n0,1,1\n")
    with pytest.raises(WorkloadError, match="no column 'TIMESTAMP'") as raised:
        azure(path=str(path))
    assert "arrival_time_s" in raised.value.why and raised.value.do.startswith(
        "rename the column that holds it"
    )


def test_dropping_all_is_told_with_what_helps(azure: Build, tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text(HEADER + "2023-11-16 23:00:00,90000,1\n2023-11-16 23:00:01,80000,1\n")
    with pytest.raises(WorkloadError, match=r"^all 2 requests are longer than the model allows") as raised:
        azure(path=str(path), over_length="drop")
    assert "that of r0, the first: prompt of 90000 tokens" in raised.value.why
    assert raised.value.do.startswith("set workload.over_length to clip, scale lengths")


def test_a_fetched_data_set_is_found_by_its_name(
    azure: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path))
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(WorkloadError, match="none was fetched") as raised:
        azure(path="azure_conv")
    assert "servelab data fetch azure_conv" in str(raised.value)
    (folder / "azure_conv.csv").write_bytes(FILE.read_bytes())
    (folder / "azure_conv.csv.json").write_text("{}")
    assert rows(azure(path="azure_conv")) == rows(azure(path="cache:data/azure_conv.csv")) == rows(azure())
    with pytest.raises(WorkloadError, match="did you mean 'azure_conv'"):
        azure(path="azure_con")


def test_the_published_hour(azure: Build, data: Path) -> None:
    """Figures of the workloads card, measured on the real file."""
    path = data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv"
    told = azure(path=str(path)).describe()
    assert told["requests"] == 19_366
    assert told["duration_s"] == pytest.approx(3502, abs=0.5)
    assert told["realised_rate"] == pytest.approx(5.53, abs=0.005)
    assert told["iat_cv"] == pytest.approx(1.09, abs=0.005)
    assert told["iat_cv_60s"]["p50"] == pytest.approx(1.02, abs=0.005)
    prompts, outputs = told["prompt_tokens"], told["output_tokens"]
    assert [round(prompts[key]) for key in ("mean", "p10", "p50", "p90", "p99")] == [
        1155,
        207,
        1020,
        2734,
        4142,
    ]
    assert [round(outputs[key]) for key in ("mean", "p10", "p50", "p90", "p99", "max")] == [
        211,
        54,
        129,
        424,
        601,
        1000,
    ]
    assert (round(prompts["cv"], 2), round(outputs["cv"], 2)) == (0.96, 0.77)


def test_scaling_keeps_the_cv_of_the_published_hour(azure: Build, data: Path) -> None:
    path = str(data / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv")
    plain, fast = azure(path=path).describe(), azure(path=path, request_rate=20).describe()
    assert fast["realised_rate"] == pytest.approx(20)
    assert fast["iat_cv"] == pytest.approx(plain["iat_cv"], rel=1e-4)
    thin = azure(path=path, request_rate=1, rescale="thin").describe()
    assert thin["requests"] == pytest.approx(19_366 / 5.53, rel=0.05)
    assert thin["duration_s"] == pytest.approx(3502, abs=10)


def test_the_published_hour_of_code(azure: Build, data: Path) -> None:
    path = data / "azure_llm_2023" / "AzureLLMInferenceTrace_code.csv"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the real traces here")
    told = azure(path=str(path)).describe()
    assert told["requests"] == 8_819
    assert told["iat_cv"] == pytest.approx(13.2, abs=0.1)
    assert (round(told["prompt_tokens"]["mean"]), round(told["output_tokens"]["mean"], 1)) == (2048, 27.9)

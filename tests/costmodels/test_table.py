"""Tables of measured steps: nodes, monotone curves, the mixed factor, files and their faults."""

from __future__ import annotations

import json
import logging
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tests.catalog.test_models import facts

from servelab.core.context import Context, seeded
from servelab.core.errors import ConfigError
from servelab.core.facts import HardwareFacts, Limits
from servelab.core.testing.cost import batch_of, transfer_of
from servelab.plugins.costmodels._curve import Curve
from servelab.plugins.costmodels.table import TableConfig, TableCost, read_points

CONFIGS = Path(__file__).parents[2] / "configs" / "cost"
DATA = os.environ.get("SERVELAB_DATA")
PROMPT, TOKEN = {512: 93.0, 1024: 154.0, 2048: 274.0}, {1: 43.0, 64: 71.6}


def context(model: str = "llama2_70b", tp: int = 8, tokens: int = 2048, requests: int = 64) -> Context:
    return Context(
        kind="cost",
        name="table",
        rng=seeded(0, "cost", "table"),
        model=facts(model),
        hardware=HardwareFacts(name="a100_80g", tp=tp),
        limits=Limits(max_batch_tokens=tokens, max_batch_requests=requests, max_model_len=4096),
    )


def table(**settings: Any) -> TableCost:
    return TableCost(TableConfig(**{"prompt_ms": PROMPT, "token_ms": TOKEN} | settings), context())


def ms(cost: TableCost, rows: list[tuple[int, int]], **kwargs: Any) -> float:
    (price,) = cost.price(batch_of(rows, **kwargs), 1)
    return price / 1e6


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_the_published_points_are_reproduced(device: str) -> None:
    anchors = {
        "a100": ({512: 93, 1024: 154, 2048: 274, 4096: 661, 8192: 1550}, {1: 45.0, 32: 53.0, 64: 71.6}),
        "h100": ({512: 54, 1024: 78, 2048: 137, 4096: 390, 8192: 845}, {1: 30.4, 32: 38.6, 64: 50.2}),
    }[device]
    raw = yaml.safe_load((CONFIGS / f"splitwise_llama2_70b_{device}.yaml").read_text())
    assert raw.pop("name") == "table"
    cost = TableCost(TableConfig(**raw), context())
    assert not cost.prompt.pooled
    for tokens, took in anchors[0].items():
        assert ms(cost, [(tokens, 0)]) == pytest.approx(took)
        assert ms(cost, [(tokens // 2, 0), (tokens // 2, 0)]) == pytest.approx(took)
    for requests, took in anchors[1].items():
        assert ms(cost, [(1, 700)] * requests) == pytest.approx(took)


def test_between_points_a_line_before_them_flat_after_them_the_last_slope() -> None:
    cost = table()
    assert ms(cost, [(768, 0)]) == pytest.approx((93 + 154) / 2)
    assert ms(cost, [(7, 0)]) == 93
    assert ms(cost, [(4096, 0)]) == pytest.approx(274 + 2 * 120)
    assert ms(cost, [(1, 9)] * 127) == pytest.approx(71.6 + 28.6)


def test_a_mixed_step_is_a_prompt_step_of_all_tokens_times_the_factor() -> None:
    assert ms(table(), [(1004, 0), *[(1, 50)] * 20]) == pytest.approx(1.1 * 154)
    assert ms(table(mixed_factor=1.5), [(1004, 0), *[(1, 50)] * 20]) == pytest.approx(1.5 * 154)
    assert ms(table(), [(1004, 0), (20, 0)]) == pytest.approx(154)
    assert ms(table(), [(1, 0), (1023, 0)]) == pytest.approx(1.1 * 154)  # a prompt of one token is a decode


def test_a_draft_counts_as_further_requests() -> None:
    assert ms(table(), [(1, 50)] * 60, drafts=(4,)) == pytest.approx(71.6)
    assert ms(table(), [(1000, 0), (20, 0)], drafts=(4,)) == pytest.approx(1.1 * 154)  # beside prompts


def test_a_chunk_never_costs_less_than_the_decodes_it_replaces() -> None:
    cost = table()
    rows = [(1, 90)] * 500
    took = [ms(cost, [(n, 90), *rows]) for n in (1, 2, 3, 100)]
    assert took[0] > 200
    assert all(low <= high for low, high in pairwise(took))


def test_held_steps_are_single_ones() -> None:
    rows = [(1, 5), (1, 800)]
    assert list(table().price(batch_of(rows), 7)) == [table().price(batch_of(rows), 1)[0]] * 7
    assert list(table().price(batch_of([(300, 0)]), 3)) == [93_000_000, 43_000_000, 43_000_000]
    assert list(table().price(batch_of([(1, 0)]), 2)) == [43_000_000, 43_000_000]


def test_points_that_fall_are_pooled_and_told(caplog: pytest.LogCaptureFixture) -> None:
    curve = Curve({128: 58.0, 256: 52.0, 512: 55.0, 1024: 78.0})
    assert curve.pooled
    assert [curve(x) for x in (128, 256, 512, 1024)] == [55.0, 55.0, 55.0, 78.0]
    with caplog.at_level(logging.WARNING):
        table(prompt_ms={128: 58, 256: 52, 2048: 78})
    assert [record.message for record in caplog.records] == [
        "cost table: points by prompt tokens fall here and there; they are pooled to their mean"
    ]


def test_pooling_is_the_nearest_curve_that_never_falls() -> None:
    """By hand: 1 3 2 | 2 -> 1, then the mean of 3 2 2; a last fall below all pools everything."""
    assert Curve({1: 1, 2: 3, 3: 2, 4: 2}).y == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3])
    assert Curve({1: 4, 2: 3, 3: 2}).y == [3, 3, 3]
    assert Curve({1: 4, 2: 5, 3: 1}).y == pytest.approx([10 / 3] * 3)
    assert Curve({1: 1, 2: 2, 3: 3}).y == [1, 2, 3]
    assert not Curve({1: 2, 5: 2}).pooled


def test_one_point_is_flat() -> None:
    assert [Curve({8: 5.0})(x) for x in (1, 8, 900)] == [5.0] * 3


def test_steps_beyond_the_table_are_told_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = TableConfig(prompt_ms=PROMPT, token_ms=TOKEN)
    with caplog.at_level(logging.WARNING):
        TableCost(config, context())
        assert not caplog.records
        TableCost(config, context(tokens=8192, requests=256))
    assert [record.message for record in caplog.records] == [
        "cost table: measured up to 2048 prompt tokens, steps may have 8192: beyond, the last slope goes on",
        "cost table: measured up to 64 decoding requests, steps may have 256: beyond, the last slope goes on",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        TableCost(TableConfig(prompt_ms=PROMPT, token_ms={8: 43.0}), context())
    assert caplog.records[0].message.endswith("beyond, they take as long")


def test_the_run_card_says_where_points_are_from_and_end() -> None:
    config = TableConfig(prompt_ms=PROMPT, token_ms=TOKEN, origin="a note", measured_tp=8)
    inside = TableCost(config, context()).describe()
    assert inside == {"origin": "a note", "measured_tp": 8, "mixed_factor": 1.1}
    beyond = TableCost(config, context(tokens=4096)).describe()["extrapolates"]
    assert beyond == ["measured up to 2048 prompt tokens, steps may have 4096"]


def test_files_of_our_columns_and_json_hold_the_same_points(tmp_path: Path) -> None:
    rows = [f"prompt,{n},{took}" for n, took in PROMPT.items()] + ["prompt,512,95", "prompt,512,80"]
    rows += [f"token,{n},{took}" for n, took in TOKEN.items()]
    csv, text = tmp_path / "steps.csv", tmp_path / "steps.json"
    csv.write_text("\n".join(["phase,tokens,ms", *rows]) + "\n")
    text.write_text(json.dumps({"prompt_ms": PROMPT, "token_ms": TOKEN}))
    assert read_points(str(csv), {}) == read_points(str(text), {}) == {"prompt": PROMPT, "token": TOKEN}
    cost = table(prompt_ms=None, token_ms=None, file=str(csv))
    assert ms(cost, [(1024, 0)]) == 154


SPLITWISE = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"


def test_the_columns_of_splitwise_sim_by_medians_of_chosen_rows(tmp_path: Path) -> None:
    path = tmp_path / "perf.csv"
    path.write_text(
        SPLITWISE
        + "m,a,512,1,128,90,40,8\nm,a,512,1,128,94,44,8\nm,a,256,2,128,92,50,8\n"
        + "m,a,512,2,128,150,52,8\nm,b,512,1,128,1,1,8\n"
    )
    assert read_points(str(path), {"hardware": "a"}) == {
        "prompt": {512: 92, 1024: 150},
        "token": {1: 42, 2: 51},
    }


@pytest.mark.parametrize(
    ("name", "text", "rows", "told"),
    [
        ("a.csv", "phase,ms\n", {}, r"missing columns: tokens(.|\n)*line 1"),
        ("a.csv", "phase,tokens,ms\nprompt,0,3\n", {}, r"above zero(.|\n)*line 2, field tokens"),
        (
            "a.csv",
            "phase,tokens,ms\nprompt,8,3\nboth,8,3\n",
            {},
            r"prompt or token(.|\n)*line 3, field phase",
        ),
        (
            "a.csv",
            "phase,tokens,ms\nprompt,8,93,5\n",
            {},
            r"a row of 4 cells under a header of 3(.|\n)*line 2",
        ),
        ("a.csv", "phase,tokens,ms\ntoken,1,2\nprompt,8\n", {}, r"a row of 2 cells(.|\n)*line 3"),
        ("a.csv", "phase,tokens,ms\nprompt,8,fast\n", {}, r"above zero(.|\n)*line 2, field ms"),
        ("a.csv", "phase,tokens,ms\nprompt,8,3\n", {}, r"no row has a time of phase 'token'"),
        ("a.csv", "phase,tokens,ms\nprompt,8,3\n", {"device": "x"}, r"missing columns: device"),
        ("a.csv", SPLITWISE + "m,a,1,1,1,1,1,8\nm,b,1,1,1,1,1,8\n", {}, r"would be mixed(.|\n)*line 3"),
        ("a.csv", SPLITWISE + "m,a,1,1,1,1,x,8\n", {}, r"above zero(.|\n)*line 2, field token_time"),
        ("a.csv", SPLITWISE + "m,a,1,1,1,1,1,8\n", {"model": "z"}, r"phase 'prompt' where model is z"),
        ("a.csv", "model,prompt_size\n", {}, r"missing columns: batch_size, prompt_time, token_time"),
        ("a.csv", "", {}, r"missing columns: ms, phase, tokens"),
        ("a.csv", "phase,tokens,ms,tokens\nprompt,8,3,9\n", {}, r"'tokens' is there twice(.|\n)*line 1"),
        ("a.json", "{", {}, r"no JSON"),
        ("a.json", '{"prompt_ms": {"8": 1}}', {}, r"token_ms is missing"),
        (
            "a.json",
            '{"prompt_ms": {"8": 0}, "token_ms": {"1": 1}}',
            {},
            r"above zero(.|\n)*prompt_ms, field 8",
        ),
        ("a.json", "[]", {}, r"prompt_ms is missing"),
        ("a.json", '{"prompt_ms": {"8": 1, "8": 2}, "token_ms": {"1": 1}}', {}, r"'8' is given twice"),
    ],
)
def test_bad_files_name_line_and_field(
    tmp_path: Path, name: str, text: str, rows: dict[str, str], told: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        read_points(str(path), rows)
    assert caught.value.do
    assert str(path) in str(caught.value)


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(str(tmp_path / "none.csv"), {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(str(tmp_path), {})


def test_points_or_a_file_but_not_both() -> None:
    with pytest.raises(ValidationError, match="splitwise_llama2_70b_a100"):
        TableConfig(prompt_ms=PROMPT)
    with pytest.raises(ValidationError, match="leave prompt_ms"):
        TableConfig(file="x.csv", token_ms=TOKEN)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TableConfig(prompt_ms=PROMPT, token_ms=TOKEN, mixed_factor=0.9)


def test_another_model_is_refused() -> None:
    config = TableConfig(prompt_ms=PROMPT, token_ms=TOKEN, measured_model="llama2_70b", measured_tp=8)
    with pytest.raises(ConfigError, match=r"model=llama2_70b, and the run is of model=llama2_7b"):
        TableCost(config, context("llama2_7b"))
    with pytest.raises(ConfigError, match=r"hardware\.tp=8, and the run is of hardware\.tp=4"):
        TableCost(config, context(tp=4))


def test_transfers_take_their_bytes() -> None:
    assert table(transfer_ns=5, link_bytes_per_s=1e9).transfer_time(transfer_of(1000)) == 1005


@pytest.mark.skipif(DATA is None, reason="SERVELAB_DATA is not set: no measured table here")
@pytest.mark.parametrize(("device", "preset"), [("a100-80gb", "a100"), ("h100-80gb", "h100")])
def test_the_released_table_loads_and_holds_the_presets_points(device: str, preset: str) -> None:
    path = Path(str(DATA)) / "calibration" / "splitwise" / "perf_model.csv"
    rows = {"model": "llama2-70b", "hardware": device, "tensor_parallel": "8"}
    points = read_points(str(path), rows)
    assert len(points["prompt"]) == 9
    assert sorted(points["token"]) == [1, 2, 4, 8, 16, 32, 64]
    single = read_points(str(path), {**rows, "batch_size": "1"})
    ours = yaml.safe_load((CONFIGS / f"splitwise_llama2_70b_{preset}.yaml").read_text())
    assert {n: single["prompt"][n] for n in ours["prompt_ms"]} == pytest.approx(ours["prompt_ms"], rel=0.005)
    assert {n: points["token"][n] for n in ours["token_ms"]} == pytest.approx(ours["token_ms"], rel=0.005)
    cost = TableCost(TableConfig(file=str(path), rows=rows), context(tokens=32768))
    for curve in (cost.prompt, cost.token):
        took = [curve(n) for n in range(1, 40_000, 37)]
        assert all(low <= high for low, high in pairwise(took))
    with pytest.raises(ConfigError, match="would be mixed"):
        read_points(str(path), {"model": "llama2-70b"})

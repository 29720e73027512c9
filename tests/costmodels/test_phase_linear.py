"""DistServe's regressions: its vectors, its fit, monotone across phases and at the threshold."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from tests.catalog.test_models import facts

from servelab.core.context import Context, seeded
from servelab.core.errors import ConfigError
from servelab.core.facts import HardwareFacts, Limits
from servelab.core.testing.cost import batch_of, transfer_of
from servelab.plugins.costmodels._least_squares import least_squares
from servelab.plugins.costmodels.phase_linear import PhaseLinear, PhaseLinearConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "cost"
PRESETS = sorted(path.stem for path in CONFIGS.glob("distserve_*.yaml"))
DATA = os.environ.get("SERVELAB_DATA")


def context(model: str = "opt_13b", tp: int = 1) -> Context:
    return Context(
        kind="cost",
        name="phase_linear",
        rng=seeded(0, "cost", "phase_linear"),
        model=facts(model),
        hardware=HardwareFacts(name="a100_80g", tp=tp),
        limits=Limits(max_batch_tokens=8192, max_batch_requests=512, max_model_len=2048),
    )


def settings(preset: str) -> dict[str, Any]:
    raw = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text())
    assert raw.pop("name") == "phase_linear"
    return dict(raw)


def of(preset: str) -> PhaseLinear:
    config = PhaseLinearConfig(**settings(preset))
    return PhaseLinear(config, context(str(config.measured_model), config.measured_tp or 1))


def ms(cost: PhaseLinear, rows: list[tuple[int, int]], **kwargs: Any) -> float:
    (price,) = cost.price(batch_of(rows, **kwargs), 1)
    return price / 1e6


def test_the_papers_vectors() -> None:
    """OPT-13B on one A100: prompts of 512 and 2,048 tokens; 64 decodes of 512 tokens of context."""
    cost = of("distserve_opt_13b_tp1")
    assert ms(cost, [(512, 0)]) == pytest.approx(72.1, abs=0.1)
    assert ms(cost, [(2048, 0)]) == pytest.approx(256.7, abs=0.1)
    assert ms(cost, [(1, 511)] * 64) == pytest.approx(42.9, abs=0.05)


def test_prompts_add_up_by_tokens_and_by_squares() -> None:
    cost = of("distserve_opt_13b_tp1")
    a, b, c = 18.103, 0.10191, 7.1223e-06
    assert ms(cost, [(300, 0), (700, 0)]) == pytest.approx(a + b * 1000 + c * (300**2 + 700**2), abs=1e-4)


def test_chunks_of_a_prompt_add_up_to_it_and_pay_each_step() -> None:
    cost = of("distserve_opt_13b_tp1")
    whole = ms(cost, [(2048, 0)])
    chunks = [ms(cost, [(512, start)]) for start in range(0, 2048, 512)]
    assert sum(chunks) == pytest.approx(whole + 3 * 18.103, abs=1e-4)


def test_a_mixed_step_takes_the_prompts_on_top_of_the_decodes() -> None:
    cost = of("distserve_opt_13b_tp1")
    decodes, run = ms(cost, [(1, 400)] * 20), ms(cost, [(512, 0)]) - 18.103
    assert ms(cost, [(512, 0)] + [(1, 400)] * 20) == pytest.approx(decodes + run, abs=1e-4)


def test_a_draft_counts_as_further_requests() -> None:
    cost = of("distserve_opt_13b_tp1")
    plain = ms(cost, [(1, 511)])
    drafted = ms(cost, [(1, 511)], drafts=(4,))
    assert drafted - plain == pytest.approx(4 * 0.038507 + 4 * 6.2694e-4, abs=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_large_batches_are_the_greater_of_both_fits(preset: str) -> None:
    raw, cost = settings(preset), of(preset)
    for rows in (1, 94, 95, 200):
        lines = [raw["decode_ms"], *([raw["decode_large_ms"]] if rows >= 95 else [])]
        expected = max(a + b * rows * 301 + c * rows for a, b, c in lines)
        assert ms(cost, [(1, 300)] * rows) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_monotone_from_a_decode_to_a_chunk_and_in_requests(preset: str) -> None:
    """Where one formula ends and the other begins, no step gets cheaper with more work."""
    cost = of(preset)
    for others in (0, 50, 94, 150):
        beside = [(1, 700)] * others
        took = [ms(cost, [(n, 64), *beside]) for n in (1, 2, 3, 16, 200)]
        assert all(low <= high for low, high in pairwise(took))
    for context_tokens in (1, 64, 1024):
        took = [ms(cost, [(1, context_tokens)] * n) for n in range(85, 110)]
        assert all(low <= high for low, high in pairwise(took))
    took = [ms(cost, [(8, 0)] + [(1, 900)] * n) for n in range(85, 110)]
    assert all(low <= high for low, high in pairwise(took))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_row_makes_a_step_cheaper(preset: str) -> None:
    """Random steps, contexts beyond what was measured: a decode with a long one that becomes a prompt, a
    prompt of one token that becomes a decode, a last decode among prompts."""
    rng, cost = Random(5), of(preset)
    for _ in range(50):
        rows = [
            (rng.choice([1, 1, 2, rng.randint(1, 900)]), rng.choice([0, rng.randint(0, 60_000)]))
            for _ in range(rng.choice([1, 2, 3, 3, 95]))
        ]
        price, i = ms(cost, rows), rng.randrange(len(rows))
        n, p = rows[i]
        for changed in ((n + 1, p), (n + rng.randint(1, 500), p), (n, p + 1), (n, p + rng.randint(1, 5000))):
            assert ms(cost, [*rows[:i], changed, *rows[i + 1 :]]) >= price
        assert ms(cost, [*rows, (1, 0)]) >= price
        assert ms(cost, rows[::-1]) == price
        assert ms(cost, rows, drafts=(1,)) >= price


def test_held_steps_are_single_ones_across_the_threshold() -> None:
    cost = of("distserve_opt_13b_tp1")
    rows = [(1, 10 + 3 * k) for k in range(120)]
    together = list(cost.price(batch_of(rows), 50))
    alone = [cost.price(batch_of([(1, s + k) for _, s in rows]), 1)[0] for k in range(50)]
    assert together == alone
    assert len(set(together)) == 50


def test_least_squares_recovers_planted_coefficients() -> None:
    rng = Random(3)
    planted = [18.1, 0.102, 7.1e-6]
    rows = []
    for _ in range(40):
        lengths = [rng.randint(16, 2048) for _ in range(rng.randint(1, 8))]
        rows.append((1.0, float(sum(lengths)), float(sum(n * n for n in lengths))))
    exact = [sum(c * x for c, x in zip(planted, row, strict=True)) for row in rows]
    assert least_squares(rows, exact) == pytest.approx(planted, rel=1e-9)
    noisy = [y * rng.uniform(0.99, 1.01) for y in exact]
    found = least_squares(rows, noisy)
    assert found is not None
    residual = [
        y - sum(c * x for c, x in zip(found, row, strict=True)) for row, y in zip(rows, noisy, strict=True)
    ]
    for i in range(3):  # the residual is orthogonal to every column: no better coefficients exist
        along = [r * row[i] for r, row in zip(residual, rows, strict=True)]
        assert abs(sum(along)) < 1e-6 * sum(map(abs, along))


def test_least_squares_knows_what_is_not_decided() -> None:
    assert least_squares([], []) is None
    assert least_squares([(1.0, 2.0)], [3.0]) is None
    assert least_squares([(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)], [1.0, 2.0, 3.0]) is None
    nearly = [(1.0, 0.1 * k, 0.3 * k) for k in range(1, 8)]  # one column is three of another but for rounding
    assert least_squares(nearly, [float(k) for k in range(1, 8)]) is None


def _measured(where: Path, *, decode_slope: float = 6e-4) -> Path:
    lines = ["phase,lengths,ms"]
    for lengths in ([64], [512], [2048], [256, 256], [100, 900, 30]):
        took = 18.0 + 0.1 * sum(lengths) + 7e-6 * sum(n * n for n in lengths)
        lines.append(f"prefill,{' '.join(map(str, lengths))},{took!r}")
    for rows, context_tokens in ((1, 100), (1, 2000), (16, 300), (64, 512), (90, 64)):
        took = 20.0 + decode_slope * rows * context_tokens + 0.04 * rows
        lines.append(f"decode,{' '.join([str(context_tokens)] * rows)},{took!r}")
    for rows, context_tokens in ((95, 64), (128, 64), (128, 700), (200, 300)):
        took = 7.0 + 5.8e-4 * rows * context_tokens + 0.16 * rows
        lines.append(f"decode,{' '.join([str(context_tokens)] * rows)},{took!r}")
    path = where / "steps.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_of_measured_steps_is_fitted(tmp_path: Path) -> None:
    cost = PhaseLinear(PhaseLinearConfig(measured=str(_measured(tmp_path))), context())
    assert (cost.prefill.a, cost.prefill.b, cost.prefill.c) == pytest.approx((18.0, 0.1, 7e-6))
    assert (cost.decode.a, cost.decode.b, cost.decode.c) == pytest.approx((20.0, 6e-4, 0.04))
    assert cost.large is not None
    assert (cost.large.a, cost.large.b, cost.large.c) == pytest.approx((7.0, 5.8e-4, 0.16))
    assert ms(cost, [(1, 511)] * 64) == pytest.approx(20 + 6e-4 * 64 * 512 + 0.04 * 64)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("phase,ms\nprefill,3\n", r"missing columns: lengths(.|\n)*line 1"),
        ("phase,lengths,ms\nboth,3,4\n", r"prefill or decode(.|\n)*line 2, field phase"),
        ("phase,lengths,ms\nprefill,3,4\nprefill,,4\n", r"lengths is empty(.|\n)*line 3, field lengths"),
        ("phase,lengths,ms\nprefill,3 x,4\n", r"whole number above zero(.|\n)*line 2, field lengths"),
        ("phase,lengths,ms\nprefill,3,4,5\n", r"a row of 4 cells under a header of 3(.|\n)*line 2"),
        ("phase,lengths,ms\nprefill,3,-4\n", r"number above zero(.|\n)*line 2, field ms"),
        ("phase,lengths,ms\nprefill,3,nan\n", r"number above zero(.|\n)*line 2, field ms"),
        ("phase,lengths,ms\nprefill,3,4\nprefill,5,6\n", r"2 measured prefill steps do not decide"),
        ("", r"missing columns"),
        ("phase,ms,lengths,ms\nprefill,3,4,5\n", r"'ms' is there twice(.|\n)*line 1"),
    ],
)
def test_bad_files_name_line_and_field(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        PhaseLinear(PhaseLinearConfig(measured=str(path)), context())
    assert caught.value.do
    assert str(path) in str(caught.value)


def test_a_fit_that_falls_with_work_is_refused(tmp_path: Path) -> None:
    path = _measured(tmp_path, decode_slope=-5e-5)
    with pytest.raises(ConfigError, match="negative coefficient"):
        PhaseLinear(PhaseLinearConfig(measured=str(path)), context())


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        PhaseLinear(PhaseLinearConfig(measured=str(tmp_path / "none.csv")), context())


def test_coefficients_or_a_file_but_not_both() -> None:
    with pytest.raises(ValidationError, match="distserve_opt_13b_tp1"):
        PhaseLinearConfig()
    with pytest.raises(ValidationError, match="leave prefill_ms"):
        PhaseLinearConfig(measured="x.csv", prefill_ms=(1, 1, 1))
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        PhaseLinearConfig(prefill_ms=(1, 1, -1), decode_ms=(1, 1, 1))


def test_another_model_or_number_of_devices_is_refused_unless_waived() -> None:
    config = PhaseLinearConfig(**settings("distserve_opt_13b_tp1"))
    with pytest.raises(ConfigError, match=r"figures of model=opt_13b, and the run is of model=llama2_7b"):
        PhaseLinear(config, context("llama2_7b"))
    with pytest.raises(ConfigError, match=r"figures of hardware\.tp=1, and the run is of hardware\.tp=2"):
        PhaseLinear(config, context(tp=2))
    waived = config.model_copy(update={"measured_model": None, "measured_tp": None})
    PhaseLinear(waived, context("llama2_7b", tp=2))


def test_the_run_card_says_which_coefficients(tmp_path: Path) -> None:
    told = of("distserve_opt_13b_tp1").describe()
    assert told["prefill_ms"] == [18.103, 0.10191, 7.1223e-06]
    assert told["measured_model"] == "opt_13b"
    assert told["origin"].startswith("LLMServe/DistServe")
    path = str(_measured(tmp_path))
    fitted = PhaseLinear(PhaseLinearConfig(measured=path), context()).describe()
    assert fitted["fitted_to"] == path
    assert fitted["decode_ms"] == pytest.approx([20.0, 6e-4, 0.04])


def test_transfers_take_their_bytes() -> None:
    cost = of("distserve_opt_13b_tp1")
    assert cost.transfer_time(transfer_of(25_000_000)) == 20_000 + 1_000_000


@pytest.mark.skipif(DATA is None, reason="SERVELAB_DATA is not set: no published coefficients here")
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_coefficients(preset: str) -> None:
    raw = settings(preset)
    engine = "vllm" if "vllm" in preset else "distserve"
    path = Path(str(DATA)) / "calibration" / "distserve" / f"profiler-a100-80g.{engine}.json"
    theirs = json.loads(path.read_text())[f"facebook/{raw['measured_model'].replace('_', '-')}"]
    fit = theirs[str(raw["measured_tp"])]
    assert raw["prefill_ms"] == pytest.approx(fit["prefill"], rel=1e-4)
    assert raw["decode_ms"] == pytest.approx(fit["decoding_smallbs"], rel=1e-4)
    assert raw["decode_large_ms"] == pytest.approx(fit["decoding_largebs"], rel=1e-4)
    assert raw["large_batch"] == fit["decoding_large_small_bs_threshold"]

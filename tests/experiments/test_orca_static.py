"""Static batching against Orca: the closed form, and the study from end to end."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest
from tests.experiments.conftest import RAW, Do

from servelab.plugins.tasks.orca_static import LAWS

QUICK = {"name": "orca_static", "preset": "quick", "batches": 24, "processes": 2}


def test_expected_max_by_hand() -> None:
    """Uniform on 1 .. n: E[max of B] = sum over k of 1 - ((k - 1) / n) ** B."""
    wide = next(law for law in LAWS if law.name == "uniform 1 to 127")
    for places in (1, 2, 8, 32):
        exact = sum(1 - ((k - 1) / 127) ** places for k in range(1, 128))
        assert wide.expected_max(places) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_expected_max_against_draws(law: object) -> None:
    rng = Random(7)
    quantile = law.quantile  # type: ignore[attr-defined]
    drawn = fmean(max(quantile(rng.random()) for _ in range(8)) for _ in range(20_000))
    assert law.expected_max(8) == pytest.approx(drawn, rel=0.02)  # type: ignore[attr-defined]
    assert law.expected_max(1) == pytest.approx(64, rel=0.02)  # type: ignore[attr-defined]


def test_the_worked_example_and_the_order_of_the_laws(do: Do) -> None:
    roomy = {"name": "scripted", "num_kv_pages": 512}
    told = do(QUICK, model={**RAW["model"], "max_position": 4096}, executor=roomy)
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["iterations of static_batch: B = 2, outputs 2, 10, 2, 10"]["ours"] == 20
    assert rows["iterations of orca: B = 2, outputs 2, 10, 2, 10"]["ours"] == 14
    ratios = [row["ours"] for name, row in rows.items() if name.startswith("iterations, static over orca")]
    assert ratios[0] == 1.0 and ratios == sorted(ratios) and ratios[-1] > 2
    assert all(row["holds"] for row in rows.values() if "log-normal" not in row["name"])

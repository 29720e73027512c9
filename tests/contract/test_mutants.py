"""Every mutant fails the check that is meant for it, and says what to mend; what it was made from passes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from servelab.core.testing import SUITES, ConformanceError, failures
from servelab.core.testing.mutants import Mutant, mutants

MUTANTS = mutants()
ORIGINALS = {(one.suite, repr(one.original), repr(one.config)): one for one in MUTANTS}
"""One mutant for each thing they are made from."""


def _original(mutant: Mutant) -> str:
    original = mutant.original
    return original if isinstance(original, str) else getattr(original, "__name__", type(original).__name__)


def _skip_without(mutant: Mutant) -> None:
    for module in mutant.requires:
        pytest.importorskip(module)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.suite}-{m.name}")
def test_the_check_notices(mutant: Mutant) -> None:
    _skip_without(mutant)
    suite = mutant.suite_of(mutant.plugin)
    assert mutant.check in suite.checks()
    failed = failures(suite, [mutant.check])
    assert failed, f"{mutant.name} passes {mutant.check}"
    error = failed[mutant.check]
    assert isinstance(error, ConformanceError)
    assert mutant.message in str(error), f"says instead:\n{error}"
    assert error.rule and error.where and error.do


@pytest.mark.parametrize("mutant", ORIGINALS.values(), ids=lambda m: f"{m.suite}-{_original(m)}")
def test_the_original_passes(mutant: Mutant) -> None:
    _skip_without(mutant)
    failed = failures(mutant.suite_of(mutant.original))
    assert not failed, "\n\n".join(f"{check}: {error}" for check, error in failed.items())


@pytest.mark.parametrize("kind", SUITES)
def test_every_suite_is_proved(kind: str) -> None:
    assert sum(one.suite == kind for one in MUTANTS) >= 3


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutant_table", Path(__file__).with_name("mutant_table.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checks_are_listed() -> None:
    table = _tables()
    page = table.SUITES_PAGE.read_text(encoding="utf-8")
    assert table.with_checks(page) == page, "run: python tests/contract/mutant_table.py --write"


def test_the_page_is_up_to_date() -> None:
    table = _tables()
    assert table.render() == table.PAGE.read_text(encoding="utf-8"), (
        "run: python tests/contract/mutant_table.py --write"
    )

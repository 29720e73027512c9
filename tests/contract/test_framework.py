"""What every suite shares: naming a plugin, exemptions, results without pytest."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from servelab.core.api import Context, PluginSpec, StepPlan, StepView
from servelab.core.testing import SUITES, ConformanceError, PluginSuite, failures, results, suite_of


class Few(PluginSuite):
    """Checks that say what they are told to."""

    kind = "scheduler"
    contract = "here"
    plugin = "vllm_v1"
    config: ClassVar = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    outcome: ClassVar[str] = "pass"

    def test_outcome(self) -> None:
        if self.outcome == "fail":
            self.fail("it does not", rule="it must", do="mend it")
        if self.outcome == "raise":
            raise ValueError("surprise")
        if self.outcome == "skip":
            self.needs("scheduler.layers")


class Plain:
    """A scheduler as a class."""

    def __init__(self, config: Any, context: Context) -> None:
        self.config, self.context = config, context

    def plan(self, view: StepView) -> StepPlan:
        return StepPlan()


class PlainConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    window: int = 3


def _with(plugin: Any, **attributes: Any) -> type[PluginSuite]:
    return suite_of(Few, plugin, **{"config": {}, **attributes})


def test_checks_are_listed_base_first() -> None:
    assert Few.checks() == ["test_builds", "test_outcome"]


def test_a_failure_has_four_parts() -> None:
    class One(Few):
        outcome = "fail"

    error = failures(One)["test_outcome"]
    assert isinstance(error, ConformanceError)
    assert str(error).splitlines() == ["it does not", "  rule:  it must", "  where: here", "  do:    mend it"]


def test_what_a_check_raises_is_reported_with_its_cause() -> None:
    class One(Few):
        outcome = "raise"

    error = failures(One)["test_outcome"]
    assert "One.test_outcome raised ValueError: surprise" in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_a_check_that_does_not_apply_says_why() -> None:
    class One(Few):
        outcome = "skip"

    reason = "scheduler 'vllm_v1' does not declare 'scheduler.layers'"
    assert [r.skipped for r in results(One)] == ["", reason]


def test_exemptions_are_strict() -> None:
    class Fails(Few):
        outcome = "fail"
        exempt: ClassVar = {"test_outcome": "known, see the paper"}

    class Passes(Few):
        exempt: ClassVar = {"test_outcome": "known, see the paper"}

    assert not failures(Fails)
    assert [r.exempted for r in results(Fails, ["test_outcome"])] == ["known, see the paper"]
    assert "passes test_outcome, from which it is exempt" in str(failures(Passes)["test_outcome"])
    (mark,) = Passes.test_outcome.pytestmark  # type: ignore[attr-defined]
    assert (mark.name, mark.kwargs["strict"], mark.kwargs["raises"]) == ("xfail", True, ConformanceError)
    assert not hasattr(Few.test_outcome, "pytestmark"), "the base must not inherit the exemption"


def test_an_exemption_names_a_check_and_a_reason() -> None:
    with pytest.raises(TypeError, match=r"did you mean 'test_outcome'\? known: test_builds, test_outcome"):
        _with("vllm_v1", exempt={"test_outcom": "x"})
    with pytest.raises(TypeError, match="gives no reason"):
        _with("vllm_v1", exempt={"test_outcome": " "})


@pytest.mark.parametrize("form", ["class", "factory", "object", "spec"])
def test_a_plugin_is_named_in_any_form(form: str) -> None:
    spec = PluginSpec(name="plain", factory=f"{__name__}:Plain", summary="x")
    plugin = {
        "class": Plain,
        "factory": lambda config, context: Plain(config, context),
        "object": Plain(None, None),  # type: ignore[arg-type]
        "spec": spec,
    }[form]
    sys.modules.setdefault(__name__, sys.modules[Plain.__module__])
    assert not failures(_with(plugin))


def test_settings_are_checked_by_the_config_model() -> None:
    class Set(Plain):
        spec = PluginSpec(name="set", factory=f"{__name__}:Plain", config=f"{__name__}:PlainConfig")

    assert _with(Set, config={"window": 5})().make().config == PlainConfig(window=5)
    (error,) = set(map(str, failures(_with(Set, config={"windw": 5}), ["test_builds"]).values()))
    assert "windw" in error


def test_a_plugin_of_the_wrong_shape_is_told() -> None:
    class Empty:
        def __init__(self, config: Any, context: Any) -> None:
            pass

    error = str(failures(_with(Empty), ["test_builds"])["test_builds"])
    assert "scheduler 'empty' has no plan" in error and "core.families.scheduler:Scheduler" in error


def test_a_factory_that_raises_is_told() -> None:
    def broken(config: Any, context: Any) -> Any:
        raise KeyError("x")

    assert "its factory raised KeyError" in str(failures(_with(broken), ["test_builds"])["test_builds"])


def test_an_unknown_name_is_told() -> None:
    error = str(failures(_with("vllm_v2"), ["test_builds"])["test_builds"])
    assert "unknown scheduler 'vllm_v2'" in error and "vllm_v1" in error


def test_suites_need_no_tensor_library() -> None:
    code = (
        "import sys, servelab.core.testing as t; t.SUITES; t.failures; "
        "bad = {'torch', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_every_suite_says_its_kind_and_contract() -> None:
    for kind, suite in SUITES.items():
        assert suite.kind == kind and suite.contract

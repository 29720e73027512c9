"""Plugins chosen within the settings of others: checked, built, described and counted like any other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from servelab.core.capabilities import select
from servelab.core.compose import Run, compose
from servelab.core.config import Choice, PartOf, choice_of, validate
from servelab.core.context import Context
from servelab.core.errors import CapabilityError, ConfigError, PluginError, WorkloadError
from servelab.core.records import RequestFinished
from servelab.core.registry import Registry
from servelab.core.request import Arrival, Cancel
from servelab.core.spec import PluginSpec
from servelab.plugins.commands.show import type_text

FEW: dict[str, Any] = {"name": "synthetic", "num_requests": 3, "prompt_length": 20, "output_length": 4}


class PairConfig(BaseModel):
    """Two workloads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Annotated[Choice, PartOf("workload")] = Field(
        default="synthetic", validate_default=True, description="One workload."
    )
    others: dict[str, Annotated[Choice, PartOf("workload")]] = Field(default={}, description="More of them.")


class Pair:
    """Whatever its parts send."""

    def __init__(self, config: PairConfig, ctx: Context) -> None:
        self.parts = [ctx.part("workload", config.first)]
        self.parts += [ctx.part("workload", one, key) for key, one in config.others.items()]

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        return self.parts[0].arrivals()

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


def add(
    registry: Registry, kind: str, name: str, factory: Any = Pair, config: Any = None, **fields: Any
) -> None:
    sets = {key: frozenset(fields.pop(key, ())) for key in ("provides", "requires", "conflicts")}
    spec = PluginSpec(name=name, factory="here:Pair", **sets, **fields)
    registry.add(kind, spec, factory=factory, config=config)


@pytest.fixture
def raw(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "model": {**raw["model"], "max_position": 4096}}


@pytest.fixture
def pair(registry: Registry) -> Registry:
    add(registry, "workload", "pair", config=PairConfig, provides={"workload.truth", "workload.prompt_ids"})
    return registry


def composed(raw: dict[str, Any], registry: Registry, **workload: Any) -> Run:
    return compose(validate({**raw, "workload": {"name": "pair", **workload}}, registry), registry)


def lengths(workload: Any) -> list[tuple[int, int]]:
    return [(x.time_ns, x.spec.prompt_tokens) for x in workload.arrivals()]


def test_a_part_is_chosen_by_name_or_with_settings(raw: dict[str, Any], pair: Registry) -> None:
    run = composed(raw, pair, first="synthetic", others={"b": FEW})
    assert isinstance(run.workload, Pair)
    assert [len(lengths(part)) for part in run.workload.parts] == [64, 3]
    assert [(part.kind, part.name) for part in run.config.workload.parts()] == [("workload", "synthetic")] * 2


def test_settings_of_parts_are_stated_as_they_are_read(raw: dict[str, Any], pair: Registry) -> None:
    """``resolved_config.yaml`` gives the run again, and the run card names every part."""
    run = composed(raw, pair, first=FEW, others={"b": {**FEW, "request_rate": "inf"}})
    stated = run.config.settings()["workload"]
    assert stated["first"]["name"] == "synthetic" and stated["first"]["num_requests"] == 3
    assert stated["others"]["b"]["request_rate"] == "inf"
    json.dumps(stated, allow_nan=False)
    again = composed(raw, pair, **{k: v for k, v in stated.items() if k != "name"})
    assert again.config == run.config
    about = run.info["plugins"]["workload"]
    assert about["name"] == "pair"
    assert [(one["kind"], one["name"], one["settings"]["num_requests"]) for one in about["parts"]] == [
        ("workload", "synthetic", 3)
    ] * 2
    changed = about["non_default"]["first"]
    assert changed["num_requests"] == 3 and "burstiness" not in changed


def test_chance_of_parts(raw: dict[str, Any], pair: Registry) -> None:
    """A part without a key draws what it would draw as the run's own plugin; keys tell equal parts apart."""
    varied = {"name": "synthetic", "num_requests": 20}
    run = composed(raw, pair, first=varied, others={"b": varied, "c": varied})
    assert isinstance(run.workload, Pair)
    alone = compose(validate({**raw, "workload": varied}, pair), pair)
    first, b, c = map(lengths, run.workload.parts)
    assert first == lengths(alone.workload)
    assert first != b != c != first
    swapped = composed(raw, pair, first=varied, others={"c": varied, "b": varied})
    assert isinstance(swapped.workload, Pair)
    assert lengths(swapped.workload.parts[2]) == b


def test_parts_of_parts_have_chance_of_their_own(raw: dict[str, Any], pair: Registry) -> None:
    varied = {"name": "synthetic", "num_requests": 20}
    nested = {"name": "pair", "first": varied, "others": {"a": varied}}
    run = composed(raw, pair, first=varied, others={"a": nested, "b": nested})
    assert isinstance(run.workload, Pair)
    first, a, b = run.workload.parts
    every = [lengths(one) for one in (first, *a.parts, *b.parts)]
    assert len({str(one) for one in every}) == 5


def test_every_problem_of_a_part_is_told_by_its_path(raw: dict[str, Any], pair: Registry) -> None:
    wrong = {
        "name": "pair",
        "first": {"name": "synthetic", "num_request": 3, "samples": 0},
        "others": {"a": "synthetik", "b": {"num_requests": 2}, "c": 7, "d": {"name": None}},
    }
    with pytest.raises(ConfigError) as error:
        validate({**raw, "workload": wrong, "seed": -1}, pair)
    text = str(error.value)
    assert "workload.first.num_request: unknown field (got 3); " in text and "num_requests" in text
    assert "workload.first.samples: Input should be greater than or equal to 1 (got 0)" in text
    assert "workload.others.a.name: " in text and "did you mean 'synthetic'" in text
    assert "workload.others.b.name: missing" in text
    assert "workload.others.c: must be a mapping with a name (got 7)" in text
    assert "workload.others.d.name: must name a workload" in text
    assert "seed" in text and "*" not in text


def test_a_model_validated_on_its_own_asks_the_installed_plugins() -> None:
    config = PairConfig.model_validate({})
    assert (config.first.name, config.first.config.num_requests) == ("synthetic", 64)
    with pytest.raises(ValidationError, match="not a usable part"):
        PairConfig.model_validate({"first": "nothing"})


def test_show_tells_what_a_part_may_be() -> None:
    wanted = "a workload: its name, or a mapping with its name and settings"
    assert type_text(PairConfig.model_fields["first"]) == wanted
    assert type_text(PairConfig.model_fields["others"]) == f"mapping of str to {wanted}"
    assert PairConfig.model_json_schema()["properties"]["first"]["title"] == wanted


def test_a_plugin_provides_what_it_passes_on_and_all_its_parts_have(
    raw: dict[str, Any], pair: Registry
) -> None:
    add(pair, "workload", "untold", factory=None)
    chosen = {"name": "pair", "others": {"a": "untold"}}
    with pytest.raises(CapabilityError) as error:
        compose(validate({**raw, "workload": chosen}, pair), pair)
    assert "executor 'scripted' requires 'workload.truth', which workload 'untold' does not provide" in str(
        error.value
    )
    (one,) = select([("workload", choice_of("workload", chosen, pair, "here"))], pair)
    assert one.provides == frozenset() and one.may == {"workload.truth", "workload.prompt_ids"}
    (one,) = select([("workload", choice_of("workload", "pair", pair, "here"))], pair)
    assert one.provides == {"workload.truth", "workload.prompt_ids"}


def test_what_parts_need_and_refuse_counts(raw: dict[str, Any], pair: Registry) -> None:
    add(pair, "workload", "texts", factory=None, requires={"executor.tokenizer"}, provides={"workload.truth"})
    add(pair, "workload", "real", factory=None, runs=("torch",), provides={"workload.truth"})
    add(pair, "workload", "picky", factory=None, conflicts={"kvcache.fork"}, provides={"workload.truth"})
    others = {name: name for name in ("texts", "real", "picky")}
    with pytest.raises(CapabilityError) as error:
        compose(validate({**raw, "workload": {"name": "pair", "others": others}}, pair), pair)
    text = str(error.value)
    assert "workload 'texts' requires 'executor.tokenizer', which executor 'scripted' does not" in text
    assert "workload 'real' runs on torch only" in text
    assert "workload 'picky' conflicts with 'kvcache.fork', which kvcache 'paged' provides" in text


def test_others_must_live_with_what_any_part_does(raw: dict[str, Any], pair: Registry) -> None:
    add(pair, "workload", "loop", factory=None, provides={"workload.truth", "workload.closed_loop"})
    add(pair, "scheduler", "open_only", factory=None, conflicts={"workload.closed_loop"})
    with pytest.raises(CapabilityError, match=r"'open_only' conflicts with 'workload.closed_loop', which"):
        compose(
            validate(
                {**raw, "scheduler": "open_only", "workload": {"name": "pair", "others": {"a": "loop"}}}, pair
            ),
            pair,
        )


def test_an_oracle_within_is_stamped(raw: dict[str, Any], pair: Registry) -> None:
    seen: list[Any] = []

    def knowing(config: None, ctx: Context) -> Pair:
        seen.append(ctx.oracle)
        return Pair(PairConfig(), ctx)

    add(pair, "workload", "knowing", factory=knowing, oracle=True, provides={"workload.truth"})
    run = composed(raw, pair, others={"a": "knowing"})
    assert "oracle: knowing" in run.info["stamps"]
    assert seen[0] is not None


def test_what_a_part_refuses_is_told(raw: dict[str, Any], pair: Registry) -> None:
    with pytest.raises(WorkloadError, match="longer than the model allows"):
        composed(raw, pair, first={**FEW, "prompt_length": 6000})


def test_only_settings_that_were_checked_are_built(raw: dict[str, Any], registry: Registry) -> None:
    def sly(config: None, ctx: Context) -> Any:
        return ctx.part("workload", Choice(name="synthetic"))

    add(registry, "workload", "sly", factory=sly, provides={"workload.truth"})
    with pytest.raises(PluginError, match="is no setting of that kind"):
        compose(validate({**raw, "workload": "sly"}, registry), registry)

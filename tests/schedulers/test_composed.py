"""All four as the command line builds them; with a real model, tokens do not depend on who schedules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from tests.schedulers.runs import POLICIES

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.errors import CapabilityError
from servelab.core.hookspecs import hookimpl
from servelab.core.records import Planned, Record, RequestPreempted, TokensEmitted
from servelab.core.registry import Registry
from servelab.core.request import Arrival, RequestSpec, Truth
from servelab.core.spec import Paper, PluginSpec

LENGTHS = ((5, 12), (17, 3), (30, 20), (1, 25), (12, 1), (44, 9), (23, 16), (9, 30))


class Keep:
    """Every record; hooks of tokens so that they are sent."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.tokens: dict[str, list[int]] = {}

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)

    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        self.tokens.setdefault(record.request, []).extend(record.tokens)

    def of(self, kind: type[Any]) -> list[Any]:
        return [r for r in self.records if isinstance(r, kind)]


class Prompts:
    """The same few requests every time, one after the other."""

    def arrivals(self) -> Iterator[Arrival]:
        rng = Random(1)
        for i, (prompt, output) in enumerate(LENGTHS):
            ids = tuple(rng.randrange(96) for _ in range(prompt))
            spec = RequestSpec(id=f"r{i}", prompt_tokens=prompt, max_new_tokens=40, prompt_ids=ids)
            yield Arrival(i * 1000, spec, Truth(output))

    def react(self, finished: object) -> tuple[()]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


def composed(**sections: Any) -> tuple[Run, Keep]:
    registry, keep = Registry.load(), Keep()
    workload = PluginSpec(
        name="prompts", factory="t:w", provides=frozenset({"workload.prompt_ids", "workload.truth"})
    )
    registry.add("workload", workload, factory=lambda c, ctx: Prompts())
    registry.add("observer", PluginSpec(name="keep", factory="t:k"), factory=lambda c, ctx: keep)
    raw: dict[str, Any] = {
        "seed": 5,
        "kvcache": {"name": "paged", "page_tokens": 4},
        "cost": "scripted",
        "executor": {"name": "scripted", "num_kv_pages": 26},
        "workload": "prompts",
        "task": "bench",
        "observers": ["keep"],
        "clock": {"name": "virtual"},
        "engine": {"max_model_len": 96, "checks": "full"},
        "model": {
            "name": "toy",
            "layers": 2,
            "hidden": 64,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 32,
            "ffn": 128,
            "vocab": 100,
            "max_position": 2048,
        },
        **sections,
    }
    return compose(validate(raw, registry), registry), keep


def run(**sections: Any) -> Keep:
    made, keep = composed(**sections)
    made.task.run(made)
    assert made.engine.ended["completed"] == made.engine.arrived
    return keep


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_composed_on_the_scripted_executor(name: str, mixed: bool) -> None:
    """Full checks: no view is kept, pages are recounted."""
    first, again = (run(scheduler={"name": name, "mixed": mixed, "hold_steps": 8}) for _ in "ab")
    assert first.records[1:-1] == again.records[1:-1]
    assert sum(map(len, first.tokens.values())) == sum(output for _, output in LENGTHS)
    if name in ("conservative", "pf_oracle"):
        assert not first.of(RequestPreempted)


@pytest.mark.parametrize("name", POLICIES)
def test_the_card_of_a_run_says_what_scheduled(name: str) -> None:
    info = composed(scheduler=name)[0].info
    assert info["stamps"] == (["oracle: pf_oracle"] if name == "pf_oracle" else [])
    assert "Past-Future" in json.dumps(info["plugins"]["scheduler"]["paper"])
    spec = Registry.load().spec("scheduler", name)
    assert isinstance(spec.paper, Paper) and spec.deviations


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("engine", [{"lanes": 2}, {"max_in_flight": 2}])
def test_several_launches_at_once_are_refused(name: str, engine: dict[str, int]) -> None:
    """The batch would not be all that the view shows."""
    with pytest.raises(CapabilityError, match=name):
        composed(scheduler=name, engine={"max_model_len": 96, **engine})


@pytest.mark.parametrize("name", POLICIES)
def test_settings_of_the_yaml_file_are_accepted(repository: Path, name: str) -> None:
    settings = yaml.safe_load((repository / "configs/scheduler" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert run(scheduler=settings).of(Planned)


# ----------------------------------------------------------------- with a real model


def test_greedy_tokens_do_not_depend_on_who_schedules(real: Callable[..., Keep]) -> None:
    expected = real("vllm_v1")
    assert [len(expected.tokens[f"r{i}"]) for i in range(len(LENGTHS))] == [n for _, n in LENGTHS]
    evicted = {}
    for name in POLICIES:
        mixed = name == "aggressive"
        keep = real({"name": name, "mixed": mixed, "max_num_batched_tokens": 40, "max_num_seqs": 8})
        assert keep.tokens == expected.tokens, name
        evicted[name] = len(keep.of(RequestPreempted))
    assert evicted["aggressive"] > 0, "recomputed requests are among them"

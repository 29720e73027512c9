"""The scripted cost model and executor against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.context import Context, seeded
from servelab.core.events import Batch
from servelab.core.logs import read_log
from servelab.core.records import RequestFinished, StepDone
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import TOY_MODEL, ListWorkload, arrival, toy_limits
from servelab.plugins.costmodels.scripted import ScriptedCost, ScriptedCostConfig

MS = 1_000_000


def batch(tokens: list[int], starts: list[int], first_step: int = 0) -> Batch:
    return Batch(0, 0, first_step, 9, [], [], tokens, starts, [True] * len(tokens), {})


def cost(**settings: object) -> ScriptedCost:
    config = ScriptedCostConfig.model_validate(settings)
    rng = seeded(0, "cost", "scripted")
    return ScriptedCost(
        config,
        Context(kind="cost", name="scripted", rng=rng, model=TOY_MODEL, hardware=None, limits=toy_limits()),
    )


def test_a_price_by_hand() -> None:
    """A prompt of 10 tokens and a decode at position 20: 11 tokens, which see 20 + 11 tokens of KV."""
    line = cost(step_ns=1000, token_ns=100, context_ns=10)
    assert line.price(batch([10, 1], [0, 20]), 1) == [1000 + 11 * 100 + 31 * 10]
    # held: from the second step on each runs one token, and sees one more
    decodes = batch([1, 1], [10, 20])
    assert line.price(decodes, 3) == [1000 + 200 + 320, 1000 + 200 + 340, 1000 + 200 + 360]
    steps = [line.price(batch([1, 1], [10 + k, 20 + k]), 1)[0] for k in range(3)]
    assert line.price(decodes, 3) == steps


def test_stated_prices_go_by_the_number_of_the_step() -> None:
    stated = cost(script_ns=[5, 7])
    assert stated.price(batch([1], [4], first_step=0), 3) == [5, 7, 7]
    assert stated.price(batch([1], [4], first_step=6), 1) == [7]


def test_outputs_are_as_long_as_the_truth_or_the_cap(tmp_path: Path) -> None:
    """Truths of 3 and 9 tokens, the second with a cap of 5; alone or held, the steps cost the same."""
    registry = Registry.load()
    arrivals = [arrival("a", 4, 3), arrival("b", 4, 9, cap=5)]
    registry.add(
        "workload",
        PluginSpec(name="two", factory="shown:Two", provides=frozenset({"workload.truth"})),
        factory=lambda config, context: ListWorkload(arrivals),
    )
    ends = {}
    for foresight in (True, False):
        folder = tmp_path / str(foresight)
        raw = {
            "scheduler": "vllm_v1",
            "kvcache": "paged",
            "cost": {"name": "scripted", "step_ns": 7 * MS, "token_ns": 0, "context_ns": 0},
            "executor": {"name": "scripted", "placeholder": 9, "foresight": foresight},
            "workload": "two",
            "task": "bench",
            "observers": ["jsonl"],
            "engine": {"max_model_len": 256},
            "model": dict.fromkeys(("layers", "heads", "kv_heads"), 2)
            | dict.fromkeys(("hidden", "head_dim"), 16)
            | {"name": "toy", "ffn": 8, "vocab": 100, "max_position": 256},
        }
        run = compose(validate(raw, registry), registry, run_dir=folder)
        run.task.run(run)
        records = list(read_log(folder / "events.jsonl"))
        finished = {r.request: r for r in records if isinstance(r, RequestFinished)}
        assert (finished["a"].output_tokens, finished["a"].reason) == (3, "stop")
        assert (finished["b"].output_tokens, finished["b"].reason) == (5, "length")
        ends[foresight] = [end for r in records if isinstance(r, StepDone) for end in r.ends_ns]
    assert ends[True] == ends[False] == [7 * MS * k for k in range(1, 6)]

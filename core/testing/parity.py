"""Whether a scheduler decides the same on the real executor and on the scripted one.

Both get the same requests, prices, KV pages and enforced output lengths, on the virtual clock. What is equal:

- **record by record**, with every decision, time and count: the real executor and the scripted one without
  foresight, because both end each launch after one step. Only the ids of tokens differ;
- **after expansion**, where the scripted executor knows the future and runs held steps in one launch: the
  same decisions at the same times for the same reasons, and the same single steps. ``Planned.held`` says how
  many steps the launch may take, so it is 1 on the real executor, and one launch of k steps stands for k
  launches there. With ``hold_steps=1`` nothing is held, and this too is record by record.

``expanded`` says precisely what is compared in the second case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.hookspecs import hookimpl
from servelab.core.records import (
    PagesEvicted,
    Planned,
    Record,
    RequestFinished,
    RunFinished,
    RunStarted,
    StepDone,
    TokensEmitted,
)
from servelab.core.registry import Registry
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth
from servelab.core.sampling import SamplingParams
from servelab.core.spec import PluginSpec
from servelab.core.testing.tiny_model import SHAPE, VOCAB

US = 1000
STEP_US = 100
"""Fixed price of a step: arrivals a few of them apart make a queue."""


@dataclass(frozen=True)
class World:
    """A small workload and what it is served with.

    Args:
        pages: KV pages of 4 tokens.
        host_pages: likewise, on the host; 0: no swapping.
        count: requests.
        gap_us: mean time between arrivals.
        stem: leading tokens that every second prompt shares.
        samples: outputs of every third request.
        cancelled: every third request's client gives up after a while.
        sections: configuration of both runs; ``real`` of the real one only.
    """

    name: str
    pages: int = 200
    host_pages: int = 0
    count: int = 12
    gap_us: int = 150
    stem: int = 0
    samples: int = 1
    cancelled: bool = False
    sampling: SamplingParams | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)
    real: Mapping[str, Any] = field(default_factory=dict)

    def items(self, seed: int) -> list[Arrival | Cancel]:
        """The workload, in time order."""
        rng = Random(f"{seed}/{self.name}")
        stem = [rng.randrange(3, VOCAB) for _ in range(self.stem)]
        now, found = 0, list[Arrival | Cancel]()
        for k in range(self.count):
            now += rng.randrange(2 * self.gap_us * US)
            ids = [*(stem if k % 2 else ()), *(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 28)))]
            n = self.samples if k % 3 == 0 else 1
            spec = RequestSpec(
                id=f"r{k}",
                prompt_tokens=len(ids),
                max_new_tokens=rng.choice([12, 24, 30]),
                prompt_ids=tuple(ids),
                n=n,
                sampling=self.sampling,
            )
            lengths = [rng.randint(1, 28) for _ in range(n)]
            found.append(Arrival(now, spec, Truth(lengths[0], tuple(lengths[1:]))))
            if self.cancelled and k % 3 == 0:
                found.append(Cancel(now + rng.randrange(2000) * US, spec.id))
        return sorted(found, key=lambda item: item.time_ns)


WORLDS = (
    World("ample"),
    World("tight", pages=26),
    World("cancelled", pages=30, cancelled=True),
    World("samples", pages=40, samples=3, sampling=SamplingParams(temperature=1.0)),
    World("prefix", pages=40, stem=16, sections={"prefix": "hash"}),
    World("quantized", pages=30, real={"quant": {"name": "w4a8", "group_size": 16}}),
)
MAX_MODEL_LEN = 80


def settings_for(config: type | None) -> dict[str, Any]:
    """Budgets at which prompts go in chunks and seats run out, for schedulers that have them."""
    fields = getattr(config, "model_fields", {})
    wanted = {
        "max_num_batched_tokens": 24,
        "chunk_size": 24,
        "max_ragged_batch_size": 24,
        "max_num_seqs": 6,
        "max_ragged_sequence_count": 6,
    }
    return {name: value for name, value in wanted.items() if name in fields}


def served(
    scheduler: str,
    world: World,
    *,
    registry: Registry,
    executor: Mapping[str, Any],
    model: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    seed: int = 5,
    **sections: Any,
) -> list[Record]:
    """The log of one run on the virtual clock, tokens included."""
    registry = replace(registry, specs=dict(registry.specs), providers=dict(registry.providers))
    traffic, keep = _Given(world.items(seed)), _Keep()
    provides = frozenset({"workload.prompt_ids", "workload.truth"})
    given = PluginSpec(name="parity", factory="parity:given", provides=provides)
    registry.add("workload", given, factory=lambda settings, ctx: traffic)
    registry.add(
        "observer", PluginSpec(name="parity", factory="parity:keep"), factory=lambda settings, ctx: keep
    )
    run = compose(
        validate(
            {
                "seed": seed,
                "scheduler": {"name": scheduler, **(config or {})},
                "kvcache": {"name": "paged", "page_tokens": 4},
                "cost": {"name": "scripted", "step_ns": STEP_US * US, "token_ns": 3 * US, "context_ns": 20},
                "workload": "parity",
                "task": "bench",
                "observers": ["parity"],
                "clock": {"name": "virtual"},
                "executor": {
                    "num_kv_pages": world.pages,
                    "num_host_pages": world.host_pages,
                    **executor,
                },
                "engine": {"max_model_len": MAX_MODEL_LEN, "checks": "full"},
                "model": dict(model),
                **world.sections,
                **sections,
            },
            registry,
        ),
        registry,
    )
    try:
        run.task.run(run)
    finally:
        run.close()
    return keep.records


def real(scheduler: str, world: World, folder: Path, **more: Any) -> list[Record]:
    """Served by the tiny model in ``folder`` (``tiny_model``), in float64."""
    model = {"name": "tiny", "source": "path", "path": str(folder), "dtype": "float64"}
    quality = {"quality": {"max_tokens": 0}} if world.real else {}
    sections = {"kernel": "sdpa", **quality, **world.real, **more.pop("sections", {})}
    return served(scheduler, world, executor={"name": "torch"}, model=model, **sections, **more)


def scripted(scheduler: str, world: World, *, foresight: bool, **more: Any) -> list[Record]:
    """Served by placeholders."""
    executor = {"name": "scripted", "foresight": foresight}
    model = {"name": "tiny", "dtype": "float64", **SHAPE}
    return served(scheduler, world, executor=executor, model=model, **more)


def check_parity(
    scheduler: str,
    folder: Path,
    *,
    registry: Registry | None = None,
    config: Mapping[str, Any] | None = None,
    worlds: Sequence[World] = WORLDS,
) -> None:
    """Hold a registered scheduler to one log on both executors.

    Args:
        scheduler: its registered name.
        folder: of ``write_tiny_model``.
        config: its settings; default: small budgets where it has them.

    Raises:
        AssertionError: with the first record that differs, in both logs.
    """
    registry = registry or Registry.load()
    made = registry.resolve("scheduler", scheduler, "config")
    chosen = dict(settings_for(made) if config is None else config)
    for world in worlds:
        more: dict[str, Any] = {"registry": registry, "config": chosen}
        log = real(scheduler, world, folder, **more)
        title = f"scheduler {scheduler!r}, world {world.name!r}"
        stepped = scripted(scheduler, world, foresight=False, **more)
        same(without_ids(log), without_ids(stepped), f"{title}, one step per launch")
        held = scripted(scheduler, world, foresight=True, **more)
        same(expanded(log), expanded(held), f"{title}, held steps written out")
        if "hold_steps" in getattr(made, "model_fields", {}):
            more["config"] = {**chosen, "hold_steps": 1}
            log = real(scheduler, world, folder, **more)
            stepped = scripted(scheduler, world, foresight=True, **more)
            same(without_ids(log), without_ids(stepped), f"{title}, hold_steps=1")


# -------------------------------------------------------------------- comparing


def without_ids(records: Sequence[Record]) -> list[Record]:
    """Every record but those of the run itself, with token ids replaced by their count."""
    found = list[Record]()
    for record in records:
        if isinstance(record, TokensEmitted):
            found.append(replace(record, tokens=[0] * len(record.tokens)))
        elif not isinstance(record, RunStarted | RunFinished):
            found.append(record)
    return found


def expanded(records: Sequence[Record]) -> list[object]:
    """Every launch as single steps, without what a launch of several cannot show.

    Equal in order: every decision but for ``Planned.held``, with the pages that the prefix store has given
    up by then; every step, with its number, time, requests, and the tokens each ran and brought; arrivals,
    admissions, forks, preemptions, ends. Left out: queues and free pages in the middle of a held launch, in
    which of its steps a page was evicted, and how the tokens of its steps are grouped into records.
    """
    found: list[object] = []
    evicted: Counter[int] = Counter()
    for record in records:
        if isinstance(record, Planned):
            found.append((replace(record, held=0), dict(evicted)))
        elif isinstance(record, PagesEvicted):
            evicted[record.pool] += record.pages
        elif isinstance(record, StepDone):
            start, steps = record.start_ns, len(record.ends_ns)
            for k, end in enumerate(record.ends_ns):
                tokens = record.tokens if k == 0 else [1] * len(record.tokens)
                emitted = [n // steps for n in record.emitted]
                found.append(
                    ("step", record.lane, record.step + k, start, end, record.requests, tokens, emitted)
                )
                start = end
        elif not isinstance(record, RunStarted | RunFinished | TokensEmitted):
            found.append(record)
    return found


def same(
    a: Sequence[object], b: Sequence[object], title: str, names: tuple[str, str] = ("torch", "scripted")
) -> None:
    """Two logs are equal.

    Raises:
        AssertionError: with the first record that differs in both, and what came before it.
    """
    if a == b:
        return
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    lines = [f"{title}: the logs of {names[0]} and {names[1]} differ at record {at} of {len(a)} and {len(b)}"]
    lines += [f"  both, before: {record}" for record in a[max(0, at - 3) : at]]
    width = max(map(len, names))
    for name, log in zip(names, (a, b), strict=True):
        lines.append(f"  {name:>{width}}: {log[at] if at < len(log) else 'nothing more'}")
    raise AssertionError("\n".join(lines))


# ------------------------------------------------------------------------ parts


class _Given:
    def __init__(self, items: Sequence[Arrival | Cancel]) -> None:
        self._items = items

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        return iter(self._items)

    def react(self, finished: RequestFinished) -> tuple[()]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


class _Keep:
    def __init__(self) -> None:
        self.records: list[Record] = []

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)

    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        """That it is here has tokens sent at all."""

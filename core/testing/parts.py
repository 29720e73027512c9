"""Registered plugins built for toy limits: which of them go together, with which small settings.

Nothing is listed by hand: what exists comes from the registry, what goes together from
``core.capabilities``, and settings are drawn from the schema of each plugin's own config model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from pydantic import BaseModel, ValidationError

from servelab.core.capabilities import Selected, check_capabilities
from servelab.core.compose import assemble, checked_part
from servelab.core.config import Choice
from servelab.core.context import BuildPart, Context, Oracle, seeded
from servelab.core.errors import CapabilityError, ConfigError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.layout import KVLayout
from servelab.core.plan import Hold, KeepHost, Pin, Release, StepPlan
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import RandomPlans, ToyKV, toy_layout

_ANYTHING = frozenset({"scheduler.chunks", "scheduler.layers", "scheduler.lanes", "scheduler.ahead"})
_NO_SWAPS = RandomPlans.KINDS - {"swap", "swap_in"}
_SURROUNDINGS = (
    Selected("executor", PluginSpec(name="toy", factory="toy:toy", provides=frozenset({"executor.sim"}))),
    Selected(
        "workload",
        PluginSpec(
            name="toy",
            factory="toy:toy",
            provides=frozenset({"workload.truth", "workload.prompt_ids", "workload.programs"}),
        ),
    ),
)
TRIES = 200
"""Draws of settings before a plugin is given up."""


@dataclass(frozen=True)
class Combination:
    """A scheduler, a kvcache and perhaps a prefix store that may meet."""

    scheduler: str
    kvcache: str
    prefix: str | None
    lanes: bool = False
    """The scheduler plans several lanes."""
    ahead: bool = False
    """It plans a step ahead."""

    def __str__(self) -> str:
        return "-".join([self.scheduler, self.kvcache, *([self.prefix] if self.prefix else [])])


def with_toys() -> Registry:
    """Everything registered, and parts that are no technique: schedulers that draw any legal plan (the second
    one swaps and keeps KV between turns too), and the kvcache of ``fakes`` with one pool or two.
    """
    registry = Registry.load()

    def add(kind: str, factory: Any, provides: frozenset[str], **spec: Any) -> None:
        made = PluginSpec(factory="toy:toy", provides=provides, **spec)
        registry.add(kind, made, provider="toys", factory=factory)

    add("scheduler", lambda config, ctx: AnyPlan(ctx.rng, _NO_SWAPS), _ANYTHING, name="any_plan")
    add(
        "scheduler",
        lambda config, ctx: KeepingPlan(ctx.rng),
        _ANYTHING | {"scheduler.swap", "scheduler.retains"},
        name="any_plan_keeping",
        requires=frozenset({"kvcache.swap"}),
    )
    pages = frozenset({"kvcache.block_table", "kvcache.fork", "kvcache.swap"})
    add("kvcache", lambda config, ctx: ToyKV(_toy_layout(ctx.rng)), pages, name="toy")
    return registry


def _toy_layout(rng: Random) -> KVLayout:
    page_tokens = rng.choice([(1,), (2,), (4,), (3, 2)])
    windows = rng.choice([(), (), (1,), (2,), (5,), (None, 3), (None, 7), (4, 9)])
    return toy_layout(*page_tokens, windows=windows)


def combinations(
    registry: Registry, only: Mapping[str, Sequence[str | None]] | None = None
) -> list[Combination]:
    """All that may meet, in a fixed order; those that cannot run here are left out.

    Args:
        only: by kind, the names to choose from; other kinds may be anything.
    """
    only = only or {}

    def names(kind: str) -> list[str]:
        here = [n for n in registry.names(kind) if registry.unavailable(registry.spec(kind, n)) is None]
        return [name for name in here if name in only.get(kind, here)]

    found = []
    for scheduler in names("scheduler"):
        for kvcache in names("kvcache"):
            for prefix in [*([None] if None in only.get("prefix", [None]) else []), *names("prefix")]:
                chosen = {"scheduler": scheduler, "kvcache": kvcache, "prefix": prefix}
                if _meet(registry, chosen):
                    found.append(
                        Combination(
                            scheduler,
                            kvcache,
                            prefix,
                            lanes=_meet(registry, chosen, lanes=True),
                            ahead=_meet(registry, chosen, ahead=True),
                        )
                    )
    return found


def _meet(registry: Registry, chosen: Mapping[str, str | None], **settings: bool) -> bool:
    selected = [Selected(kind, registry.spec(kind, name)) for kind, name in chosen.items() if name]
    try:
        check_capabilities([*selected, *_SURROUNDINGS], registry, **settings)
    except CapabilityError:
        return False
    return True


class Parts:
    """Builds plugins for one toy world.

    Args:
        oracle: true lengths, for plugins that declare ``oracle``.
        config: by kind, settings to use instead of drawn ones.
    """

    def __init__(
        self,
        registry: Registry,
        rng: Random,
        *,
        limits: Limits,
        model: ModelFacts,
        oracle: Oracle,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.registry, self.rng = registry, rng
        self.limits, self.model, self.oracle = limits, model, oracle
        self.config = config or {}

    def make(self, kind: str, name: str) -> Any:
        """The plugin, under settings that its config model and its factory accept.

        Raises:
            ConfigError: no draw was accepted.
        """
        spec = self.registry.spec(kind, name)
        factory = self.registry.resolve(kind, name, "factory")
        model = self.registry.resolve(kind, name, "config")
        context = Context(
            kind=kind,
            name=name,
            rng=Random(self.rng.randrange(1 << 30)),
            model=self.model,
            hardware=None,
            limits=self.limits,
            oracle=self.oracle if spec.oracle else None,
        )
        context = replace(context, part=parts_like(context, self.registry, self.oracle))
        if model is None:
            return factory(None, context)
        if kind in self.config:
            return factory(model.model_validate(self.config[kind]), context)
        last: Exception | None = None
        for _ in range(TRIES):
            drawn = self._settings(model)
            try:
                return factory(model.model_validate(drawn, context={"registry": self.registry}), context)
            except (ConfigError, ValidationError) as exc:
                last = exc
        raise ConfigError(
            f"no small settings of {kind} {name!r} were found",
            where=f"{TRIES} draws from its config model, for limits {self.limits}",
            why=f"the last one: {last}",
            do=f"state settings that fit: config = {{{kind!r}: {{...}}}}",
        ) from last

    def _settings(self, model: type[BaseModel] | None) -> dict[str, Any]:
        """Small values of settings; a plugin within keeps its name."""
        drawn = {}
        for field, schema in model.model_json_schema().get("properties", {}).items() if model else ():
            if "part_of" not in schema:
                drawn[field] = _draw(schema, self.rng)
            elif isinstance(name := schema.get("default"), str):
                inner = self.registry.resolve(schema["part_of"], name, "config")
                drawn[field] = {"name": name, **self._settings(inner)}
        return {field: value for field, value in drawn.items() if value is not _DEFAULT}


_DEFAULT: Any = object()


def _draw(schema: Mapping[str, Any], rng: Random) -> Any:
    """A small value of a setting, or ``_DEFAULT``."""
    if rng.randrange(4) == 0 and "default" in schema:
        return _DEFAULT
    if "anyOf" in schema:
        return _draw({**rng.choice(schema["anyOf"])}, rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "null":
        return None
    if kind == "boolean":
        return rng.randrange(2) == 0
    if kind == "integer":
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        most = min(schema.get("maximum", least + 12), schema.get("exclusiveMaximum", least + 13) - 1)
        return rng.choice([least, min(least + 1, most), rng.randint(least, min(most, least + 12))])
    if kind == "number":
        least, most = schema.get("minimum", 0.0), schema.get("maximum", schema.get("exclusiveMaximum", 1.0))
        return least + (most - least) * rng.randrange(8) / 8
    return _DEFAULT


class AnyPlan(RandomPlans):
    """Any legal plan, KV between turns included. The time of a pin and room on the host are kept to."""

    def __init__(self, rng: Random, kinds: Iterable[str] = RandomPlans.KINDS) -> None:
        super().__init__(rng, kinds)
        self._host: list[int] = []

    def plan(self, view: Any) -> Any:
        plan = self._steady(view) if self.rng.randrange(3) == 0 else super().plan(view)
        self._host = list(view.kv.free_host_pages)
        for preemption in plan.preemptions:
            if preemption.mode == "swap":
                self._take_host(preemption.request)
        for program in view.contexts:
            if self.rng.randrange(12) == 0:
                plan.unpin(program, "drawn")
        return plan

    def _steady(self, view: Any) -> StepPlan:
        """Decodes and nothing else, held: what drawing one request at a time seldom gives."""
        plan, pages, limits = StepPlan(), view.kv.budget(), view.limits
        for request in view.running:
            room = len(plan.work) < min(limits.max_batch_requests, limits.max_batch_tokens)
            decodes = request.pending_tokens == 1 and not request.layer_cursor
            if room and decodes and pages.take(request, 1):
                plan.work.append(request.next_token)
        if plan.work:
            plan.hold = Hold(self.rng.randint(2, 12))
        return plan

    def _take_host(self, request: Any) -> bool:
        left = [have - n for have, n in zip(self._host, request.pages, strict=True)]
        if min(left) < 0:
            return False
        self._host = left
        return True


class KeepingPlan(AnyPlan):
    """It also answers ``on_turn_end``."""

    def on_turn_end(self, request: Any) -> Any:
        wish = self.rng.randrange(4)
        if wish == 0 and any(self._host) and not request.in_flight and self._take_host(request):
            return KeepHost("drawn")
        if wish < 3:
            return Pin(request.last_token_ns + self.rng.choice([1, 5_000, 1 << 40]), "drawn")
        return Release()


def parts_like(context: Context, registry: Registry, oracle: Oracle | None) -> BuildPart:
    """``Context.part`` for a plugin that is built alone: contexts of parts are like its own.

    Args:
        context: of the plugin.
        registry: where its parts are.
        oracle: for parts that declare one.
    """

    def part(kind: str, choice: Choice, key: str = "", place: tuple[str, ...] = ()) -> Any:
        place = (*place, key) if key else place
        spec = registry.spec(kind, checked_part(kind, choice).name)
        inner = replace(
            context,
            kind=kind,
            name=choice.name,
            rng=seeded(context.seed, kind, "/".join([*place, choice.name])),
            oracle=oracle if spec.oracle else None,
            part=lambda kind, choice, key="": part(kind, choice, key, place),
        )
        return assemble(choice, inner, registry)

    return part

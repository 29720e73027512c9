"""Whether the selected plugins can work together. Data only: nothing of theirs is imported to find out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servelab.core.errors import CapabilityError
from servelab.core.registry import Registry, selection
from servelab.core.spec import PluginSpec
from servelab.core.vocabulary import find_conflicts

if TYPE_CHECKING:
    from servelab.core.config import Choice

USED = frozenset(
    {
        "scheduler",
        "kvcache",
        "prefix",
        "quant",
        "kernel",
        "router",
        "cost",
        "workload",
        "executor",
        "task",
        "observer",
    }
)
"""Kinds that a composed run uses. Selecting any other is refused, never silently ignored."""

IMPLIED = {"quant": frozenset({"executor.quant"})}
"""What every plugin of a kind requires, whether or not its spec says so: else it would be without effect."""


UNSERVED = frozenset(
    {
        "prefix.approximate",
        "prefix.moving",
        "prefix.decode_fixup",
        "prefix.tiers",
        "prefix.pin",
        "router.shares",
        "router.lends",
        "router.replicates",
        "router.experts",
        "router.models",
        "router.plans",
    }
)
"""What the contracts describe and the engine does not call yet: a plugin that relies on it is refused."""

SHOWN = 4
"""Remedies that a message names."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A plugin chosen for the run."""

    kind: str
    spec: PluginSpec
    parts: tuple[Selected, ...] = ()
    """The plugins chosen within its settings."""

    def __str__(self) -> str:
        return f"{self.kind} {self.spec.name!r}"

    @property
    def provides(self) -> frozenset[str]:
        """What others can rely on: of a plugin that is made of parts of its own kind, what it passes on and
        all of them provide. Parts of other kinds are its own affair.
        """
        return self.spec.provides.intersection(*(part.provides for part in self._alike()))

    @property
    def may(self) -> frozenset[str]:
        """What others must be able to live with: what it provides, and what any part of its kind does."""
        return self.provides.union(*(part.may for part in self._alike()))

    def everyone(self) -> Iterator[Selected]:
        """It, and all within it."""
        yield self
        for part in self.parts:
            yield from part.everyone()

    def _alike(self) -> Iterator[Selected]:
        return (part for part in self.parts if part.kind == self.kind)


def select(chosen: Iterable[tuple[str, Choice]], registry: Registry) -> list[Selected]:
    """Plugins as they were chosen, each with its parts.

    Raises:
        PluginError: nobody declares one of them.
    """
    return [
        Selected(
            kind,
            registry.spec(kind, choice.name),
            tuple(select(((part.kind, part) for part in choice.parts()), registry)),
        )
        for kind, choice in chosen
    ]


def check_capabilities(
    selected: Sequence[Selected], registry: Registry, *, ahead: bool = False, lanes: bool = False
) -> None:
    """Check every requirement and conflict.

    Args:
        selected: the plugins of the run.
        registry: all known plugins, for remedies.
        ahead: the engine plans a step ahead (``engine.max_in_flight`` above 1).
        lanes: the engine has several lanes.

    Raises:
        CapabilityError: one error with every problem: the plugins, the capability and what to do.
    """
    problems = [*_runs(selected, registry), *_unused(selected), *_engine(selected, ahead, lanes)]
    for root in selected:
        outside = [other for other in selected if other is not root]
        for one in root.everyone():
            problems += _missing(one, [*outside, *one.parts], registry)
            problems += _clashes(one, [other for other in _all(selected) if other is not one])
    idle = frozenset() if ahead else frozenset({"scheduler.ahead"})  # it could, but will not
    problems += find_conflicts({str(one): one.may - idle for one in selected})
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CapabilityError(
            "\n".join([f"these parts cannot work together, {count}:", *(f"  - {p}" for p in problems)])
        )


def _runs(selected: Sequence[Selected], registry: Registry) -> list[str]:
    """Every plugin must work with the class of the executor."""
    (executor,) = (one for one in selected if one.kind == "executor")
    classes = [c for c in ("torch", "sim") if f"executor.{c}" in executor.spec.provides]
    if len(classes) != 1:
        found = "both" if classes else "neither"
        return [
            f"{executor} must provide exactly one of executor.torch and executor.sim, it provides {found}; "
            "correct its PluginSpec"
        ]
    runs = classes[0]
    problems = []
    for one in _all(selected):
        if one is executor or runs in one.spec.runs:
            continue
        fitting = [
            selection("executor", name)
            for name in registry.names("executor")
            if {f"executor.{r}" for r in one.spec.runs} & registry.spec("executor", name).provides
        ]
        peers = [
            selection(one.kind, name)
            for name in registry.names(one.kind)
            if runs in registry.spec(one.kind, name).runs
        ]
        problems.append(
            f"{one} runs on {' and '.join(one.spec.runs)} only, but {executor} provides 'executor.{runs}'; "
            f"choose {_either([*fitting, *peers])}"
        )
    return problems


def _engine(selected: Sequence[Selected], ahead: bool, lanes: bool) -> list[str]:
    """What settings of the engine ask of the scheduler."""
    return [
        f"{one} does not provide {capability!r}, which {setting} of 2 and more needs; set {setting}=1 or "
        "choose another scheduler"
        for one in _all(selected)
        for wanted, setting, capability in (
            (ahead, "engine.max_in_flight", "scheduler.ahead"),
            (lanes, "engine.lanes", "scheduler.lanes"),
        )
        if one.kind == "scheduler" and wanted and capability not in one.spec.provides
    ]


def _unused(selected: Sequence[Selected]) -> list[str]:
    return [
        f"{one} is selected, but no part of this version's engine uses plugins of kind {one.kind!r}; "
        f"leave it out: {one.kind}=null"
        for one in _all(selected)
        if one.kind not in USED
    ] + [
        f"{one} provides {capability!r}, which this version's engine does not serve; "
        f"choose another {one.kind}"
        for one in _all(selected)
        for capability in sorted(one.spec.provides & UNSERVED)
    ]


def _all(selected: Iterable[Selected]) -> list[Selected]:
    return [one for root in selected for one in root.everyone()]


def _missing(one: Selected, others: Sequence[Selected], registry: Registry) -> list[str]:
    brought = frozenset().union(*(other.provides for other in others))
    problems = []
    for capability in sorted((one.spec.requires | IMPLIED.get(one.kind, frozenset())) - brought):
        givers = [
            selection(kind, name)
            for (kind, name), spec in sorted(registry.specs.items())
            if capability in spec.provides and (kind, name) != (one.kind, one.spec.name)
        ]
        # name the plugin of the family the capability is about, if there is one
        family = capability.partition(".")[0]
        holder = next((other for other in others if other.kind == family), None)
        if holder and (within := [e for e in holder.everyone() if capability not in e.spec.provides]):
            holder = within[-1]  # of a plugin made of parts, the part that lacks it
        lacks = f"{holder} does not provide" if holder else "no selected plugin provides"
        problems.append(f"{one} requires {capability!r}, which {lacks}; choose {_either(givers)}")
    return problems


def _clashes(one: Selected, others: Sequence[Selected]) -> list[str]:
    return [
        f"{one} conflicts with {capability!r}, which {other} provides; "
        f"choose another {one.kind} or another {other.kind}"
        for other in others
        for capability in sorted(one.spec.conflicts & other.provides)
    ]


def _either(options: Sequence[str]) -> str:
    if not options:
        return "other parts: no installed plugin brings it"
    more = ["one of the others that `servelab plugins` lists"] if len(options) > SHOWN else []
    return " or ".join([*options[:SHOWN], *more])

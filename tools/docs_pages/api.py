"""docs/reference/api.md: what policies see and what they return."""

from __future__ import annotations

import inspect

from docs_pages.markdown import page, prose, table
from docs_pages.source import members
from servelab.core import plan, request
from servelab.core.context import Context
from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.families import scheduler
from servelab.core.layout import Capacity, KVLayout, Pool
from servelab.core.spec import Paper, PluginSpec

INTRO = """The data that crosses the border between the core and plugins, from `core/plan.py`,
`core/request.py`, `core/families/scheduler.py`, `core/layout.py`, `core/facts.py` and `core/spec.py`.
Authors import all of it from `servelab.core.api`. The contracts of the other kinds:
[families](../explanation/families.md). Times are in nanoseconds, lengths in tokens; tuples "per pool" are
in the order of the layout."""

GROUPS: dict[str, tuple[str, tuple[type, ...]]] = {
    "What a scheduler sees": (
        "Live and read-only; valid during the call they are given to.",
        (
            scheduler.StepView,
            scheduler.Queue,
            request.RequestView,
            scheduler.KVView,
            scheduler.KVBudget,
            scheduler.CostView,
            scheduler.ProgramView,
            scheduler.ContextView,
            Limits,
            ModelFacts,
            HardwareFacts,
        ),
    ),
    "What a scheduler returns": (
        "Data, checked as a whole before anything of it is applied ([why](../explanation/plans.md)).",
        (
            plan.StepPlan,
            plan.Tokens,
            plan.Background,
            plan.Preemption,
            plan.Verdict,
            plan.Hold,
            plan.Unpin,
            plan.Release,
            plan.Pin,
            plan.KeepHost,
        ),
    ),
    "Scheduler": (
        "One method is required; the others are for capabilities.",
        (scheduler.Scheduler, scheduler.LearningScheduler, scheduler.RetainingScheduler),
    ),
    "Requests": (
        "What a workload states, and what is kept from policies.",
        (request.RequestSpec, request.SLO, request.Truth, request.Arrival, request.Cancel, request.Phase),
    ),
    "Memory and launches": ("", (KVLayout, Pool, Capacity, plan.Outcome)),
    "Plugins": ("What a package declares, and what a factory is given.", (PluginSpec, Paper, Context)),
}


def render() -> str:
    parts = [INTRO]
    for heading, (about, classes) in GROUPS.items():
        parts += [f"## {heading}", about, *(part for cls in classes for part in _class(cls))]
    return page("Views, plans and other data", *parts)


def _class(cls: type) -> list[str]:
    parts = [f"### {cls.__name__}", _doc(cls)]
    if issubclass(cls, request.Phase):
        parts.append(", ".join(f"`{one.value}`" for one in cls))
        return parts
    found = members(cls)
    read = [m for m in found if m.kind != "method"]
    if cls is plan.Tokens:
        read = []  # its docstring has them
    if read:
        rows = [(f"`{m.name}`", f"`{m.signature}`", prose(m.doc)) for m in read]
        parts.append(table(("field", "type", "meaning"), rows))
    calls = [m for m in found if m.kind == "method"]
    if calls:
        lines = [(f"`{m.name}{m.signature}`", prose(m.doc)) for m in calls]
        parts.append(table(("method", "what it does"), lines))
    return parts


def _doc(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    return "" if text.startswith(f"{cls.__name__}(") else prose(text)

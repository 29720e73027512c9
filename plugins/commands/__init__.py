"""Subcommands of the command line, one line each."""

from __future__ import annotations

from collections.abc import Mapping

from servelab.core.api import hookimpl

TABLE = {
    "plugins": (
        "servelab.plugins.commands.plugins:main",
        "all plugins: papers, tiers, what is disabled and why",
    ),
    "show": (
        "servelab.plugins.commands.show:main",
        "one plugin or section: its settings with units, bounds and origins",
    ),
    "explain": (
        "servelab.plugins.commands.explain.command:main",
        "the life of one request of a run: why it waited, who preempted it and why",
    ),
    "compare": (
        "servelab.plugins.commands.compare.command:main",
        "runs side by side: what was set differently, and what came out",
    ),
    "export": (
        "servelab.plugins.commands.export:main",
        "a run in the names, and by the rules, of GuideLLM or AIPerf",
    ),
    "report": (
        "servelab.plugins.observers.report.command:main",
        "the plots and the page of a run again, from its files",
    ),
    "sweep": (
        "servelab.plugins.sweeps.command:main",
        "the comparison of a sweep's jobs, made again from its folder",
    ),
    "new": (
        "servelab.plugins.commands.new.command:main",
        "a package of one's own: a plugin that works, its settings, its tests",
    ),
    "devices": (
        "servelab.plugins.commands.devices.command:main",
        "the devices of the catalog; and a profile of this machine, measured",
    ),
    "data": (
        "servelab.plugins.commands.data.command:main",
        "published traces: what there is, and fetched from their publishers",
    ),
    "doctor": (
        "servelab.plugins.commands.doctor.command:main",
        "what works here and what does not: versions, model, plugin packages; and what to do",
    ),
}


@hookimpl
def servelab_commands() -> Mapping[str, tuple[str, str]]:
    return TABLE

"""docs/reference/hooks.md: every hook with its exact signature."""

from __future__ import annotations

from docs_pages.markdown import page, prose
from docs_pages.source import members
from servelab.core.families import KINDS
from servelab.core.hookspecs import EVENT_OF_RECORD, Commands, Events, Registration
from servelab.core.records import RECORDS
from servelab.core.spec import HOOK_API

INTRO = f"""All hooks of ServeLab, from `core/hookspecs.py`; version {HOOK_API[0]}.{HOOK_API[1]}. What
they are for, when they may change and why decisions are never hooks: [Hooks and their
version](../explanation/hook_api.md). All of them fire in the main process, whatever the executor or
clock, on a real engine and in simulation alike.

An implementation carries `@hookimpl` from `servelab.core.api`, leaves `self` out in a module, and may
name fewer arguments than the hook has."""


def render() -> str:
    return page(
        "Hooks",
        INTRO,
        "## Registration",
        prose(Registration.__doc__),
        *_hooks(Registration),
        "## Commands",
        prose(Commands.__doc__),
        *_hooks(Commands),
        "## Events",
        prose(Events.__doc__),
        *_hooks(Events),
    )


def _hooks(group: type) -> list[str]:
    kind_of = {kind.hook: kind for kind in KINDS.values()}
    record_of = {hook: RECORDS[ev] for ev, hook in EVENT_OF_RECORD.items()}
    parts = []
    for hook in members(group):
        parts += [
            f"### `{hook.name}`",
            f"```python\ndef {hook.name}{hook.signature}: ...\n```",
            prose(hook.doc),
        ]
        if kind := kind_of.get(hook.name):
            module, _, cls = kind.protocol.partition(":")
            path = module.removeprefix("servelab.").replace(".", "/") + ".py"
            parts.append(
                f"Kind `{kind.name}`: decides {kind.decides}. Each factory returns a `{cls}` (`{path}`). "
                f"Fields of what is declared: [`PluginSpec`](api.md#pluginspec)."
            )
        if record := record_of.get(hook.name):
            name = record.__name__
            parts.append(f"Fires for each record `{record.ev}`: [`{name}`](records.md#{record.ev}).")
    return parts

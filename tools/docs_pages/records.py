"""docs/reference/records.md: every record of the logs, field by field."""

from __future__ import annotations

from docs_pages.markdown import page, prose, table
from docs_pages.source import members
from servelab.core.hookspecs import EVENT_OF_RECORD
from servelab.core.records import LOG_SCHEMA, RECORDS

INTRO = f"""What the engine reports, from `core/records.py`; version {LOG_SCHEMA} of the fields
(`LOG_SCHEMA`). Observers and learning schedulers get these objects, `events.jsonl` and `plan.jsonl` hold
them as JSON with `"ev"` naming the type ([how to read the files](logs.md)). Every record also has `t_ns`
(when, in ns of the run's clock) and `engine` (index of the instance, 0 where there is one). True output
lengths never appear before a request has finished."""


def render() -> str:
    parts = [INTRO]
    for ev, cls in RECORDS.items():
        rows = [(f"`{m.name}`", f"`{m.signature}`", prose(m.doc)) for m in members(cls)]
        parts += [
            f"## `{ev}`",
            f"`{cls.__name__}`; hook [`{EVENT_OF_RECORD[ev]}`](hooks.md#{EVENT_OF_RECORD[ev]}). {_doc(cls)}",
            table(("field", "type", "meaning"), rows) if rows else "No fields of its own.",
        ]
    return page("Records", *parts)


def _doc(cls: type) -> str:
    text = cls.__doc__ or ""
    return "" if text.startswith(f"{cls.__name__}(") else prose(text)  # the one dataclasses make up

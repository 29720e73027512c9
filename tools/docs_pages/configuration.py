"""docs/reference/configuration.md: every section and the settings of every plugin."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs_pages.markdown import page, prose, table
from docs_pages.plugins import IN_TREE, settings_model
from servelab.core import config
from servelab.core.registry import selection
from servelab.plugins.commands.show import SECTIONS, default_text, type_text

INTRO = """Every setting of a run. On the command line they are written `section.field=value`, as in
`engine.max_model_len=2048`; `servelab show SECTION` and `servelab show KIND NAME` print the same with
what is installed beside it. Unknown names and values out of bounds are refused, all in one message.
Defaults here are those of the code; files in `configs/` may state others, and `resolved_config.yaml` of a
run has what was in force."""


def settings(model: type[BaseModel]) -> str:
    """The fields of a settings model as a table."""
    return table(
        ("setting", "type", "default", "meaning"), [_row(*item) for item in model.model_fields.items()]
    )


def _row(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    default = "required" if field.is_required() else f"`{default_text(field)}`"
    return f"`{name}`", type_text(field), default, prose(field.description)


def heading(kind: str, name: str) -> str:
    """The heading of a plugin's settings."""
    return f"{kind} {name}"


def render() -> str:
    parts = [INTRO, "## The run"]
    rows = []
    for name, field in config.RunConfig.model_fields.items():
        link = f"[`{name}`](#{name})" if name in SECTIONS else f"`{name}`"
        kind = config.PLUGIN_SECTIONS.get(name)
        given = "required" if field.is_required() else "" if kind else f"`{default_text(field)}`"
        what = f"plugin of kind `{kind}`" if kind else "section" if name in SECTIONS else type_text(field)
        rows.append((link, what, "" if name in SECTIONS else given, prose(field.description)))
    parts.append(table(("section", "what it is", "default", "meaning"), rows))
    for name, cls in SECTIONS.items():
        model: type[BaseModel] = getattr(config, cls)
        parts += [f"## {name}", prose(model.__doc__), settings(model)]
    parts.append("## Settings of plugins")
    for (kind, name), spec in IN_TREE.items():
        chosen = settings_model(spec)
        about = f"{spec.summary[:1].upper()}{spec.summary[1:]}. Select with `{selection(kind, name)}`."
        parts += [f"### {heading(kind, name)}", about, settings(chosen) if chosen else "No settings."]
    return page("Configuration", *parts)

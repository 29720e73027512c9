"""Chat templates, rendered as transformers renders them, without its import (seconds, and torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from servelab.core.errors import ConfigError
from servelab.plugins.executors.checkpoint.errors import library

TODAY = date(2024, 7, 26)
"""The date that every template sees (Llama's own default): a prompt does not depend on the day of the run."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special: special tokens by role (``bos_token``, ...), which templates may write.
        where: the file, for messages.

    Raises:
        ConfigError: the text is no template.
    """

    def __init__(self, source: str, special: Mapping[str, str], where: str) -> None:
        self._special, self._where = dict(special), where
        self._errors: Any = library("jinja2.exceptions", why="chat templates are written for it")
        try:
            self._template = _environment().from_string(source)
        except self._errors.TemplateError as exc:
            raise self._refused("the chat template cannot be read", exc) from exc

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as text, the assistant's turn opened.

        Raises:
            ConfigError: the template refuses the messages.
        """
        plain = [dict(message) for message in messages]
        try:
            text: str = self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except (self._errors.TemplateError, TypeError, KeyError, ValueError, AttributeError) as exc:
            raise self._refused("the chat template refuses the messages", exc) from exc
        return text

    def _refused(self, what: str, exc: Exception) -> ConfigError:
        return ConfigError(
            what,
            where=self._where,
            why=str(exc) or type(exc).__name__,
            do="change the roles or their order to what the model knows, or send plain text",
        )


def _environment() -> Any:
    """Settings, filters and functions that templates of the hub rely on."""
    sandbox = library("jinja2.sandbox", why="chat templates are written for it")
    ext = library("jinja2.ext", why="chat templates are written for it")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise library("jinja2.exceptions", why="chat templates are written for it").TemplateError(message)


def _generation_tag() -> type:
    """``{% generation %}``, which marks assistants' text for training: here its contents and nothing else."""
    extension: Any = library("jinja2.ext", why="chat templates are written for it").Extension
    nodes: Any = library("jinja2.nodes", why="chat templates are written for it")

    def parse(self: Any, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)

    members: dict[str, Any] = {"tags": {"generation"}, "parse": parse}
    made: type = type("GenerationTag", (extension,), members)
    return made

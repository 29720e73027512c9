"""Choices: a plugin with its settings, as a section of its own or within the settings of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, to_jsonable_python

from servelab.core.config.section import PLACE, Section, describe
from servelab.core.errors import ConfigError, PluginError, nearest
from servelab.core.registry import Registry


class Choice(Section):
    """One selected plugin with its validated settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = Field(description="Name of the plugin within its kind.")
    config: Any = Field(default=None, description="Its settings; None if it takes none.")

    def settings(self) -> dict[str, Any]:
        """Every effective setting, defaults included, in JSON types."""
        return _plain(self.config) if isinstance(self.config, BaseModel) else {}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, in JSON types."""
        return _plain(self.config, exclude_defaults=True) if isinstance(self.config, BaseModel) else {}

    def parts(self) -> list[Part]:
        """The plugins chosen within its settings, in their order; not those within these."""
        return list(_parts(self.config))


class Part(Choice):
    """A plugin chosen within the settings of another, which builds it by ``Context.part``."""

    kind: str = Field(description="Kind of the plugin.")


@dataclass(frozen=True)
class PartOf:
    """Marks a setting that chooses another plugin::

        inner: Annotated[Choice, PartOf("scheduler")]

    In a configuration it is a name, or a mapping with the name and settings, checked as a section is. Also
    within tuples, mappings and models of the settings. Validated on its own, a model asks what is installed.

    Args:
        kind: of the plugins to choose from.
    """

    kind: str

    @property
    def title(self) -> str:
        """The type, as ``servelab show`` tells it."""
        return f"a {self.kind}: its name, or a mapping with its name and settings"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(_part_settings, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"title": self.title, "part_of": self.kind, "anyOf": [{"type": "string"}, {"type": "object"}]}

    def _read(self, value: Any, info: core_schema.ValidationInfo) -> Part:
        if isinstance(value, Part) and value.kind == self.kind:
            return value
        registry = (info.context or {}).get("registry") or _installed()
        problems: list[str] = []
        choice = read_choice(PLACE, self.kind, value, registry, problems)
        if choice is None:
            problems = problems or [f"{PLACE}.name: must name a {self.kind} (got {value!r})"]
            raise PydanticCustomError("part", "not a usable part", {"problems": problems})
        return Part(kind=self.kind, name=choice.name, config=choice.config)


def _part_settings(part: Part, info: core_schema.SerializationInfo) -> dict[str, Any]:
    """A part as it is stated in a configuration."""
    return {"name": part.name, **(part.changed() if info.exclude_defaults else part.settings())}


@cache
def _installed() -> Registry:
    return Registry.load()


def _parts(value: Any) -> Iterator[Part]:
    if isinstance(value, Part):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _parts(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _parts(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)


def choice_of(kind: str, value: Any, registry: Registry, where: str) -> Choice:
    """A plugin chosen by a name, or by a mapping with its name and settings, at a place of the configuration.

    Raises:
        ConfigError: every problem of it.
    """
    problems: list[str] = []
    choice = read_choice(where, kind, value, registry, problems)
    if choice is None:
        raise refusal(problems or [f"{where}.name: must name a plugin (got {value!r})"])
    return choice


def read_choice(path: str, kind: str, value: Any, registry: Registry, problems: list[str]) -> Choice | None:
    """One plugin section, or None with the problem noted (or when it says that there is none)."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        problems.append(f"{path}: must be a mapping with a name (got {value!r})")
        return None
    fields = {str(key): item for key, item in value.items()}
    if "name" not in fields:
        problems.append(f"{path}.name: missing; {nearest('', registry.names(kind))}")
        return None
    name = fields.pop("name")
    if name is None or name == "none":
        return None  # whatever else the section holds was for the plugin it replaces
    if not isinstance(name, str):
        problems.append(f"{path}.name: must be a name (got {name!r})")
        return None
    try:
        model = registry.resolve(kind, name, "config")
    except PluginError as exc:
        problems.append(f"{path}.name: {_indented(exc)}")
        return None
    if model is None:
        problems += [
            f"{path}.{key}: {kind} {name!r} takes no settings (got {fields[key]!r})" for key in fields
        ]
        return Choice(name=name)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        problems.append(f"{path}.name: the config of {kind} {name!r} is {model!r}, not a pydantic model")
        return None
    try:
        return Choice(name=name, config=model.model_validate(fields, context={"registry": registry}))
    except ValidationError as exc:
        problems += describe(exc, model, path)
        return None


def refusal(problems: list[str]) -> ConfigError:
    """All problems of a configuration as one error."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError(
        "\n".join([f"{count} in the configuration:", *(f"  - {p}" for p in problems)]),
        do="`servelab plugins` lists all plugins, `servelab show KIND NAME` the settings of one",
    )


def _plain(model: BaseModel, *, exclude_defaults: bool = False) -> dict[str, Any]:
    """A model in JSON types; infinities as words, for which JSON has no number and which pydantic reads."""
    # in one go, mode="json" would make infinities null below a serializer of the plugin's own
    dumped = to_jsonable_python(model.model_dump(exclude_defaults=exclude_defaults))
    return {key: _finite(value) for key, value in dumped.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _indented(exc: Exception) -> str:
    return str(exc).replace("\n", "\n    ")

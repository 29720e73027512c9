"""Sections of a configuration, and what is wrong with one, in lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from servelab.core.errors import nearest

PLACE = "*"
"""Stands in problems of a part for where it was stated, which only pydantic knows."""


class Section(BaseModel):
    """Base of our own sections. Plugins' models are plain pydantic models of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def describe(exc: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """A pydantic error as lines ``path: message (got value)``; the nearest names follow an unknown field."""
    lines: list[str] = []
    for error in exc.errors(include_url=False):
        loc = error["loc"]
        path = ".".join([*([prefix] if prefix else []), *map(str, loc)]) or "(root)"
        if error["type"] == "part":
            lines += [path + problem.removeprefix(PLACE) for problem in error["ctx"]["problems"]]
        elif error["type"] == "extra_forbidden":
            known = nearest(str(loc[-1]), _fields_at(model, loc[:-1]))
            lines.append(f"{path}: unknown field (got {error['input']!r}); {known}")
        elif error["type"] == "missing":
            lines.append(f"{path}: missing")
        elif error["type"] == "value_error":  # a validator's own sentence
            lines.append(f"{path}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})")
        else:
            lines.append(f"{path}: {error['msg']} (got {error['input']!r})")
    return lines


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the model found by following an error's location; empty where it cannot be followed."""
    parts = iter(loc)
    for part in parts:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        if _holds_many(field.annotation):
            next(parts, None)  # the key or place of one
        inner = list(_models(field.annotation))
        if len(inner) > 1:  # one of several, told apart by the value of a field
            tag = next(parts, None)
            inner = [one for one in inner if any(f.default == tag for f in one.model_fields.values())]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _holds_many(annotation: Any) -> bool:
    """Whether it is a mapping or a sequence, or may be one."""
    return get_origin(annotation) in (dict, list, tuple) or any(map(_holds_many, get_args(annotation)))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type, unions and collections included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)

"""Sections of a configuration, and what is wrong with one, in lines."""

from __future__ import annotations

from collections.abc import Iterable
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
        if field is not None and get_origin(field.annotation) is dict:
            next(parts, None)  # a key of the mapping
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)] if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

"""Rotary position embeddings, in one spelling out of the three that config.json files use.

transformers 5 writes ``rope_parameters``; older ones ``rope_theta`` with ``rope_scaling``, whose type is
under ``rope_type`` or ``type``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from servelab.core.errors import nearest
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.windows import FULL, SLIDING

_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("factor", "original_max_position"),
}
"""Type -> numbers it cannot do without."""
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}
_MAY_BE_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Zero says what leaving it out does."""
_DEFAULT_THETA = 10000.0


def ropes_by_kind(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``rope`` of full layers and of those with a window, where each kind turns by angles of its own.

    transformers 5 writes ``rope_parameters`` by kind of layer; older ones ``rope_theta`` with
    ``rope_scaling`` for full layers, ``rope_local_base_freq`` for the others.
    """
    kinds = {FULL: config["rope_theta"], SLIDING: config["rope_local_base_freq"]}
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - set(kinds):
        raise _refused(where, f"rope_parameters are not by kind of layer ({', '.join(kinds)}): {given!r}")
    full, local = (
        rope(
            {**config, "rope_theta": theta, "rope_parameters": given.get(kind), "rope_scaling": scaling},
            where,
        )
        for (kind, theta), scaling in zip(kinds.items(), (config.get("rope_scaling"), None), strict=True)
    )
    return full, local


def rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``type`` (default, linear, llama3, yarn), ``theta`` and the numbers of the type.

    linear: ``factor``. llama3: ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position`` (tokens). yarn: ``factor``, ``original_max_position``, ``beta_fast`` and
    ``beta_slow``, and where stated ``attention_factor``, ``mscale``, ``mscale_all_dim``, ``truncate``.

    Args:
        config: fields of config.json with ``max_position_embeddings``.
        where: the file, for messages.

    Raises:
        ModelError: a type we do not support, or values are missing or of a wrong type.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise _refused(where, f"rope parameters differ between layers or are malformed: {given!r}")
    kind = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise _refused(where, f"the rope type {kind!r} is not supported; {nearest(str(kind), _NUMBERS)}")
    rotary = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rotary != 1.0:
        raise _refused(where, f"only a part of each head is rotated (partial_rotary_factor {rotary})")
    theta = given.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    values = dict(given)
    stated = (source.get("original_max_position_embeddings") for source in (config, given))
    original = next((value for value in stated if value is not None), config["max_position_embeddings"])
    values["original_max_position"] = original
    for key in _NUMBERS[kind]:
        if values.get(key) is not None:
            _number(values[key], key, where)
    for key in _OPTIONAL.get(kind, ()):
        if values.get(key) is not None:
            _optional(values[key], key, where)
    if kind == "yarn":
        if not values.get("factor"):
            values["factor"] = config["max_position_embeddings"] / values["original_max_position"]
        values["beta_fast"] = values.get("beta_fast") or 32
        values["beta_slow"] = values.get("beta_slow") or 1
    result: dict[str, Any] = {"type": kind, "theta": _number(theta, "rope_theta", where)}
    for key in _NUMBERS[kind]:
        result[key] = _number(values.get(key), key, where)
    for key in _OPTIONAL.get(kind, ()):
        if (value := values.get(key)) is not None:
            result[key] = value
    return result


def _optional(value: Any, key: str, where: str) -> None:
    if key == "truncate":
        if not isinstance(value, bool):
            raise _refused(where, f"{key} of the rope parameters is {value!r}; true or false is needed")
    elif key not in _MAY_BE_ZERO or isinstance(value, bool) or value != 0:
        _number(value, key, where)


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _refused(where, f"{key} of the rope parameters is {value!r}; a positive number is needed")
    return value


def _refused(where: str, why: str) -> ModelError:
    return ModelError(
        "the model's position embeddings are not supported", where=where, why=why, do="use another model"
    )

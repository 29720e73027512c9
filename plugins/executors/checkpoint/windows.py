"""Which layers see a sliding window only, as each family's config.json says it.

Each rule gives the kind of every layer, ``sliding_attention`` or ``full_attention``, in transformers' words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
Rule = Callable[[Mapping[str, Any]], Sequence[Any]]


def never(config: Mapping[str, Any]) -> Sequence[Any]:
    """Every layer sees everything, whatever is written."""
    return [FULL] * config["num_hidden_layers"]


def every_layer(config: Mapping[str, Any]) -> Sequence[Any]:
    """All layers, where ``sliding_window`` is not null."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config["num_hidden_layers"]


def every_layer_if_used(config: Mapping[str, Any]) -> Sequence[Any]:
    """All layers, where ``use_sliding_window`` says so too."""
    return every_layer(config) if config.get("use_sliding_window") else never(config)


def upper_layers_if_used(config: Mapping[str, Any]) -> Sequence[Any]:
    """With ``use_sliding_window``: by ``layer_types``, or else from layer ``max_window_layers`` on."""
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    if config.get("layer_types") is not None:
        kinds: Sequence[Any] = config["layer_types"]
        return kinds
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return never(config)
    return [SLIDING if i >= first else FULL for i in range(layers)]


def all_but_every_nth(config: Mapping[str, Any]) -> Sequence[Any]:
    """By ``layer_types``, or else every ``sliding_window_pattern``-th layer is full."""
    if config.get("layer_types") is not None:
        kinds: Sequence[Any] = config["layer_types"]
        return kinds
    n = config["sliding_window_pattern"]
    return [SLIDING if n == 0 or (i + 1) % n else FULL for i in range(config["num_hidden_layers"])]


def windows(config: Mapping[str, Any], rule: Rule) -> tuple[int | None, ...]:
    """Per layer the window in tokens, or None; empty where every layer sees everything.

    Raises:
        ValueError: kinds and window contradict each other; the text says how.
    """
    for key in ("max_window_layers", "sliding_window_pattern"):
        if not isinstance(config.get(key, 1), int) or config.get(key, 1) < 0:
            raise ValueError(f"{key} is {config[key]!r}; a number of layers is needed")
    kinds = rule(config)
    if not isinstance(kinds, (list, tuple)):
        raise ValueError(f"layer_types is {kinds!r}; a list is needed")
    if len(kinds) != config["num_hidden_layers"]:
        raise ValueError(f"layer_types has {len(kinds)} entries for {config['num_hidden_layers']} layers")
    if unknown := [kind for kind in kinds if kind not in (SLIDING, FULL)]:
        raise ValueError(f"layer_types has {unknown[0]!r}; supported: {SLIDING}, {FULL}")
    if SLIDING not in kinds:
        return ()
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"layers are {SLIDING}, but sliding_window is {window!r}")
    return tuple(window if kind == SLIDING else None for kind in kinds)

"""The experts of a model, in one spelling out of those that config.json files use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """``experts``, ``experts_per_token``, ``expert_ffn`` and ``dense_layers``, those without experts.

    Args:
        config: with ``num_local_experts`` or ``num_experts``, and ``num_experts_per_tok``. The width is
            ``moe_intermediate_size``, or that of dense layers. A layer has experts if ``decoder_sparse_step``
            divides its number counted from 1, unless ``mlp_only_layers`` names it, counted from 0.

    Raises:
        ValueError: a number is missing or cannot be; the text says which.
    """
    layers, count = config["num_hidden_layers"], config.get("num_experts", config.get("num_local_experts"))
    fields = {
        "num_experts": count,
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "moe_intermediate_size": config.get("moe_intermediate_size", config["intermediate_size"]),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1),
    }
    for key, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} is {value!r}; a positive integer is needed")
    if fields["num_experts_per_tok"] > count:
        raise ValueError(f"num_experts_per_tok is {fields['num_experts_per_tok']}, there are {count} experts")
    only = config.get("mlp_only_layers", ())
    if not isinstance(only, (list, tuple)) or not all(isinstance(i, int) for i in only):
        raise ValueError(f"mlp_only_layers is {only!r}; a list of layers is needed")
    if not isinstance(config.get("norm_topk_prob", True), bool):
        raise ValueError(f"norm_topk_prob is {config['norm_topk_prob']!r}; true or false is needed")
    step = fields["decoder_sparse_step"]
    return {
        "experts": count,
        "experts_per_token": fields["num_experts_per_tok"],
        "expert_ffn": fields["moe_intermediate_size"],
        "dense_layers": tuple(i for i in range(layers) if i in only or (i + 1) % step),
    }

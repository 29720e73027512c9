"""Layers of experts: a router sends each token to a few of many feed-forward networks.

Source: Mixtral of Experts (arXiv 2401.04088); Qwen3 (arXiv 2505.09388). The tokens of one expert go through
it together, one product for each linear of every expert that has tokens.

Deviation: the router's probabilities and the sum over a token's experts stay in float32 or wider, where
transformers rounds to the model's dtype on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from servelab.plugins.executors.torch.mlp import GatedMlp
from servelab.plugins.executors.torch.places import misshapen
from servelab.plugins.executors.torch.shape import DecoderConfig


@dataclass(slots=True)
class Experts:
    """The feed-forward half of a layer of experts."""

    router: Tensor
    """``[experts, hidden]``."""
    parts: Sequence[GatedMlp]
    """The experts."""
    per_token: int
    norm_topk: bool
    """The weights of a token's experts add up to 1; otherwise they are parts of a softmax over all."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in float32 or wider and numbers of each token's experts, both ``[tokens, per_token]``."""
        logits = linear(x, self.router)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, chosen = logits.softmax(-1, dtype=wide).topk(self.per_token, -1)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` to the same."""
        weights, chosen = self.route(x)
        order = chosen.flatten().argsort(stable=True)
        loads = chosen.flatten().bincount(minlength=len(self.parts)).tolist()
        inputs = torch.split(x[order // self.per_token], loads)
        sorted_ = [expert(part) for expert, part in zip(self.parts, inputs, strict=True) if len(part)]
        outputs = x.new_empty(len(order), x.shape[-1]).index_copy_(0, order, torch.cat(sorted_))
        return (outputs.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(x.dtype)


_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(.*\.mlp\.experts\.\d+)\.(w[123])\.weight")
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def by_expert(tensors: Iterable[tuple[str, Tensor]], config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint with those of experts one by one, ``mlp.experts.E.gate_proj.weight``.

    Checkpoints name them so (Qwen3-MoE), as ``block_sparse_moe.experts.E.w1.weight`` (Mixtral: w1 gate, w2
    down, w3 up), or hold those of all experts in one tensor, ``mlp.experts.gate_up_proj`` and ``.down_proj``.

    Raises:
        ModelError: a tensor of all experts has another shape.
    """
    e, f, h = config.experts, config.expert_ffn, config.hidden
    for name, tensor in tensors:
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if match := _EXPERT.fullmatch(name):
            yield f"{match[1]}.{_MIXTRAL[match[2]]}.weight", tensor
        elif match := _FUSED.fullmatch(name):
            shape = (e, 2 * f, h) if match[2] == "gate_up_proj" else (e, h, f)
            if tensor.shape != shape:
                raise misshapen(name, tensor, shape)
            for i, one in enumerate(tensor):
                if match[2] == "gate_up_proj":
                    yield f"{match[1]}.{i}.gate_proj.weight", one[:f]
                    yield f"{match[1]}.{i}.up_proj.weight", one[f:]
                else:
                    yield f"{match[1]}.{i}.down_proj.weight", one
        else:
            yield name, tensor

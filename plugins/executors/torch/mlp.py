"""The gated feed-forward network: one to a dense layer, many to a layer of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn.functional import gelu, silu

from servelab.core.families.quant import LinearOp

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}
"""By their names in config.json."""


@dataclass(slots=True)
class GatedMlp:
    """``down(activation(gate x) * up x)``. Its linears may be exchanged."""

    gate_up: LinearOp
    """``[tokens, hidden] -> [tokens, 2 ffn]``: gate, up."""
    down: LinearOp
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = self.gate_up.apply(self.gate_up.prepare(x)).chunk(2, -1)
        y: Tensor = self.down.apply(self.down.prepare(self.activation(gate) * up))
        return y

    @property
    def parts(self) -> Sequence[GatedMlp]:
        """The networks it is made of: itself."""
        return (self,)

"""Room for the tensors of a checkpoint, made from the model's shape and filled in any order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.torch.linear import DenseLinear


class Places:
    """Tensors by their names in the checkpoint.

    Args:
        dtype: of the tensors, unless another is asked for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._places: dict[str, tuple[Tensor, float]] = {}
        self.nbytes = 0

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None, plus: float = 0.0) -> Tensor:
        """Room for one tensor, to which ``plus`` is added."""
        place = torch.empty(shape, dtype=dtype or self._dtype)
        self._put(name, place, plus)
        return place

    def linear(self, parts: Mapping[str, int], k: int, biased: bool = False) -> DenseLinear:
        """One linear whose rows are those of several in the checkpoint."""
        weight = torch.empty(sum(parts.values()), k, dtype=self._dtype)
        bias = torch.empty(len(weight), dtype=self._dtype) if biased else None
        start = 0
        for name, rows in parts.items():
            self._put(f"{name}.weight", weight[start : start + rows])
            if bias is not None:
                self._put(f"{name}.bias", bias[start : start + rows])
            start += rows
        return DenseLinear(weight, bias)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy each tensor to its place; each is let go.

        Raises:
            ModelError: a tensor is missing, has another shape, or has no place.
        """
        places, self._places = self._places, {}
        for name, tensor in tensors:
            if name not in places:
                raise ModelError(
                    f"the checkpoint holds {name!r}, which this model has no place for",
                    why="it is not of the architecture its config.json names, or the tensor is there twice",
                    do="take a checkpoint of a supported architecture",
                )
            place, plus = places.pop(name)
            if place.shape != tensor.shape:
                raise misshapen(name, tensor, place.shape)
            place.copy_(tensor)
            if plus:
                place.add_(plus)
        if places:
            shown = ", ".join(sorted(places)[:3])
            raise ModelError(
                f"{len(places)} tensors are missing in the checkpoint",
                why=f"not found: {shown}{', ...' if len(places) > 3 else ''}",
                do="fetch the weights again; adapters and partial checkpoints cannot be served alone",
            )

    def _put(self, name: str, place: Tensor, plus: float = 0.0) -> None:
        self._places[name] = (place, plus)
        self.nbytes += place.nbytes


def misshapen(name: str, tensor: Tensor, wanted: Iterable[int]) -> ModelError:
    """A tensor that does not fit the shape its config.json states."""
    return ModelError(
        f"tensor {name!r} is {list(tensor.shape)}",
        why=f"by config.json it must be {list(wanted)}",
        do="config.json and weights are of different models: fetch both again",
    )

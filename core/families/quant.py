"""Quantizer: formats of weights and activations.

Intent: turn a model's linear layers into cheaper ones and say what that does to bytes and arithmetic. Two
halves: this description, free of torch, tells the simulator each linear's format and cost; ``load`` imports
the half that transforms, calibrates, packs and runs.

What must be expressible: per-layer formats and groups, refused where they do not divide; two scale levels,
integer or float zeros, permutations, bit slices (nested, planes, split storage); exact folds over graph
roles; calibration from statistics, whole inputs, re-run modules or gradients; per-token and per-block
activation widths; an input prepared once for several linears; weights that are partly resident and loaded
slice by slice.

Capabilities: ``quant.weights`` (packs linear weights), ``quant.activations`` (quantizes their inputs),
``quant.calibrated`` (needs data), ``quant.gradients`` (needs a backward pass), ``quant.transform`` (exact
folds), ``quant.permutes`` (reorders input channels), ``quant.online_ops`` (adds work before a linear),
``quant.nested`` (serves several widths from one store), ``quant.streams`` (weights are not all resident).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from servelab.core.facts import HardwareFacts, ModelFacts
    from servelab.core.families.kernel import OpCost

Role = Literal[
    "q", "k", "v", "o", "gate", "up", "down", "expert_gate", "expert_up", "expert_down", "head", "other"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSite:
    """One linear layer, ``y = x W^T``, and its place in the graph."""

    name: str
    layer: int
    """-1 outside the stack."""
    role: Role
    n: int
    """Outputs."""
    k: int
    """Inputs; groups run along it."""
    producer: str | None = None
    """Norm or linear whose output feeds it and may absorb a scale; None: nothing can."""
    shares_input: tuple[str, ...] = ()
    """Other linears that read the same input."""
    inspected: str | None = None
    """Smallest module around it whose output error makes sense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleLevel:
    """One level of scales, outermost first."""

    group: int | None
    """Inputs per scale; None: one per output."""
    bits: int = 16
    zero_bits: int = 0
    """Bits of the zero stored with each scale; 0: symmetric."""
    zero: Literal["none", "int", "float", "after_scale"] = "none"

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group has at least 1 input, not {self.group}")
        if (self.zero == "none") != (self.zero_bits == 0):
            raise ValueError(f"zero {self.zero!r} with {self.zero_bits} bits")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFormat:
    """A backend-neutral format; kernels say which they run."""

    kind: Literal["int", "float", "ternary", "codebook"]
    bits: float
    """Stored bits per weight, scales apart; 1.6 for five trits in a byte."""
    scales: tuple[ScaleLevel, ...] = ()
    slices: tuple[float, ...] = ()
    """Bits of each slice, most significant first (nested codes, planes, 4+2); empty: one."""
    act_bits: int = 16
    act_per: Literal["tensor", "token", "group", "block"] = "token"
    act_static: bool = False
    high_blocks: float = 0.0
    """With ``act_per="block"``: share of input blocks kept at 8 bits."""

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 64:
            raise ValueError(f"{self.bits} bits per weight")
        if self.slices and abs(sum(self.slices) - self.bits) > 1e-9:
            raise ValueError(f"slices {self.slices} do not add up to {self.bits} bits")
        if not 0.0 <= self.high_blocks <= 1.0:
            raise ValueError(f"high_blocks is a share, not {self.high_blocks}")

    @property
    def bytes_per_weight(self) -> float:
        """Codes, scales and zeros; scales per output are not counted."""
        return self.bits / 8 + sum((s.bits + s.zero_bits) / 8 / s.group for s in self.scales if s.group)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a weight ``[n, k]``: codes, and every scale and zero, those per output included."""
        levels = sum((s.bits + s.zero_bits) * (k // s.group if s.group else 1) for s in self.scales)
        return ceil(n * (self.bits * k + levels) / 8)

    def __str__(self) -> str:
        """As papers write it: ``w4a8 g64``; the innermost group."""
        groups = [s.group for s in self.scales if s.group]
        return f"w{self.bits:g}a{self.act_bits}" + (f" g{groups[-1]}" if groups else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantCaps:
    """What a quantizer needs and promises."""

    calibration: Literal["none", "statistics", "inputs", "gradients"] = "none"
    graph_roles: bool = False
    """Needs producers and siblings of each linear."""
    exact_fold: bool = True
    """Its transform leaves unquantized logits unchanged."""
    batch_invariant: bool = True
    """A token's result does not depend on the batch."""
    hardware: frozenset[str] = frozenset()
    """Units it needs, such as ``int4_mma``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QTensor:
    """A packed weight. Tensors are the executor's; ``packing`` names the order of codes."""

    format: WeightFormat
    shape: tuple[int, int]
    """``(n, k)``."""
    codes: tuple[Any, ...]
    """One per slice."""
    scales: tuple[Any, ...] = ()
    zeros: tuple[Any, ...] = ()
    permutation: Any = None
    """int32 ``[k]``: input channel at each packed place."""
    group_index: Any = None
    """int32 ``[k]``: group of each input, where groups are not consecutive."""
    packing: str = "canonical"

    def __post_init__(self) -> None:
        if len(self.codes) != max(1, len(self.format.slices)):
            raise ValueError(f"{len(self.codes)} code tensors for slices {self.format.slices}")
        if len(self.scales) != len(self.format.scales):
            raise ValueError(f"{len(self.scales)} scale tensors for {len(self.format.scales)} levels")


@dataclass(frozen=True, slots=True)
class Load:
    """One slice of one weight, to be fetched or dropped."""

    name: str
    slice: int
    bytes: int


class Recorder(Protocol):
    """Calibration data, gathered by the executor."""

    def statistic(self, site: str, name: str) -> Any:
        """``absmax``, ``mean_abs`` ``[k]``, ``gram`` ``[k, k]`` over all batches."""
        ...

    def inputs(self, site: str) -> Any:
        """``[tokens, k]`` seen by a linear, from the unquantized model."""
        ...

    def rerun(self, module: str, overrides: Mapping[str, Any]) -> Any:
        """Output of a module on its recorded inputs with some weights replaced."""
        ...

    def gradients(self, site: str) -> Any:
        """``[tokens, n]`` of the loss by the linear's output."""
        ...


class LinearOp(Protocol):
    """A quantized linear. It has no cost of its own: the simulator prices formats, see ``Quantizer.cost``."""

    nbytes: int
    """Bytes it holds for its weights: codes, scales, zeros and tables; biases apart."""

    def prepare(self, x: Any) -> Any:
        """Quantize, rotate or tabulate ``x [tokens, k]``; done once for all linears that share the input."""
        ...

    def apply(self, prepared: Any) -> Any:
        """``[tokens, n]``, in the dtype of ``x``."""
        ...


class QuantizerImpl(Protocol):
    """The half with tensors; may import torch. ``CalibratedImpl`` and ``TransformingImpl`` do more."""

    def pack(self, site: LinearSite, weight: Any, bias: Any, state: Any) -> QTensor:
        """``weight [n, k]`` in the format of its site; the same for the same arguments.

        Args:
            site: the linear.
            weight: in the model's dtype; not to be kept, the executor lets it go.
            bias: ``[n]`` or None.
            state: what ``calibrate`` returned; None without calibration.
        """
        ...

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> LinearOp:
        """One operation for linears of one format that share their input (q, k and v; gate and up).

        Its output is theirs side by side, ``[tokens, sum of n]``, in the order given. The tensors are its
        own from then on.
        """
        ...


class CalibratedImpl(QuantizerImpl, Protocol):
    """With ``quant.calibrated`` or ``quant.gradients``."""

    def calibrate(self, graph: Any, batches: Iterable[Any], recorder: Recorder) -> Any:
        """The state that ``pack`` gets; depends only on its arguments and the plugin's seed."""
        ...


class TransformingImpl(QuantizerImpl, Protocol):
    """With ``quant.transform``."""

    def transform(self, graph: Any) -> None:
        """Exact folds, in float64 where it matters; runs before calibration and those of a KV codec."""
        ...


class WeightStore(Protocol):
    """Residency of weights, with ``quant.nested`` or ``quant.streams``."""

    def resident_bits(self, name: str) -> float: ...

    def set_bits(self, bits: Mapping[str, float]) -> None:
        """Serve these weights at these widths from the next launch on."""
        ...

    def plan_loads(self, tokens: Mapping[str, Mapping[float, int]]) -> Sequence[Load]:
        """Fetch order for a layer: weight -> width -> tokens that want it. Prefix-closed in slices."""
        ...

    def loaded(self, load: Load) -> None: ...

    def drop(self, nbytes: int) -> Sequence[Load]:
        """Slices to give up, highest first, at least ``nbytes`` if there are as many."""
        ...


class Quantizer(Protocol):
    """The torch-free half."""

    caps: QuantCaps

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        """None: stays as it is.

        Raises:
            ConfigError: the group does not divide ``site.k``; never pads.
        """
        ...

    def refuses(self, format: WeightFormat, n: int, k: int, hardware: HardwareFacts | None) -> str | None:
        """Why its own operation (``QuantizerImpl.linear``) cannot run this format, or None. Asked for every
        weight when a run is composed: a format that nobody runs is refused there.
        """
        ...

    def cost(
        self, site: LinearSite, tokens: int, model: ModelFacts, hardware: HardwareFacts | None
    ) -> OpCost:
        """``prepare`` (an even share of it, where shared) and ``apply``, as a kernel for the format would
        do them: packed weights are read once, nothing is unpacked to memory.
        """
        ...

    def load(self) -> QuantizerImpl:
        """Import and build the other half."""
        ...


class StreamingQuantizer(Quantizer, Protocol):
    """With ``quant.nested`` or ``quant.streams``."""

    def store(self, sites: Sequence[LinearSite], budget_bytes: int) -> WeightStore:
        """The store the executor asks before each layer; torch-free."""
        ...

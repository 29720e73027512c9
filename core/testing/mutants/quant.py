"""Quantizers broken on purpose. ``Groups`` is a good one: 4 bits in groups, rounded to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servelab.core.context import Context
from servelab.core.errors import ConfigError
from servelab.core.facts import HardwareFacts, ModelFacts
from servelab.core.families.kernel import OpCost
from servelab.core.families.quant import LinearSite, QTensor, QuantCaps, ScaleLevel, WeightFormat
from servelab.core.spec import PluginSpec
from servelab.core.testing.mutants import Mutant

GROUP = 32
FORMAT = WeightFormat(kind="int", bits=4, scales=(ScaleLevel(group=GROUP, bits=32, zero_bits=8, zero="int"),))


def _spec(name: str) -> PluginSpec:
    return PluginSpec(
        name=name, factory=f"{__name__}:Groups", summary="a toy", provides=frozenset({"quant.weights"})
    )


class Groups:
    """Takes no settings. Each part of the arithmetic is a method, so that a mutant can change one."""

    spec = _spec("groups")
    caps = QuantCaps(batch_invariant=False)

    def __init__(self, config: None, context: Context) -> None:
        pass

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        if site.role == "head":
            return None
        if site.k % GROUP:
            raise ConfigError(f"groups of {GROUP} do not divide the {site.k} inputs of {site.name}")
        return FORMAT

    def refuses(self, format: WeightFormat, n: int, k: int, hardware: HardwareFacts | None) -> str | None:
        if format != FORMAT:
            return f"it runs {FORMAT} only"
        return f"{k} inputs are no multiple of {GROUP}" if k % GROUP else None

    def cost(
        self, site: LinearSite, tokens: int, model: ModelFacts, hardware: HardwareFacts | None
    ) -> OpCost:
        moved = FORMAT.nbytes(site.n, site.k) + round(tokens * (site.n + site.k) * model.dtype_bytes)
        return OpCost(flops=2 * tokens * site.n * site.k, device_bytes=moved)

    def load(self) -> Any:
        return self

    # ------------------------------------------------------ the half with tensors

    def pack(self, site: LinearSite, weight: Any, bias: Any, state: None) -> QTensor:
        grouped = self.grouped(weight.float())
        low, high = grouped.amin(2, keepdim=True).clamp(max=0), grouped.amax(2, keepdim=True).clamp(min=0)
        scale = (high - low).clamp(min=1e-5) / 15
        zero = (-low / scale).round()
        codes = ((grouped / scale).round() + zero).clamp(0, 15).flatten(1).byte()
        return QTensor(
            format=FORMAT,
            shape=(site.n, site.k),
            codes=(codes[:, ::2] | (codes[:, 1::2] << 4),),
            scales=(scale.flatten(1).clone(),),
            zeros=(zero.flatten(1).char(),),
        )

    def grouped(self, weight: Any) -> Any:
        """``[n, k / GROUP, GROUP]``."""
        return weight.unflatten(1, (-1, GROUP))

    def unpacked(self, tensor: QTensor) -> Any:
        """Codes ``[n, k / GROUP, GROUP]``, less their zeros."""
        (packed,), (zero,) = tensor.codes, tensor.zeros
        codes = packed.new_empty(*tensor.shape)
        codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
        return codes.float().unflatten(1, (-1, GROUP)) - zero[..., None]

    def weight(self, tensor: QTensor) -> Any:
        """``[n, k]``, what the packed numbers stand for."""
        return (self.unpacked(tensor) * tensor.scales[0][..., None]).flatten(1)

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        return Product(self, tensors, biases)


class Product:
    """The operation: unpacks when it is applied."""

    def __init__(self, plugin: Groups, tensors: Sequence[QTensor], biases: Sequence[Any]) -> None:
        self._plugin, self.tensors, self.biases = plugin, tensors, biases
        parts = [part for t in tensors for part in (*t.codes, *t.scales, *t.zeros)]
        self.nbytes = sum(part.numel() * part.element_size() for part in parts)

    def prepare(self, x: Any) -> Any:
        return x

    def apply(self, prepared: Any) -> Any:
        x, outputs = prepared, sum(t.shape[0] for t in self.tensors)
        y, first = x.new_empty(len(x), outputs), 0
        for tensor, bias in zip(self.tensors, self.biases, strict=True):
            at = slice(first, first := first + tensor.shape[0])
            y[:, at] = x @ self._plugin.weight(tensor).to(x.dtype).T
            if bias is not None:
                y[:, at] += bias
        return y


# ------------------------------------------------------------------ broken


class WrongAxis(Groups):
    spec = _spec("wrong_axis")

    def pack(self, site: LinearSite, weight: Any, bias: Any, state: None) -> QTensor:
        grouped = weight.float().unflatten(1, (-1, GROUP))
        largest = grouped.abs().amax((0, 2), keepdim=True)  # over the outputs too
        padded = grouped.clone()
        padded[:, :, 0], padded[:, :, 1] = largest[..., 0], -largest[..., 0]
        good = super().pack(site, padded.flatten(1), bias, state)
        scale, zero = good.scales[0][..., None], good.zeros[0][..., None]
        codes = ((grouped / scale).round() + zero).clamp(0, 15).flatten(1).byte()
        return QTensor(
            format=FORMAT,
            shape=good.shape,
            codes=(codes[:, ::2] | (codes[:, 1::2] << 4),),
            scales=good.scales,
            zeros=good.zeros,
        )


class ForgetsZeros(Groups):
    spec = _spec("forgets_zeros")

    def unpacked(self, tensor: QTensor) -> Any:
        return super().unpacked(tensor) + tensor.zeros[0][..., None] - 8  # as if all were symmetric


class GroupsOffByOne(Groups):
    spec = _spec("groups_off_by_one")

    def weight(self, tensor: QTensor) -> Any:
        good = super().weight(tensor)
        scale, codes = tensor.scales[0], self.unpacked(tensor)
        # the first input of each group takes the scale of the group before
        wrong = (codes[:, 1:, 0] * scale[:, :-1]).to(good.dtype)
        good[:, GROUP::GROUP] = wrong
        return good


class WastesABit(Groups):
    spec = _spec("wastes_a_bit")

    def pack(self, site: LinearSite, weight: Any, bias: Any, state: None) -> QTensor:
        good = super().pack(site, weight, bias, state)
        coarse = (good.codes[0] & 0b11101110) + 0b00010001  # only odd codes
        return QTensor(format=FORMAT, shape=good.shape, codes=(coarse,), scales=good.scales, zeros=good.zeros)


class ChangesWeights(Groups):
    spec = _spec("changes_weights")

    def pack(self, site: LinearSite, weight: Any, bias: Any, state: None) -> QTensor:
        return super().pack(site, weight.clamp_(-0.15, 0.15), bias, state)


class LiesAboutBytes(Groups):
    spec = _spec("lies_about_bytes")

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        op = super().linear(sites, tensors, biases, device)
        op.dense = [self.weight(t) for t in tensors]  # type: ignore[attr-defined]
        return op


class PadsGroups(Groups):
    spec = _spec("pads_groups")

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        return None if site.role == "head" else FORMAT


class AddsBiasToAll(Groups):
    spec = _spec("adds_bias_to_all")

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        given = next((bias for bias in biases if bias is not None), None)
        if given is not None:
            biases = [given.repeat(-(-t.shape[0] // len(given)))[: t.shape[0]] for t in tensors]
        return super().linear(sites, tensors, biases, device)


class JoinsBackwards(Groups):
    spec = _spec("joins_backwards")

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        return super().linear(sites[::-1], tensors[::-1], biases[::-1], device)


class OneScaleForAllTokens(Groups):
    """Claims int8 inputs, with one scale for the whole batch."""

    spec = _spec("one_scale_for_all_tokens")

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        return OneScale(self, tensors, biases)


class OneScale(Product):
    def prepare(self, x: Any) -> Any:
        if not len(x):
            return x
        scale = x.abs().amax().clamp(min=1e-5) / 127
        return (x / scale).round() * scale


class ComputesInHalf(Groups):
    spec = _spec("computes_in_half")

    def weight(self, tensor: QTensor) -> Any:
        return super().weight(tensor).half()

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> Product:
        return InHalf(self, tensors, biases)


class InHalf(Product):
    def prepare(self, x: Any) -> Any:
        return x.half().to(x.dtype)


class DescribesWithTorch(Groups):
    spec = _spec("describes_with_torch")

    def cost(
        self, site: LinearSite, tokens: int, model: ModelFacts, hardware: HardwareFacts | None
    ) -> OpCost:
        __import__("torch")
        return super().cost(site, tokens, model, hardware)


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="quant",
        plugin=plugin,
        original=Groups,
        check=check,
        message=message,
        breaks=breaks,
        requires=("torch",),
    )


MUTANTS = (
    _mutant(
        WrongAxis,
        "test_each_output_has_its_own_scale",
        "take the scale over the inputs of one output",
        "takes the scale of a group over all outputs",
    ),
    _mutant(
        ForgetsZeros,
        "test_products_are_as_close_as_the_bits_allow",
        "compare what codes, scales and zeros stand for with the weight",
        "unpacks with the zero in the middle, whatever zero is stored",
    ),
    _mutant(
        GroupsOffByOne,
        "test_groups_begin_where_they_should",
        "check where groups begin and end",
        "gives the first input of a group the scale of the group before",
    ),
    _mutant(
        WastesABit,
        "test_products_are_as_close_as_the_bits_allow",
        "signal to noise",
        "uses every other code only: 3 bits stored in 4",
    ),
    _mutant(
        ChangesWeights,
        "test_weights_given_are_left_alone",
        "changes the weight it is given",
        "clips the weight in place",
    ),
    _mutant(
        LiesAboutBytes,
        "test_stored_bytes_are_the_formats",
        "keep no unpacked copy",
        "keeps an unpacked copy that nbytes does not count",
    ),
    _mutant(
        PadsGroups,
        "test_formats_fit_the_linears",
        "the last group would be short",
        "gives a format whose groups do not divide the inputs",
    ),
    _mutant(
        AddsBiasToAll,
        "test_biases",
        "give linears without a bias zeros when joining",
        "adds the bias of one joined linear to the others too",
    ),
    _mutant(
        JoinsBackwards,
        "test_joined_linears_equal_separate_ones",
        "in the order of the sites",
        "joins the outputs of q, k and v in reverse",
    ),
    _mutant(
        OneScaleForAllTokens,
        "test_rows_do_not_depend_on_the_batch",
        "quantize each token with a scale of its own",
        "quantizes the inputs of all tokens with one scale",
    ),
    _mutant(
        ComputesInHalf,
        "test_products_are_those_of_one_weight",
        "compute in the dtype of the inputs or wider",
        "rounds inputs and weights to half precision",
    ),
    _mutant(
        DescribesWithTorch,
        "test_describing_needs_no_tensors",
        "imports torch while it describes itself",
        "imports torch to price a product",
    ),
)

"""Conformance of quantizers: formats, bytes, and the products of packed weights against the dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import OpCost
from servelab.core.families.quant import WeightFormat
from servelab.core.sites import linear_sites
from servelab.core.testing.linears import DENSE, MODELS, ODD, LinearBench, floor_db
from servelab.core.testing.tensors import check_describes_without_tensors, decibels, modules_of, torch_or_skip

NOBODYS = WeightFormat(kind="codebook", bits=13.0, act_bits=11)
"""A format that no operation runs."""


class QuantSuite(LinearBench):
    """What is true of every quantizer.

    A quantizer that needs calibration says in ``state`` what its ``pack`` is to get.
    """

    # ------------------------------------------------------- without tensors

    def test_describing_needs_no_tensors(self) -> None:
        """Building it, its formats, refusals and costs import no tensor library."""

        def describe() -> None:
            quantizer = self.make(model=DENSE)
            for site, format in self._formats(quantizer, DENSE):
                quantizer.refuses(format, site.n, site.k, None)
                quantizer.cost(site, 3, DENSE, None)

        check_describes_without_tensors(self, modules_of(self), describe)

    def test_formats_fit_the_linears(self) -> None:
        """For each linear of a dense model, one of experts and one of odd sizes: a format that divides its
        inputs and that its own operation runs, None, or ConfigError; the same when asked again.
        """
        for model in MODELS:
            quantizer = self.make(model=model)
            for site, format in self._formats(quantizer, model, refusable=model is ODD):
                again = quantizer.format(site, model)
                if again != format:
                    self.fail(
                        f"{self.name}: format() of {site.name} in model {model.name!r} answers {format} and "
                        f"then {again}",
                        rule="the format of a linear follows from the linear, the model and the settings",
                        do="keep no state between calls of format()",
                    )
                for level in format.scales:
                    if level.group and site.k % level.group:
                        self.fail(
                            f"{self.name}: groups of {level.group} for {site.name} of model {model.name!r}, "
                            f"which has {site.k} inputs: the last group would be short",
                            rule="ConfigError: the group does not divide site.k; never pads",
                            do="choose a group that divides site.k, or raise ConfigError in format()",
                        )
                if reason := quantizer.refuses(format, site.n, site.k, None):
                    self.fail(
                        f"{self.name} gives {site.name} the format {format} and refuses it: {reason}",
                        rule="refuses: why its own operation cannot run this format, or None",
                        do="make format() and refuses() agree",
                    )

    def test_refuses_what_it_cannot_run(self) -> None:
        """Foreign formats, and sizes that its groups do not divide, are refused with a sentence."""
        quantizer = self.make(model=DENSE)
        cases = [(NOBODYS, 128, 128, "a format of nobody's")]
        for site, format in self._formats(quantizer, DENSE):
            group = next((level.group for level in format.scales if level.group), None)
            if group:
                cases.append((format, site.n, site.k + group // 2, f"inputs that are no multiple of {group}"))
        for format, n, k, why in cases:
            reason = quantizer.refuses(format, n, k, None)
            if not isinstance(reason, str) or not reason.strip():
                self.fail(
                    f"{self.name} does not refuse {why}: refuses({format}, n={n}, k={k}) is {reason!r}",
                    rule="refuses: why its own operation cannot run this format, or None",
                    do="answer with a sentence for every format and size that linear() does not run",
                )

    def test_cost_counts_the_packed_weights(self) -> None:
        """A product reads the packed weight once, computes 2 n k per token, and never costs less for more."""
        quantizer = self.make(model=DENSE)
        for site, format in self._formats(quantizer, DENSE):
            before = OpCost()
            for tokens in (1, 2, 64):
                cost = quantizer.cost(site, tokens, DENSE, None)
                rule = "cost: prepare and apply as a kernel for the format would do them"
                if cost.device_bytes < format.nbytes(site.n, site.k):
                    self.fail(
                        f"{self.name}: {tokens} tokens of {site.name} cost {cost.device_bytes} bytes, its "
                        f"weights alone have {format.nbytes(site.n, site.k)}",
                        rule=f"{rule}: packed weights are read once",
                        do="count format.nbytes(n, k) and the inputs and outputs",
                    )
                if cost.flops < 2 * tokens * site.n * site.k:
                    self.fail(
                        f"{self.name}: {tokens} tokens of {site.name} cost {cost.flops} operations, the "
                        f"product has {2 * tokens * site.n * site.k}",
                        rule=rule,
                        do="count 2 n k operations for each token",
                    )
                if cost.flops < before.flops or cost.device_bytes < before.device_bytes:
                    self.fail(
                        f"{self.name}: {site.name} costs less for {tokens} tokens than for fewer",
                        rule=rule,
                        do="make cost() grow with the tokens",
                    )
                before = cost

    # ---------------------------------------------------------------- bytes

    def test_stored_bytes_are_the_formats(self) -> None:
        """What ``pack`` stores is what the format says, and ``nbytes`` of the operation is what it holds."""
        quantizer, impl = self._loaded()
        for site, format in self._some(quantizer):
            tensor = self._pack(impl, site, self._weights(site), format=format)
            parts = [*tensor.codes, *tensor.scales, *tensor.zeros]
            stored = sum(part.numel() * part.element_size() for part in parts)
            stated = format.nbytes(site.n, site.k)
            if stored != stated:
                self.fail(
                    f"{self.name}: {site.name} ({site.n} x {site.k}) is stored in {stored} bytes, its format "
                    f"{format} states {stated}",
                    rule="WeightFormat.nbytes: codes, and every scale and zero",
                    do="store codes, scales and zeros at the format's widths, or state the widths stored",
                )
            op = impl.linear([site], [tensor], [None], self.device)
            held = _bytes_of(op)
            # small per-output tables are nobody's concern
            if not stated <= op.nbytes <= max(held, stated) or op.nbytes + 8 * site.n + held // 20 < held:
                self.fail(
                    f"{self.name}: the operation of {site.name} says it holds {op.nbytes} bytes, it holds "
                    f"{held}, and codes, scales and zeros have {stated}",
                    rule="LinearOp.nbytes: bytes it holds for its weights: codes, scales, zeros and tables",
                    do="count every tensor the operation keeps, and keep no unpacked copy",
                )

    # ------------------------------------------------------------- products

    def test_products_are_as_close_as_the_bits_allow(self) -> None:
        """Products equal the dense ones up to the noise that the format's bits and group leave."""
        quantizer, impl = self._loaded()
        for site, format in self._some(quantizer):
            weight, x = self._weights(site), self._inputs(48, site.k)
            got = self._product(self._op(impl, [site], [weight]), x, site)
            self._close(got, x @ weight.T, format, site, "normal weights and inputs")

    def test_products_are_those_of_one_weight(self) -> None:
        """Without quantized inputs, a product is the input times the weight that single inputs show, as
        precisely as the dtype allows.
        """
        tried = 0
        for dtype in self.dtypes:
            quantizer, impl = self._loaded(dtype)
            for site, format in self._some(quantizer):
                if format.act_bits < 16:
                    continue
                tried += 1
                op = self._op(impl, [site], [self._weights(site)])
                shown = self._product(op, torch_or_skip().eye(site.k, dtype=self._dtype), site)
                for tokens in (1, 48):
                    x = self._inputs(tokens, site.k)
                    self._same(
                        self._product(op, x, site),
                        (x.double() @ shown.double()).to(self._dtype),
                        f"{self.name}: {tokens} tokens of {site.name} in {dtype}: no product with one weight",
                        rule="act_bits=16: inputs are taken as they are; apply: in the dtype of x",
                        do="compute in the dtype of the inputs or wider, the same for few and many tokens",
                    )
        if not tried:
            pytest.skip(f"{self.name} quantizes inputs too")

    def test_each_output_has_its_own_scale(self) -> None:
        """Outputs a million times smaller than others are as precise as those."""
        quantizer, impl = self._loaded()
        torch = torch_or_skip()
        for site, format in self._some(quantizer):
            weight = self._weights(site) * torch.logspace(-3, 3, site.n, dtype=torch.float64)[:, None].to(
                self._dtype
            )
            x = self._inputs(32, site.k)
            got, want = self._product(self._op(impl, [site], [weight]), x, site), x @ weight.T
            for row in range(0, site.n, max(1, site.n // 8)):
                self._close(
                    got[:, row],
                    want[:, row],
                    format,
                    site,
                    f"output {row}, of weights around {float(weight[row].abs().mean()):.0e}",
                    rule="weight [n, k], y = x W^T: scales are per output, groups run along the inputs",
                    do="take the scale over the inputs of one output (dim=1 of [n, k]), not over outputs",
                    margin=3.0,
                )

    def test_groups_begin_where_they_should(self) -> None:
        """Groups of small weights beside groups of large ones stay precise: no group takes in a neighbour."""
        if self.provides("quant.permutes"):
            pytest.skip(f"{self.name} reorders inputs, so its groups are not consecutive")
        quantizer, impl = self._loaded()
        torch, tried = torch_or_skip(), 0
        for site, format in self._some(quantizer):
            group = next((level.group for level in reversed(format.scales) if level.group), None)
            if group is None or group >= site.k:
                continue
            tried += 1
            # several levels share a scale per output: its integers must still tell small groups apart
            ratio = 0.25 if len(format.scales) > 1 else 0.01
            small = torch.arange(site.k) // group % 2 == 1
            weight = self._weights(site) * torch.where(small, ratio, 1.0).to(self._dtype)
            op = self._op(impl, [site], [weight])
            for first in range(0, site.k, group):
                x = torch.zeros(16, site.k, dtype=self._dtype)
                x[:, first : first + group] = self._inputs(16, group)
                self._close(
                    self._product(op, x, site),
                    x @ weight.T,
                    format,
                    site,
                    f"inputs {first} to {first + group - 1}, one group of {group}",
                    rule="groups run along the inputs: group i has inputs i g to (i + 1) g - 1",
                    do="check where groups begin and end, and which scale belongs to which input",
                    margin=3.0,
                )
        if not tried:
            pytest.skip(f"{self.name} has no groups within an output")

    def test_ranges_away_from_zero(self) -> None:
        """Groups of weights that are nearly all above zero come back as well."""
        quantizer, impl = self._loaded()
        for site, format in self._some(quantizer):
            spread = self._weights(site)
            weight = spread + 0.75 * float(spread.abs().max())
            group = next((level.group for level in reversed(format.scales) if level.group), site.k)
            weight[:, ::group] = -0.25 * float(spread.abs().max())  # 0 is within every group
            x = self._inputs(32, site.k)
            got, want = self._product(self._op(impl, [site], [weight]), x, site), x @ weight.T
            self._close(
                got,
                want,
                format,
                site,
                "weights whose mean is far from zero",
                rule="a format with zeros stores the zero of each group and subtracts it",
                do="compute the zero from the group's minimum, and subtract it when unpacking",
            )

    def test_zeros_and_outliers(self) -> None:
        """Zero rows give zeros (or their bias), a huge weight spoils its own output only, nothing is NaN."""
        quantizer, impl = self._loaded()
        for site, format in self._some(quantizer):
            weight, x = self._weights(site), self._inputs(24, site.k)
            weight[0] = 0
            weight[1, site.k // 2] = 1e4
            x[3] = 0
            got, want = self._product(self._op(impl, [site], [weight]), x, site), x @ weight.T
            if not bool(got.isfinite().all()):
                self.fail(
                    f"{self.name}: {site.name} with a row of zeros and one huge weight gives NaN or infinity",
                    rule="a linear of finite weights and inputs is finite",
                    do="keep scales above zero (clamp the range before dividing by it)",
                )
            if bool(got[:, 0].any()) or bool(got[3].any()):
                self.fail(
                    f"{self.name}: {site.name} gives {float(got[:, 0].abs().max()):.3g} for an output whose "
                    f"weights are all 0, or {float(got[3].abs().max()):.3g} for an input of zeros",
                    rule="zeros stay zeros",
                    do="make a code for exactly 0 (a zero point within the codes)",
                )
            self._close(
                got[:, 2:], want[:, 2:], format, site, "the other outputs of a weight with an outlier in one"
            )
            # the outlier itself is its group's largest: it has full precision
            alone = x.clone()
            alone[:] = 0
            alone[:, site.k // 2] = 1
            got = self._product(self._op(impl, [site], [weight]), alone, site)[:, 1]
            if not bool(((got - 1e4).abs() <= 1e4 * 2.0 ** (1 - min(format.bits, 8))).all()):
                self.fail(
                    f"{self.name}: a weight of 1e4 among ones of 0.05 comes back as {float(got[0]):.4g}",
                    rule="the largest weight of a group has the precision of its bits",
                    do="choose the range from the largest weight, or state in a deviation that it is clipped",
                )

    def test_biases(self) -> None:
        """A bias is added once, to its own output; linears without one, beside others with, get none."""
        quantizer, impl = self._loaded()
        for site, _ in self._some(quantizer):
            weight, x = self._weights(site), self._inputs(5, site.k)
            bias = self._inputs(1, site.n)[0] * 10
            plain = self._product(self._op(impl, [site], [weight]), x, site)
            self._same(
                self._product(self._op(impl, [site], [weight], [bias]), x, site),
                plain + bias,
                f"{self.name}: {site.name} with a bias is not the product plus the bias",
                rule="biases: [n] or None, added to the product",
                do="add the bias after scaling, once, in the order of the outputs",
            )
        for sites in self._joined(quantizer):
            weights, x = [self._weights(site) for site in sites], self._inputs(5, sites[0].k)
            biases = [self._inputs(1, s.n)[0] * 10 if i % 2 else None for i, s in enumerate(sites)]
            parts = [
                self._product(self._op(impl, [s], [w], [b]), x, s)
                for s, w, b in zip(sites, weights, biases, strict=True)
            ]
            self._same(
                self._product(self._op(impl, sites, weights, biases), x, *sites),
                parts[0].new_empty(0) if not parts else _beside(parts),
                f"{self.name}: joined linears, some with a bias, differ from the same apart",
                rule="one operation for linears that share their input: outputs side by side, in order",
                do="give linears without a bias zeros when joining",
            )

    def test_joined_linears_equal_separate_ones(self) -> None:
        """q, k and v, or gate and up, as one operation give what they give apart, side by side."""
        quantizer, impl = self._loaded()
        groups = self._joined(quantizer)
        if not groups:
            pytest.skip(f"{self.name} quantizes no linears that share an input")
        for sites in groups:
            weights, x = [self._weights(s, i) for i, s in enumerate(sites)], self._inputs(7, sites[0].k)
            parts = [
                self._product(self._op(impl, [s], [w]), x, s) for s, w in zip(sites, weights, strict=True)
            ]
            self._same(
                self._product(self._op(impl, sites, weights), x, *sites),
                _beside(parts),
                f"{self.name}: {', '.join(s.role for s in sites)} joined differ from the same apart",
                rule="its output is theirs side by side, [tokens, sum of n], in the order given",
                do="join codes, scales and zeros along the outputs, in the order of the sites",
            )

    def test_sizes_that_nothing_divides(self) -> None:
        """One output, prime numbers of outputs and tokens, no tokens at all."""
        quantizer, impl = self._loaded()
        template, _ = self._some(quantizer)[0]
        for n in (1, 7, 33):
            site = replace(template, name=f"linear_{n}", n=n, shares_input=())
            if (format := quantizer.format(site, self._model)) is None:
                continue
            weight = self._weights(site)
            op = self._op(impl, [site], [weight])
            single = torch_or_skip().eye(site.k, dtype=self._dtype)
            self._close(self._product(op, single, site), weight.T, format, site, "one input at a time")
            for tokens in (0, 1, 13):
                if not bool(self._product(op, self._inputs(tokens, site.k), site).isfinite().all()):
                    self.fail(
                        f"{self.name}: {tokens} tokens of a linear of {n} outputs give NaN or infinity",
                        rule="apply: [tokens, n], for any number of tokens and outputs",
                        do="look for kernels that want a multiple of some number, and pad or go around them",
                    )

    def test_dtypes(self) -> None:
        """Each dtype gives outputs of its own dtype, as close as the format allows."""
        for dtype in self.dtypes:
            quantizer, impl = self._loaded(dtype)
            for site, format in self._some(quantizer)[:2]:
                weight, x = self._weights(site).to(self._dtype), self._inputs(24, site.k)
                got = self._product(self._op(impl, [site], [weight]), x, site)
                self._close(got, x.double() @ weight.double().T, format, site, dtype, margin=2.0)

    def test_rows_do_not_depend_on_the_batch(self) -> None:
        """A token's output is the same alone and among others: bit by bit where declared, else nearly."""
        quantizer, impl = self._loaded()
        exact = quantizer.caps.batch_invariant
        for site, _ in self._some(quantizer):
            op, x = self._op(impl, [site], [self._weights(site)]), self._inputs(70, site.k)
            x[5] *= 1000  # a neighbour whose scale must stay its own
            whole = self._product(op, x, site)
            for rows in ((0, 1), (5, 6), (17, 18), (0, 8), (3, 40), (33, 70)):
                part = self._product(op, x[rows[0] : rows[1]].contiguous(), site)
                wanted = whole[rows[0] : rows[1]]
                what = (
                    f"{self.name}: tokens {rows[0]} to {rows[1] - 1} of {site.name} by themselves "
                    "differ from the same among 70"
                )
                if exact and not bool((part == wanted).all()):
                    self.fail(
                        f"{what}, by up to {float((part - wanted).abs().max()):.2g}",
                        rule="caps.batch_invariant: a token's result does not depend on the batch",
                        do="declare batch_invariant=False, or sum in an order that the batch does not change",
                    )
                self._same(
                    part,
                    wanted,
                    what,
                    rule="scales of inputs are per token: one token's size does not reach another",
                    do="quantize each token with a scale of its own (dim=1 of [tokens, k])",
                )

    # ----------------------------------------------------------- good manners

    def test_weights_given_are_left_alone(self) -> None:
        """``pack`` and ``linear`` change neither weights, biases nor inputs, and keep none of the weights."""
        quantizer, impl = self._loaded()
        for site, _ in self._some(quantizer):
            weight, bias, x = self._weights(site), self._inputs(1, site.n)[0], self._inputs(9, site.k)
            given = {"weight": weight, "bias": bias, "input": x}
            before = {name: tensor.clone() for name, tensor in given.items()}
            tensor = self._pack(impl, site, weight, bias)
            kept = [t for t in (*tensor.codes, *tensor.scales, *tensor.zeros) if _shares_memory(t, weight)]
            if kept:
                self.fail(
                    f"{self.name}: what pack() returns for {site.name} lies in the memory of the weight",
                    rule="pack: the weight is not to be kept, the executor lets it go",
                    do="copy what is stored",
                )
            op = impl.linear([site], [tensor], [bias], self.device)
            for _ in range(2):
                self._product(op, x, site)
            for name, one in given.items():
                if not bool((one == before[name]).all()):
                    self.fail(
                        f"{self.name} changes the {name} it is given for {site.name}, by up to "
                        f"{float((one - before[name]).abs().max()):.2g}",
                        rule="pack and apply read their arguments, which others may need",
                        do="work on a copy: no methods that end in _ on what is given",
                    )

    def test_the_same_every_time(self) -> None:
        """Packing and products are the same for the same arguments, in two plugins of one seed."""
        torch = torch_or_skip()
        results = []
        for chance in (1, 2):
            torch.manual_seed(chance)  # a global generator must not matter
            quantizer, impl = self._loaded()
            for site, _ in self._some(quantizer):
                weight, x = self._weights(site), self._inputs(9, site.k)
                tensors = [self._pack(impl, site, weight) for _ in range(2)]
                parts = [[*t.codes, *t.scales, *t.zeros] for t in tensors]
                op = impl.linear([site], [tensors[1]], [None], self.device)
                results.append((site, parts[0], self._product(op, x, site), self._product(op, x, site)))
        half = len(results) // 2
        for (site, parts, y, twice), (_, other, other_y, _) in zip(
            results[:half], results[half:], strict=True
        ):
            if not (
                all(bool((a == b).all()) for a, b in zip(parts, other, strict=True))
                and bool((y == twice).all())
                and bool((y == other_y).all())
            ):
                self.fail(
                    f"{self.name}: packing {site.name} twice, or running it twice, gives different numbers",
                    rule="pack: the same for the same arguments; chance is the plugin's own",
                    do="draw from context.rng in the constructor only, never from a global generator",
                )

    def test_results_stay_when_other_linears_run(self) -> None:
        """Outputs are the caller's: later products of this and other operations do not write to them."""
        quantizer, impl = self._loaded()
        ops = [
            (site, self._op(impl, [site], [self._weights(site, i)]))
            for i, (site, _) in enumerate(self._some(quantizer))
        ]
        kept = []
        for tokens in (3, 40, 1, 40):
            for site, op in ops:
                y = self._product(op, self._inputs(tokens, site.k), site)
                kept.append((site, y, y.clone()))
        for site, y, then in kept:
            if not bool((y == then).all()):
                self.fail(
                    f"{self.name}: an output of {site.name} changed when another product ran",
                    rule="apply: [tokens, n], the caller's own",
                    do="return new memory; scratch memory is for what is between",
                )

    # --------------------------------------------------------------- a model

    def test_a_tiny_model_keeps_its_logits(self) -> None:
        """A small decoder of quantized linears has logits near those of the dense one."""
        torch = torch_or_skip()
        quantizer, impl = self._loaded()
        weights, ops, formats = {}, {}, []
        for i, site in enumerate(linear_sites(self._model)):
            weights[site.name] = self._weights(site, i) * 1.5
            format = quantizer.format(site, self._model)
            if format is not None:
                formats.append((format, site.k))
                op = self._op(impl, [site], [weights[site.name]])
                ops[site.name] = (op, site)
        ids = torch.arange(24) * 7 % self._model.vocab
        dense = _logits(self._model, weights, {}, ids, self._product)
        got = _logits(self._model, weights, ops, ids, self._product)
        reached = decibels(dense, got - dense)
        least = min(floor_db(format, k) for format, k in formats) - 10
        if not reached >= least:
            self.fail(
                f"{self.name}: the logits of a tiny decoder have a signal to noise of {reached:.1f} dB, "
                f"at least {least:.1f} dB are due",
                rule="a quantized model says about what the unquantized one says",
                do="the other checks say which linear is wrong; if they pass, errors of linears add up: see "
                "whether they share a sign (a bias in rounding)",
            )


def _beside(parts: Sequence[Any]) -> Any:
    return torch_or_skip().cat(list(parts), 1)


def _shares_memory(a: Any, b: Any) -> bool:
    return bool(a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def _bytes_of(owner: object) -> int:
    """Bytes of all tensors that an object reaches through its own attributes and containers."""
    torch = torch_or_skip()
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = [owner]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, str | bytes | int | float | type | None):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            todo += one
        elif type(one).__module__.partition(".")[0] not in ("torch", "builtins", "functools"):
            slots = [name for cls in type(one).__mro__ for name in getattr(cls, "__slots__", ())]
            todo += [*vars(one).values()] if hasattr(one, "__dict__") else []
            todo += [getattr(one, name, None) for name in slots]
    return sum(storages.values())


def _logits(model: ModelFacts, weights: dict[str, Any], ops: dict[str, Any], ids: Any, product: Any) -> Any:
    """A decoder without positions: enough to see errors add up."""
    torch = torch_or_skip()

    def linear(name: str, x: Any) -> Any:
        found = ops.get(name)
        return x @ weights[name].T if found is None else product(found[0], x, found[1])

    def norm(x: Any) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = norm(weights["lm_head"][ids])
    group = model.heads // model.kv_heads
    for layer in range(model.layers):
        at = f"model.layers.{layer}"
        h = norm(x)
        q, k, v = (
            linear(f"{at}.self_attn.{name}_proj", h).view(len(ids), -1, model.head_dim).transpose(0, 1)
            for name in "qkv"
        )
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / model.head_dim**0.5
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + linear(f"{at}.self_attn.o_proj", mixed.transpose(0, 1).flatten(1))
        h = norm(x)
        gate = torch.nn.functional.silu(linear(f"{at}.mlp.gate_proj", h))
        x = x + linear(f"{at}.mlp.down_proj", gate * linear(f"{at}.mlp.up_proj", h))
    return linear("lm_head", norm(x))

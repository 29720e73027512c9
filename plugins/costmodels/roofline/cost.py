"""Roofline cost model: FLOPs and bytes of every operation, over what the device reaches of its peaks.

Paper: Yuan et al., "LLM Inference Unveiled: Survey and Roofline Model Insights", 2024, arXiv 2402.16363
(LLM-Viewer), whose times are those of ``+cost=roofline_ideal``. Collectives without measurements are those of
GenZ (Bambhaniya et al., 2024, arXiv 2406.01698).

Mechanism: the operations of a step are counted (``operations``), each takes the smooth maximum of its compute
and its memory time (``device``), and the step is their sum with an overhead per layer, per request and per
step. Efficiencies and overheads are the device profile's, fitted on measurements, or the settings'
(``factors``). Formulas, symbols and units are on the page.

Deviations:
1. Compute and memory overlap in part (smooth maximum), and operations, layers, steps and requests have
   overheads; LLM-Viewer has the greater of both, and none.
2. Keys and values of attention are read once per KV head; LLM-Viewer's fused attention reads them once per
   query head.
3. The 8-bit peak needs 8-bit weights and activations, whatever the width of KV; LLM-Viewer asks for 8-bit KV
   too. Attention is always priced at 16 bits.
4. Logits are of the rows that sample; LLM-Viewer prices them for every token of a prompt.
5. Embedding and collectives are priced, softmax is not.
6. Attention is priced here, not by the kernel plugin: a run on a described GPU must not cost what the kernel
   of this machine does.

Faithful when: worked values by hand (Llama-3-8B on A100, H100 and H200; Llama-2-7B operation by operation);
monotone; chunks cost at least the whole; a batch of decodes at most its members; a hold equals its steps; the
breakdown adds up to the price; lanes side by side use no more than there is; fits reproduce their errors on
measured matrix products.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from servelab.core.api import ConfigError, Context
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.core.sites import kv_share, weight_bytes
from servelab.plugins.costmodels.roofline.decode import Decodes
from servelab.plugins.costmodels.roofline.device import Device, Work, check_shards, measured_ring
from servelab.plugins.costmodels.roofline.energy import power
from servelab.plugins.costmodels.roofline.factors import RooflineConfig, factors, needed
from servelab.plugins.costmodels.roofline.operations import (
    Attention,
    Operation,
    attentions,
    embedding,
    gather,
    head,
    token_operations,
)

Row = tuple[int, int]
"""(queries, context before them)."""


@dataclass(frozen=True, slots=True)
class Priced:
    """One kind of operation in a step."""

    name: str
    count: int
    """How often it runs."""
    work: Work
    """Of one of them, on one device."""
    ns: float
    """Of all of them."""
    compute_ns: float
    """Of all of them, were nothing else in their way; likewise below."""
    memory_ns: float
    network_ns: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the time of a step goes. Bytes and FLOPs are those of one device."""

    operations: tuple[Priced, ...]
    overhead_ns: float
    """Host: per layer, per request and per step."""

    @property
    def ns(self) -> float:
        """The price, before it is rounded up."""
        return sum(one.ns for one in self.operations) + self.overhead_ns

    @property
    def flops(self) -> float:
        return sum(one.count * one.work.flops for one in self.operations)

    def bytes(self, tier: Literal["weight", "kv", "activation", "network"]) -> float:
        """Moved in all: of weights, of KV, of activations; or of messages between devices."""
        of = attrgetter(f"work.{tier}_bytes")
        return float(sum(one.count * of(one) for one in self.operations))

    @property
    def lanes(self) -> dict[str, float]:
        """Nanoseconds that each resource would take by itself. Their greatest bounds the step from below if
        all its work could overlap."""
        return {
            "compute": sum(one.compute_ns for one in self.operations),
            "memory": sum(one.memory_ns for one in self.operations),
            "network": sum(one.network_ns for one in self.operations),
            "host": self.overhead_ns,
        }


@dataclass(frozen=True, slots=True)
class _Stack:
    """A range of layers."""

    operations: list[Operation]
    attention: list[Attention]


class _Sum(NamedTuple):
    """Of several operations."""

    ns: float
    compute_ns: float
    memory_ns: float
    network_ns: float


class RooflineCost:
    """O(requests) sums and O(operations) per call, O(1) per further step of a hold; keeps prices by number of
    tokens, of which there are at most ``max_batch_tokens``.
    """

    def __init__(self, config: RooflineConfig, ctx: Context) -> None:
        """
        Raises:
            ConfigError: no device is chosen, its profile lacks a figure, or it cannot share the model.
        """
        if ctx.hardware is None:
            raise ConfigError(
                "cost 'roofline' has no device to price",
                where="hardware",
                why="no hardware is chosen",
                do="choose a device (hardware=a100_80g), or prices without one: +cost=scripted",
            )
        check_shards(ctx.model, ctx.hardware)
        self.config, self._ctx, self._model, self._hardware = config, ctx, ctx.model, ctx.hardware
        self.factors = factors(config, ctx.hardware)
        self.device = Device(config, ctx.hardware, self.factors)
        self._stacks: dict[tuple[int, int], _Stack] = {}
        self._all = self._stack(0, ctx.model.layers)
        self._decodes = [Decodes(one, self.device) for one in self._all.attention]
        self._embedding = embedding(ctx.model)
        self._head = [head(ctx.model, ctx.hardware, ctx.quant)]
        if ctx.hardware.tp > 1:
            self._head.append(gather(ctx.model))
        for one in (*self._all.operations, *self._head):
            self.device.has(one.work(1).unit, one.name)
        self._tokens: dict[int, _Sum] = {}
        """By tokens of the step: all that does not depend on contexts, but for the head."""
        self._logits: dict[int, _Sum] = {}
        """By rows of logits: the head."""
        self._layers_ns = float(self.factors.layer_ns * ctx.model.layers)
        self.power = power(ctx.hardware)
        self.idle_watts = None if self.power is None else self.power.idle_watts
        self.peak_watts = None if self.power is None else self.power.idle_watts + self.power.busy_watts

    # ---------------------------------------------------------------- contract

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        rows, samples = len(batch.tokens), sum(batch.samples)
        if _is_plain(batch):
            if batch.tokens.count(1) == rows:
                return self._held(rows, samples, batch.starts, steps)
            chunks, decodes = _split(batch)
            base = self._base(sum(batch.tokens), rows, samples)
            first = ceil(base + self._attention_ns(chunks, decodes))
        else:
            first = max(1, ceil(self.breakdown(batch).ns))
            if not batch.tokens:
                return [first] * steps
        if steps == 1:
            return [first]
        return [first, *self._held(rows, samples, _moved(batch), steps - 1)]

    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        """Joules of each step beyond an idle device's; see ``energy``. As fast as ``price``."""
        assert self.power is not None, "asked only where idle_watts is known"
        if _is_plain(batch):
            chunks, decodes = _split(batch)
            if not chunks:
                return self._joules(len(decodes), sum(batch.samples), [], decodes, steps)
            found = self._joules(sum(batch.tokens), sum(batch.samples), chunks, decodes, 1)
        else:
            lanes = self.breakdown(batch).lanes
            found = [self.power.joules(lanes["compute"], lanes["memory"])]
            if not batch.tokens:
                return found * steps
        if steps > 1:
            found += self._joules(len(batch.tokens), sum(batch.samples), [], _moved(batch), steps - 1)
        return found

    def busy(self, batch: Batch) -> Mapping[str, int]:
        """``Breakdown.lanes``, summed up faster. Launches of operations and the time in which the smooth
        maximum is beyond the greater keep nothing busy.
        """
        if not _is_plain(batch):
            return {name: int(ns) for name, ns in self.breakdown(batch).lanes.items()}
        chunks, decodes = _split(batch)
        tokens, samples, rows = sum(batch.tokens), sum(batch.samples), len(batch.tokens)
        compute, memory = self._steady(tokens, samples, chunks, len(decodes))
        if decodes:
            for quick in self._decodes:
                (seen,) = quick.keys(decodes, 1)
                compute += quick.compute_ns * seen
                memory += quick.memory_ns * seen
        network = self._tokens[tokens].network_ns + self._logits[samples].network_ns
        host = self._host_ns(rows)
        return {"compute": int(compute), "memory": int(memory), "network": int(network), "host": int(host)}

    def transfer_time(self, transfer: Transfer) -> int:
        """Over the host links of all devices of the instance at once, each its part of the pages.

        Raises:
            ConfigError: the profile states no host link.
        """
        link = needed(self._hardware, "host_link_bytes_per_s", "pages move between device and host")
        share = kv_share(self._model, self._hardware.tp)
        return self.config.transfer_ns + ceil(share * transfer.bytes * 1e9 / link)

    # ------------------------------------------------------------------- loads

    def load_time(self, source: Literal["disk", "host", "peer"], nbytes: int | None = None) -> int:
        """Nanoseconds to bring bytes to the devices of the instance; None: the whole model.

        Raises:
            ConfigError: the bandwidth is not stated.
        """
        size = weight_bytes(self._model, self._ctx.quant) if nbytes is None else nbytes
        if source == "disk":
            bandwidth = self.config.disk_bytes_per_s
            if bandwidth is None:
                raise ConfigError(
                    "the bandwidth of the disk is not stated",
                    where="cost 'roofline', load_time()",
                    why="weights come from disk",
                    do="state cost.disk_bytes_per_s",
                )
        elif source == "host":
            bandwidth = needed(self._hardware, "host_link_bytes_per_s", "weights come from the host")
            bandwidth *= self._hardware.tp
        else:
            bandwidth = needed(self._hardware, "network_bytes_per_s", "weights come from another instance")
        return self.config.transfer_ns + ceil(size * 1e9 / bandwidth)

    # ------------------------------------------------------------- explanation

    def breakdown(self, batch: Batch) -> Breakdown:
        """The first step of a launch, operation by operation; what ``price`` sums up faster."""
        return Breakdown(tuple(self._operations(batch)), self._overhead_ns(batch))

    def describe(self) -> dict[str, Any]:
        """Factors in force and where each is from."""
        found: dict[str, Any] = {"device": self._hardware.name, "devices": self._hardware.tp}
        found |= self.factors.describe()
        if self._model.dtype_bytes > 2:
            found["peak"] = f"hardware.flops, for {self._model.dtype}"
        if self._hardware.tp > 1:
            found["all_reduce"] = "measured" if measured_ring(self._hardware) else "from link_bytes_per_s"
        return found

    # ---------------------------------------------------------------- fast path

    def _held(self, rows: int, samples: int, starts: Sequence[int], steps: int) -> list[int]:
        """Decodes: one token per row and step, contexts one longer each step."""
        base = self._base(rows, rows, samples)
        first, *others = self._decodes
        totals = [base + ns for ns in first.times(rows, first.keys(starts, steps))]
        for one in others:
            more = one.times(rows, one.keys(starts, steps))
            totals = [total + ns for total, ns in zip(totals, more, strict=True)]
        return [ceil(total) for total in totals]

    def _attention_ns(self, chunks: list[Row], decodes: Sequence[int]) -> float:
        total = 0.0
        for one, quick in zip(self._all.attention, self._decodes, strict=True):
            for row in chunks:
                total += one.count * self.device.time(one.chunk(*row))
            if decodes:
                total += quick.times(len(decodes), quick.keys(decodes, 1))[0]
        return total

    def _base(self, tokens: int, rows: int, samples: int) -> float:
        """What does not depend on contexts."""
        whole = self._tokens.get(tokens) or self._count_tokens(tokens)
        logits = self._logits.get(samples) or self._count_logits(samples)
        return whole.ns + logits.ns + self._host_ns(rows)

    def _host_ns(self, rows: int) -> float:
        """Overheads of a plain batch."""
        return self._layers_ns + self.factors.step_ns + self.factors.request_ns * rows

    def _joules(
        self, tokens: int, samples: int, chunks: list[Row], decodes: Sequence[int], steps: int
    ) -> list[float]:
        """Of steps in which the contexts of decodes grow; several only without chunks."""
        assert self.power is not None
        fixed, moved = self._steady(tokens, samples, chunks, len(decodes))
        joules = self.power.joules
        if not decodes:
            return [joules(fixed, moved)] * steps
        quick, *others = self._decodes
        if not others:  # layers alike, the usual case
            c, m = quick.compute_ns, quick.memory_ns
            return [joules(fixed + c * seen, moved + m * seen) for seen in quick.keys(decodes, steps)]
        compute, memory = [fixed] * steps, [moved] * steps
        for quick in self._decodes:
            keys = quick.keys(decodes, steps)
            compute = [c + quick.compute_ns * seen for c, seen in zip(compute, keys, strict=True)]
            memory = [m + quick.memory_ns * seen for m, seen in zip(memory, keys, strict=True)]
        return [joules(*busy) for busy in zip(compute, memory, strict=True)]

    def _steady(self, tokens: int, samples: int, chunks: list[Row], decodes: int) -> tuple[float, float]:
        """Compute and memory time, but for the keys that decodes see."""
        whole = self._tokens.get(tokens) or self._count_tokens(tokens)
        logits = self._logits.get(samples) or self._count_logits(samples)
        compute, memory = whole.compute_ns + logits.compute_ns, whole.memory_ns + logits.memory_ns
        for one, quick in zip(self._all.attention, self._decodes, strict=True):
            for row in chunks:
                work = one.chunk(*row)
                compute += one.count * self.device.compute_ns(work)
                memory += one.count * self.device.memory_ns(work)
            memory += quick.row_ns * decodes
        return compute, memory

    def _count_tokens(self, tokens: int) -> _Sum:
        works = [(one.count, one.work(tokens)) for one in self._all.operations]
        works += [(one.count, one.write(tokens)) for one in self._all.attention]
        found = self._tokens[tokens] = self._sum([*works, (1, self._embedding.work(tokens))])
        return found

    def _count_logits(self, samples: int) -> _Sum:
        found = self._logits[samples] = self._sum([(1, one.work(samples)) for one in self._head if samples])
        return found

    def _sum(self, works: list[tuple[int, Work]]) -> _Sum:
        device = self.device
        return _Sum(
            sum(count * device.time(work) for count, work in works),
            sum(count * device.compute_ns(work) for count, work in works),
            sum(count * device.memory_ns(work) for count, work in works),
            sum(count * device.network_ns(work) for count, work in works),
        )

    def _stack(self, first: int, end: int) -> _Stack:
        if (first, end) not in self._stacks:
            ctx, layers = self._ctx, range(first, end)
            self._stacks[first, end] = _Stack(
                token_operations(self._model, self._hardware, ctx.quant, layers),
                attentions(self._model, self._hardware, ctx.layout, layers),
            )
        return self._stacks[first, end]

    # ---------------------------------------------------------------- any batch

    def _operations(self, batch: Batch) -> Iterator[Priced]:
        """Layers are cut where a row's range of layers begins or ends."""
        rows = self._rows(batch)
        cuts = sorted({0, self._model.layers, *(cut for *_, layers in rows for cut in layers)})
        for first, end in pairwise(cuts):
            inside = [(n, p) for n, p, (a, b) in rows if a <= first and end <= b]
            if inside:
                yield from self._layers(self._stack(first, end), inside)
        begun = sum(n for n, _, (first, _) in rows if first == 0)
        if begun:
            yield self._priced(1, "embedding", self._embedding.work(begun))
        drafts = sum(item.draft for item in batch.extras.values())
        if logits := sum(batch.samples) + drafts:
            for one in self._head:
                yield self._priced(1, one.name, one.work(logits))
        if batch.copies and self._ctx.layout:
            pools = self._ctx.layout.pools
            moved = 2 * sum(pools[pool].bytes_per_page for pool, _, _ in batch.copies) / self._hardware.tp
            yield self._priced(1, "copy", Work(kv_bytes=moved))
        for task in batch.background:
            yield self._priced(1, task.kind, Work(flops=task.flops / self._hardware.tp))

    def _rows(self, batch: Batch) -> list[tuple[int, int, tuple[int, int]]]:
        """Queries, context and layers of each row; drafts are queries."""
        whole, rows = (0, self._model.layers), []
        for i, (n, p) in enumerate(zip(batch.tokens, batch.starts, strict=True)):
            item = batch.extras.get(i)
            rows.append((n + item.draft, p, item.layers or whole) if item else (n, p, whole))
        return rows

    def _layers(self, stack: _Stack, rows: list[Row]) -> Iterator[Priced]:
        tokens = sum(n for n, _ in rows)
        chunks = [row for row in rows if row[0] != 1]
        decodes = [p for n, p in rows if n == 1]
        for one in stack.operations:
            yield self._priced(one.count, one.name, one.work(tokens))
        for kind in stack.attention:
            yield self._priced(kind.count, "kv_write", kind.write(tokens))
            for row in chunks:
                yield self._priced(kind.count, "attention_chunk", kind.chunk(*row))
            if decodes:
                keys = sum([kind.seen(p + 1) for p in decodes])
                yield self._priced(kind.count, "attention_decode", kind.decode(len(decodes), keys))

    def _priced(self, count: int, name: str, work: Work) -> Priced:
        device = self.device
        return Priced(
            name,
            count,
            work,
            count * device.time(work),
            count * device.compute_ns(work),
            count * device.memory_ns(work),
            count * device.network_ns(work),
        )

    def _overhead_ns(self, batch: Batch) -> float:
        f, whole = self.factors, self._model.layers
        rows = self._rows(batch)
        run = {layer for *_, (a, b) in rows for layer in range(a, b)} if batch.extras else range(whole)
        sampled = sum(len(more) for more in batch.forks.values())
        return f.step_ns + f.request_ns * (len(batch.tokens) + sampled) + f.layer_ns * len(run) * bool(rows)


def _is_plain(batch: Batch) -> bool:
    """Nothing but tokens, each through all layers."""
    return bool(batch.tokens) and not (batch.extras or batch.background or batch.copies or batch.forks)


def _split(batch: Batch) -> tuple[list[Row], list[int]]:
    """Rows of several queries, and the contexts before those of one."""
    if batch.tokens.count(1) == len(batch.tokens):
        return [], batch.starts
    rows = list(zip(batch.tokens, batch.starts, strict=True))
    return [row for row in rows if row[0] != 1], [p for n, p in rows if n == 1]


def _moved(batch: Batch) -> list[int]:
    """Contexts after the first step."""
    return [p + n for n, p in zip(batch.tokens, batch.starts, strict=True)]

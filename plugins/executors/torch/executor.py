"""Torch executor: a real model on this machine's CPU, real tokens. A baseline, from no paper.

Mechanism: the rows of a launch are flattened into one list of tokens, run through ``decoder`` with the
selected attention backend over the executor's KV pages, and sampled where a row ends its pending tokens.
What a request's next token is depends on its own tokens, parameters and seed alone, never on the schedule
(up to rounding: a batch of another shape may round otherwise; in float64 that decides no token).

A request whose workload states its true output length ends exactly there (lengths are enforced); any
other by the model's end-of-text tokens, its own stops, or its cap.

Deviations: none. Faithful when: logits equal transformers' (float32 1e-4, float64 1e-9), greedy tokens do not
depend on schedule, chunk size or preemption in float64. Tier: stable.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from time import perf_counter  # noqa: TID251 - how long loading took, for people
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from servelab.core.api import (
    Capacity,
    ConfigError,
    Context,
    KVLayout,
    Outcome,
    PluginError,
    SamplingParams,
    Tokenizer,
    Tokens,
    WorkloadError,
)
from servelab.core.engine.state import Request
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.core.families.kernel import AttentionImpl, BatchLayout
from servelab.core.families.quant import Quantizer
from servelab.core.quality import Comparison
from servelab.core.stops import stop_check
from servelab.plugins.executors._pages import HostPages, Pages, pages_in, stated_pages
from servelab.plugins.executors.checkpoint.find import find
from servelab.plugins.executors.torch.attention import Kernel
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.linear import packs
from servelab.plugins.executors.torch.quality import Reader
from servelab.plugins.executors.torch.quantize import quantize
from servelab.plugins.executors.torch.sampler import Row, sample
from servelab.plugins.executors.torch.shape import DecoderConfig
from servelab.plugins.executors.torch.weights import tensors

log = logging.getLogger("servelab")
GREEDY = SamplingParams(temperature=0.0)
"""For requests that do not say how they want to be sampled."""
_NOTHING = Outcome()


class TorchExecutorConfig(BaseModel):
    """Settings of ``executor=torch``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_kv_pages: Pages | None = Field(
        None,
        description="device pages of every KV pool, at least 1, or of each by its id; null: as many as "
        "kv_memory_mib holds",
    )
    kv_memory_mib: int = Field(
        192,
        ge=1,
        description="memory for KV pages of all pools together, MiB, divided by what a request of the "
        "greatest length needs of each; not used with num_kv_pages",
    )
    num_host_pages: HostPages = Field(
        0, description="host pages, likewise, which schedulers may swap KV to; 0: no swapping"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="threads of a launch; null: PyTorch's own choice, one per core. Where others keep "
        "a core busy, one thread less is many times faster",
    )
    pack_weights: bool = Field(
        True,
        description="reorder bfloat16 weights once for the CPU's matrix kernels: faster small batches, equal "
        "up to rounding; where the CPU has none, nothing is packed and the report says so",
    )


class TorchExecutor:
    """Owns weights, KV bytes and the tokenizer. One launch at a time."""

    simulated = False

    def __init__(self, config: TorchExecutorConfig, ctx: Context) -> None:
        if ctx.checkpoint is None or ctx.oracle is None:
            raise ConfigError("executor 'torch' was built outside a run", do="use compose()")
        _check_limits(ctx)
        self.config, self._ctx, self._truth = config, ctx, ctx.oracle
        if ctx.kernel is None:
            raise ConfigError(
                "executor 'torch' has no attention kernel", where="kernel", do="choose one: kernel=sdpa"
            )
        self._kernel: Kernel | None = Kernel(ctx.kernel)
        self._threads = torch.get_num_threads()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._checkpoint = find(ctx.checkpoint)
        self.tokenizer: Tokenizer = self._checkpoint.tokenizer()
        self._dtype: torch.dtype = getattr(torch, ctx.checkpoint.dtype)
        self._packed = config.pack_weights and packs(self._dtype)
        self.decoder, self._memory = self._load(ctx.quant)
        self._attention: AttentionImpl | None = None

    @torch.inference_mode()
    def _load(self, quantizer: Quantizer | None) -> tuple[Decoder, dict[str, Any]]:
        """The model, and what its linears take, see ``quantize``."""
        began, name = perf_counter(), self._ctx.model.name
        log.info("loading model %s", name)
        shape = DecoderConfig.of(self._checkpoint.config)
        decoder = Decoder(shape, self._dtype, tensors(self._checkpoint))
        log.info("model %s loaded in %.1f s (%s)", name, perf_counter() - began, self._ctx.model.dtype)
        memory: dict[str, Any] = {}
        if quantizer is not None:
            began = perf_counter()
            memory = quantize(decoder, quantizer, self._ctx.model)
            took, (before, after) = perf_counter() - began, (memory["dense_bytes"], memory["packed_bytes"])
            log.info("linears of %s packed in %.1f s: %s -> %s", name, took, _mib(before), _mib(after))
        if self._packed:
            decoder.pack()
        return decoder, memory

    def describe(self) -> dict[str, Any]:
        """Where the weights come from and how they are run, for the report."""
        return {
            **self._checkpoint.provenance,
            "folder": str(self._checkpoint.files[0].parent),
            "dtype": self._ctx.model.dtype,
            "packed": self._packed,
            "threads": torch.get_num_threads(),
            "bytes": self.decoder.nbytes
            - self._memory.get("dense_bytes", 0)
            + self._memory.get("packed_bytes", 0)
            + self._memory.get("tied_head_bytes", 0),
            "linears": self._memory,
        }

    # ------------------------------------------------------------ KV memory

    def capacity(self, layout: KVLayout) -> Capacity:
        """Allocate the KV pages of both tiers: on a CPU the host's are only other memory."""
        pages, given = self._pages(layout), self.config.num_host_pages
        host = stated_pages(given, layout, "executor.num_host_pages") if given else ()
        counted = list(zip(pages, layout.pools, strict=True))
        on_host = zip(host or (0,) * len(pages), layout.pools, strict=True)
        total = sum(n * pool.bytes_per_page for n, pool in (*counted, *on_host))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if total > memory:
            raise ConfigError(
                f"{' + '.join(map(str, (*pages, *host)))} KV pages need {_gib(total)}",
                where="executor.num_kv_pages, executor.num_host_pages" if host else "executor.num_kv_pages",
                why=f"this machine has {_gib(memory)} of memory",
                do="lower executor.num_kv_pages or executor.kv_memory_mib"
                + (", or executor.num_host_pages" if host else ""),
            )
        buffers = self._kv_buffers(layout, pages)
        for n, pool in counted:
            held = sum(t.nbytes for layer in pool.layers for t in buffers[layer].values())
            if held != n * pool.bytes_per_page:
                raise PluginError(
                    f"pool {pool.id!r} states {pool.bytes_per_page} bytes per page",
                    why=f"executor 'torch' stores a page in {held // n} bytes of {self._dtype}",
                    do="mend the kvcache's layout()",
                )
        self._buffers, self._layout = buffers, layout
        self._host = self._kv_buffers(layout, host) if host else {}
        assert self._kernel is not None
        self._attention = self._kernel.load(layout, self._ctx.model, "cpu", buffers, self.decoder.rotary)
        return Capacity(device_pages=pages, host_pages=host)

    def _kv_buffers(self, layout: KVLayout, pages: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Zeroed pages of every layer's captures."""
        model, buffers = self._ctx.model, dict[int, dict[str, Tensor]]()
        for pool, count in zip(layout.pools, pages, strict=True):
            shape = (count, pool.page_tokens, model.kv_heads, model.head_dim)
            for layer in pool.layers:
                buffers[layer] = {name: torch.zeros(shape, dtype=self._dtype) for name in pool.captures}
        return buffers

    def _pages(self, layout: KVLayout) -> tuple[int, ...]:
        if self.config.num_kv_pages is not None:
            return stated_pages(self.config.num_kv_pages, layout, "executor.num_kv_pages")
        return pages_in(self.config.kv_memory_mib << 20, layout, self._ctx.limits)

    # --------------------------------------------------------------- launch

    def horizon(self, batch: Batch, max_steps: int) -> int:
        """1: when a request ends is known only once its token is."""
        return 1

    @torch.inference_mode()
    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        self._check_plain(batch)
        assert self._attention is not None
        for pool, source, target in batch.copies:
            for layer in self._layout.pools[pool].layers:
                for buffer in self._buffers[layer].values():
                    buffer[target] = buffer[source]
        ids: list[int] = []
        for r, start, n in zip(batch.requests, batch.starts, batch.tokens, strict=True):
            ids += _tokens(r, start, n)
        if ids and not 0 <= min(ids) <= max(ids) < self._ctx.model.vocab:
            raise self._unknown_token(batch)
        layout = batch_layout(batch, self._layout)
        plan = self._attention.plan(layout, ())
        x = self.decoder.run(self.decoder.embed(torch.tensor(ids)), self._attention, plan)
        return self._sample(batch, layout, x)

    def _unknown_token(self, batch: Batch) -> WorkloadError:
        vocab = self._ctx.model.vocab
        for r in batch.requests:
            wrong = next((i for i in r.spec.prompt_ids or () if not 0 <= i < vocab), None)
            if wrong is not None:
                break
        return WorkloadError(
            f"request {r.id} has token id {wrong} in its prompt",
            where="executor 'torch'",
            why=f"the model's vocabulary has ids 0 to {vocab - 1}",
            do="make prompts with the model's own tokenizer",
        )

    def _sample(self, batch: Batch, layout: BatchLayout, x: Tensor) -> list[Outcome]:
        out = [_NOTHING] * len(batch.requests)
        sampled = [i for i, wanted in enumerate(batch.samples) if wanted]
        if not sampled:
            return out
        if len(sampled) < len(x):
            x = x[torch.tensor([layout.q_indptr[i + 1] - 1 for i in sampled])]
        logits = self.decoder.head(x)
        drawing = [[batch.requests[i], *batch.forks.get(i, ())] for i in sampled]
        if batch.forks:  # further samples of a prompt draw from the same logits
            logits = logits.repeat_interleave(torch.tensor([len(each) for each in drawing]), dim=0)
        outcomes = iter(self._draw([r for each in drawing for r in each], logits))
        for i, (_, *others) in zip(sampled, drawing, strict=True):
            out[i] = next(outcomes)
            if others:
                out[i] = replace(out[i], forks=tuple(next(outcomes) for _ in others))
        return out

    def _draw(self, requests: Sequence[Request], logits: Tensor) -> Iterator[Outcome]:
        """The next token of each, from its row of ``[requests, vocab]``."""
        rows = [self._row(r) for r in requests]
        for r, row, drawn in zip(requests, rows, sample(logits, rows), strict=True):
            end = self._ending(r, row, drawn.token)
            probabilities = None if drawn.logprobs is None else (drawn.logprobs,)
            yield Outcome((drawn.token,), finish=end, logprobs=probabilities)

    def _row(self, r: Request) -> Row:
        params = _params(r)
        if params.seed is None:
            key = int.from_bytes(blake2b(f"{self._ctx.seed}/{r.id}".encode(), digest_size=8).digest())
        else:  # samples of one prompt draw apart, as in vLLM
            key = (params.seed + r.spec.sample) % 2**64
        return Row(params, r.spec.prompt_ids or (), r.output, key, self.tokenizer.stop_ids, r.id)

    def _ending(self, r: Request, row: Row, token: int) -> str | None:
        try:
            return "stop" if len(r.output) + 1 >= self._truth(r.id).output_tokens else None
        except KeyError:
            pass  # no true length is stated: the text decides
        return stop_check(row.params, [*r.output, token], row.eos_ids, self.tokenizer.decode)

    def _check_plain(self, batch: Batch) -> None:
        special = next((item for item in batch.extras.values() if not _runs(item)), None)
        if special is not None or batch.background:
            what = f"work item {special!r}" if special is not None else "background work"
            raise PluginError(
                f"executor 'torch' cannot run {what}",
                where=f"launch {batch.launch}, step {batch.first_step}",
                why="it runs plain tokens: no drafts, layer ranges, masks, rewrites or background work yet",
                do="choose a scheduler that plans plain tokens, or executor=scripted",
            )

    @torch.inference_mode()
    def transfer(self, transfer: Transfer) -> None:
        source, target = self._buffers, self._host
        if transfer.direction == "in":
            source, target = target, source
        moves = zip(self._layout.pools, transfer.source, transfer.destination, strict=True)
        for pool, pages, places in moves:
            if not pages:
                continue
            old, new = torch.tensor(pages), torch.tensor(places)
            for layer in pool.layers:
                for name, buffer in target[layer].items():
                    buffer[new] = source[layer][name][old]

    # -------------------------------------------------------------- quality

    def compare(
        self, quantizers: Mapping[str, Quantizer], windows: Sequence[Sequence[int]]
    ) -> Iterator[Mapping[str, Comparison]]:
        own, layout = self._ctx.quant, self._layout
        reference = self.decoder if own is None else self._load(None)[0]
        others = {label: self.decoder if q is own else self._load(q)[0] for label, q in quantizers.items()}
        longest = max(map(len, windows))
        pages = [-(-longest // pool.page_tokens) for pool in layout.pools]
        assert self._kernel is not None
        buffers = self._kv_buffers(layout, pages)
        reader = Reader(self._kernel, layout, self._ctx.model, buffers, reference.rotary)
        for window in windows:
            yield reader.compare(window, reference, others)

    def close(self) -> None:
        """Let go of weights and pages at once, whoever still holds the executor, and of the number of
        threads, which belongs to the process.
        """
        torch.set_num_threads(self._threads)
        self._attention, self._kernel, self._buffers, self._host = None, None, {}, {}
        vars(self).pop("decoder", None)


def batch_layout(batch: Batch, layout: KVLayout) -> BatchLayout:
    """The rows of a launch as attention backends read them: one segment each, from position 0.

    A table of a pool with a window begins with the first page the sequence still holds.
    """
    q_indptr, positions, tokens = [0], list[int](), list[int]()
    for start, n in zip(batch.starts, batch.tokens, strict=True):
        q_indptr.append(q_indptr[-1] + n)
        positions += range(start, start + n)
        tokens.append(start + n)
    rows = len(tokens)
    return BatchLayout(
        q_indptr=q_indptr,
        q_positions=positions,
        seg_indptr=range(rows + 1),
        seg_tokens=tokens,
        seg_offset=[0] * rows,
        seg_pages=[[lease.tables[i] for lease in batch.leases] for i in range(len(layout.pools))],
        seg_gone=[
            [lease.first[i] * pool.page_tokens for lease in batch.leases]
            for i, pool in enumerate(layout.pools)
        ],
    )


def _tokens(r: Request, start: int, n: int) -> Sequence[int]:
    """Ids at positions ``start..start+n-1`` of prompt and output."""
    prompt = r.spec.prompt_ids
    if prompt is None:
        raise WorkloadError(
            f"request {r.id} has no token ids",
            where="executor 'torch'",
            why="a model needs tokens, the workload states a length only",
            do="use a workload with prompts (workload=chat), or workload.with_prompt_ids=true",
        )
    if start >= len(prompt):
        start -= len(prompt)
        return r.output[start : start + n]
    if start + n <= len(prompt):
        return prompt[start : start + n]
    return [*prompt[start:], *r.output[: start + n - len(prompt)]]


def _runs(item: Tokens) -> bool:
    """Whether an item is plain but for its barrier group, which is a promise about the plan."""
    return item.layers is None and item.token_mask is None and item.advance == "append" and not item.draft


def _params(r: Request) -> SamplingParams:
    params = r.spec.sampling
    if params is None:
        return GREEDY
    if not isinstance(params, SamplingParams):
        raise WorkloadError(
            f"request {r.id} asks for sampling by {params!r:.60}",
            why="executor 'torch' understands SamplingParams",
            do="give RequestSpec.sampling a SamplingParams, or None",
        )
    return params


def _check_limits(ctx: Context) -> None:
    for name, value in (("lanes", ctx.limits.lanes), ("max_in_flight", ctx.limits.max_in_flight)):
        if value > 1:
            raise ConfigError(
                f"executor 'torch' cannot run with engine.{name}={value}",
                why="it runs one launch at a time, each from the tokens of the one before",
                do=f"set engine.{name}=1, or choose executor=scripted",
            )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"

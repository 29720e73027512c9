"""Capacity of Sarathi-Serve, vLLM v0 and Orca under a strict and a relaxed bound on the time between tokens.

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024,
arXiv 2403.02310: Mistral-7B on one A100 80 GB. Capacity is the highest rate at which the 99th percentile of
the time between tokens (TBT) is within the bound and the median scheduling delay at most 2 s. The bound is 5
times (strict) or 25 times (relaxed) a decode iteration at reference load: 0.1 s and 0.5 s for this model.

Mechanism: per scheduler, seed and bound a search as in ``task=capacity``; a rate is run once for both bounds.
Token budgets of Sarathi: 512 (for the strict bound) and 2048 (for the relaxed one). The decode iteration at
reference load, 32 requests with 4096 tokens of context each, is measured beside them.

Symbols:
    C   ``chunk_size``, the token budget of a step

Deviations:
1. Lengths are log-normal through the median and the 90th percentile that the paper states for its data, drawn
   anew; prompts and outputs are independent. The data itself is not used.
2. Step times are the roofline's for this device, with CUDA graphs as in vLLM 0.19; the paper's engines took
   longer on the host.
3. Capacities differ from the paper's, which are in its plots; their ratios are judged, by bounds of ours.
4. A search takes ``num_requests`` requests: an overload is seen only as far as it builds up in them.
5. The paper's bounds of 0.1 and 0.5 s are used as they are, not 5 and 25 times what is measured here.

Faithful when: the reference iteration is within 25 % of the paper's 0.02 s; under the strict bound Sarathi
with C = 512 has 2 to 3 times vLLM's capacity and at least Orca's; C = 512 serves no less than C = 2048 under
the strict bound, C = 2048 no less under the relaxed one.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from servelab.core.api import Context
from servelab.plugins.tasks._cells import Cell, Found
from servelab.plugins.tasks._experiment import ManyRuns, ManyRunsConfig, backlog, values
from servelab.plugins.tasks._rows import Bound, Row, at_least, measured, relative
from servelab.plugins.tasks._search import Criteria, Range, Search
from servelab.plugins.tasks.capacity import complain, plot_probes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRICT_MS, RELAXED_MS, DELAY_MS, ITERATION_MS = 100.0, 500.0, 2000.0, 20.0
BOUNDS: Mapping[str, float] = {"strict": STRICT_MS, "relaxed": RELAXED_MS}
LONGEST, SEATS = 8192, 128

SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"name": "vllm_v0", "max_num_seqs": SEATS, "max_num_batched_tokens": LONGEST},
    "orca": {"name": "orca", "max_num_seqs": SEATS},
    "sarathi-512": {"name": "sarathi", "max_num_seqs": SEATS, "chunk_size": 512},
    "sarathi-2048": {"name": "sarathi", "max_num_seqs": SEATS, "chunk_size": 2048},
}
REFERENCE = "decode iteration at reference load"


class SarathiCapacityConfig(ManyRunsConfig):
    """Settings of ``+experiment=sarathi_capacity``."""

    preset: Literal["quick", "full"] = Field(
        "full", description="full: 3 seeds, brackets of 5 %; quick: one seed, 200 requests, brackets of 15 %"
    )
    lengths: Literal["sharegpt_sarathi_like", "arxiv_sarathi_like"] = Field(
        "sharegpt_sarathi_like", description="laws of lengths, like the paper's two sets of data"
    )
    num_requests: int | None = Field(
        None, ge=8, description="requests of a run; null: the preset's, 400 or 200"
    )
    seeds: int | None = Field(None, ge=1, description="seeds per search; null: the preset's")
    lo: float = Field(0.25, gt=0, allow_inf_nan=False, description="lowest rate of a search, requests/s")
    rel_tol: float | None = Field(
        None, ge=1e-4, lt=10, description="width of the final bracket; null: the preset's"
    )


class SarathiCapacity(ManyRuns):
    """Keeps no state between runs."""

    title = "Capacity under bounds on the time between tokens (Sarathi-Serve, OSDI 2024)"

    def __init__(self, config: SarathiCapacityConfig, context: Context) -> None:
        super().__init__(config, context)
        quick = config.preset == "quick"
        self._requests = config.num_requests or (200 if quick else 400)
        self._lengths = config.lengths
        tol = config.rel_tol or (0.15 if quick else 0.05)
        self._gain = Bound("2 to 3", 2.0, 3.0)
        if quick:  # one seed: its ratio is known as far as its brackets are
            self._gain = Bound(f"2 to 3, give or take {tol:.0%}", 2.0 / (1 + tol), 3.0 * (1 + tol))
        self._first = context.seed
        self._seeds = range(self._first, self._first + (config.seeds or (1 if quick else 3)))
        self._searches = {
            (scheduler, bound, seed): self._search(scheduler, bound, seed, Range(config.lo, None, tol))
            for seed, scheduler, bound in product(self._seeds, SCHEDULERS, BOUNDS)
        }

    def _search(self, scheduler: str, bound: str, seed: int, where: Range) -> Search:
        changes = {
            **_DEVICE,
            "scheduler": dict(SCHEDULERS[scheduler]),
            "workload": {
                "name": "synthetic",
                "lengths": self._lengths,
                "num_requests": self._requests,
                "with_prompt_ids": False,
            },
        }
        longest = 16384 if self._lengths.startswith("arxiv") else LONGEST
        changes |= {"engine.max_model_len": longest, "engine.max_batch_tokens": 4 * longest}
        if scheduler == "vllm":
            changes["scheduler"]["max_num_batched_tokens"] = longest
        return Search(
            label=f"{scheduler}, {self._lengths}",
            changes=changes,
            seed=seed,
            where=where,
            criteria=Criteria({"p99_itl_ms": BOUNDS[bound], "median_queueing_ms": DELAY_MS}),
        )

    def cells(self, found: Found) -> Sequence[Cell]:
        wanted = [self._reference()]
        wanted += [cell for search in self._searches.values() for cell in search.wanted(found)]
        return list({cell.name: cell for cell in wanted}.values())  # both bounds may want one rate

    def _reference(self) -> Cell:
        """32 prompts of 4096 tokens are computed first, in whole; then all decode together, 64 steps."""
        return Cell(
            name=REFERENCE,
            changes={
                **_DEVICE,
                "engine.max_model_len": LONGEST,
                "engine.max_batch_tokens": 4 * LONGEST,
                "scheduler": {"name": "vllm_v0", "max_num_seqs": 32, "max_num_batched_tokens": 4 * LONGEST},
                "workload": backlog(32, prompt_length=4096, output_length=65, max_new_tokens=65),
            },
        )

    def left(self, found: Found) -> float:
        return sum(search.left(found) for search in self._searches.values())

    def rows(self, found: Found) -> Sequence[Row]:
        iteration = values(found, [REFERENCE], lambda one: one.results["median_itl_ms"])
        rows = [
            Row(
                name=REFERENCE,
                unit="ms",
                paper=ITERATION_MS,
                bound=relative(ITERATION_MS, 0.25),
                setup="32 requests, contexts of 4096 to 4160 tokens",
                **measured(iteration),
            )
        ]
        ratios: tuple[tuple[str, str, str, float | None, Bound | None], ...] = (
            ("sarathi-512", "vllm", "strict", 2.6, self._gain),
            ("sarathi-512", "orca", "strict", None, at_least(1)),
            ("sarathi-512", "sarathi-2048", "strict", None, at_least(1)),
            ("sarathi-2048", "sarathi-512", "relaxed", None, at_least(1)),
            ("sarathi-2048", "vllm", "relaxed", None, at_least(1)),
            ("sarathi-2048", "orca", "relaxed", None, at_least(1)),
        )
        rows += [
            Row(
                name=f"capacity, {one} over {other}, {slo}",
                paper=paper,
                bound=bound,
                setup=self._setup(slo),
                note="2.6 is the paper's largest gain over vLLM for this model, of both sets of data.",
                **measured(self._ratios(found, one, other, slo)),
            )
            for one, other, slo, paper, bound in ratios
        ]
        rows += [
            Row(
                name=f"capacity of {scheduler}, {slo}",
                unit="requests/s",
                setup=self._setup(slo),
                **measured([*self._capacities(found, scheduler, slo).values()]),
            )
            for slo, scheduler in product(BOUNDS, SCHEDULERS)
        ]
        return rows

    def _setup(self, slo: str) -> str:
        return (
            f"Mistral-7B, A100 80 GB, {self._lengths}, {self._requests} requests; p99 TBT <= "
            f"{BOUNDS[slo]:g} ms, median delay <= {DELAY_MS:g} ms"
        )

    def _capacities(self, found: Found, scheduler: str, slo: str) -> dict[int, float]:
        ends = {seed: self._searches[scheduler, slo, seed].capacity(found) for seed in self._seeds}
        return {seed: end for seed, end in ends.items() if end is not None}

    def _ratios(self, found: Found, one: str, other: str, slo: str) -> list[float]:
        """Seed by seed: both served the same requests."""
        theirs = self._capacities(found, other, slo)
        ours = self._capacities(found, one, slo)
        return [ours[seed] / theirs[seed] for seed in ours if seed in theirs]

    def extra(self, found: Found) -> Mapping[str, Any]:
        return {
            "searches": [
                {"scheduler": scheduler, "slo": slo, **search.to_dict(found)}
                for (scheduler, slo, _), search in self._searches.items()
            ]
        }

    def complain(self, found: Found) -> None:
        complain(list(self._searches.values()), found)

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        def capacities(axes: Axes) -> None:
            for k, slo in enumerate(BOUNDS):
                for i, scheduler in enumerate(SCHEDULERS):
                    got = [*self._capacities(found, scheduler, slo).values()]
                    if got:
                        label = f"{slo}: p99 TBT <= {BOUNDS[slo]:g} ms"
                        axes.bar(i + 0.4 * k, sum(got) / len(got), 0.38, color=f"C{k}", label=label)
                        axes.plot([i + 0.4 * k] * len(got), got, ".", color="black")
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            axes.set_xticks([i + 0.2 for i in range(len(SCHEDULERS))], list(SCHEDULERS))
            axes.set_ylabel("capacity, requests/s")
            axes.legend(handles.values(), handles.keys(), frameon=False)

        def probes(axes: Axes) -> None:
            strict = [search for (_, slo, _), search in self._searches.items() if slo == "strict"]
            plot_probes(axes, strict, found)

        return {"capacity": capacities, "probes_strict": probes}


_DEVICE: Mapping[str, Any] = {"kvcache": {"name": "paged", "page_tokens": 16}}

"""Request-level against iteration-level batching: what a batch that waits for its longest member costs.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
and a closed form: with a backlog, a static batch of B takes max(L_1 .. L_B) iterations, while B places that
are refilled at once take the mean, so the ratio of iterations tends to E[max] / E[mean] of the lengths.

Mechanism: a backlog of ``batches`` times B requests with equal prompts; lengths of outputs have one mean and
laws of growing variance. Both schedulers serve the same requests; iterations are counted, and on a device
throughput is compared. E[max] and E[mean] are computed from each law's quantiles.

Symbols:
    B    ``max_num_seqs``, places of a batch
    L    output length, tokens; the first comes from the iteration of the prompt

Deviations:
1. The paper's 36.9 times the throughput at equal latency is of GPT-3 175B on several A100s against
   FasterTransformer; here the gain of iteration-level batching alone is measured, on one device.
2. Orca's last requests drain with places empty: a finite backlog keeps the ratio below its limit, by about
   E[max] / E[mean] over the number of batches, which the tolerance allows.
3. Members that have finished leave the batch (the port's rule); on the device the iterations that are left
   are then cheaper than FasterTransformer's, whose places stay occupied.

Faithful when: with max_num_seqs = 2, outputs 2, 10, 2, 10 take 20 iterations statically and 14 with Orca;
equal outputs give a ratio of 1; the ratio is within 5 %, and the drain, of E[max] / E[mean].

Tier: stable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from servelab.core.api import Context
from servelab.plugins.tasks._cells import Cell, Found
from servelab.plugins.tasks._experiment import EQUAL_STEPS, ManyRuns, ManyRunsConfig, backlog, uniform, values
from servelab.plugins.tasks._rows import Bound, Row, at_least, measured, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN, PROMPT, SHARE, POINTS = 64, 16, 0.05, 20_000
SCHEDULERS = ("static_batch", "orca")


@dataclass(frozen=True)
class Lengths:
    """A law of output lengths, and its quantiles."""

    name: str
    law: Mapping[str, Any]
    quantile: Callable[[float], float]
    deviation: float
    """Standard deviation over mean, about."""

    def expected_max(self, places: int) -> float:
        """Mean of the longest of so many: the integral of Q(v ** (1 / B)) over v, by midpoints."""
        return fmean(self.quantile(((k + 0.5) / POINTS) ** (1 / places)) for k in range(POINTS))


def _uniform(name: str, low: int, high: int) -> Lengths:
    deviation = (high - low) / math.sqrt(12) / ((low + high) / 2)
    return Lengths(name, uniform(low, high), lambda u: low + math.floor(u * (high - low + 1)), deviation)


def _lognormal(name: str, sigma: float, high: int) -> Lengths:
    median = MEAN / math.exp(sigma**2 / 2)
    law = {"law": "lognormal", "median": median, "sigma": sigma, "min": 1, "max": high}
    z = NormalDist().inv_cdf

    def quantile(u: float) -> float:
        return math.floor(min(max(median * math.exp(sigma * z(u)), 1), high) + 0.5)

    return Lengths(name, law, quantile, math.sqrt(math.exp(sigma**2) - 1))


LAWS = (
    Lengths("all 64", {"law": "constant", "value": MEAN}, lambda u: MEAN, 0.0),
    _uniform("uniform 48 to 80", 48, 80),
    _uniform("uniform 1 to 127", 1, 127),
    _lognormal("log-normal, sigma 0.7", 0.7, 1024),
    _lognormal("log-normal, sigma 1.2", 1.2, 1024),
)


class OrcaStaticConfig(ManyRunsConfig):
    """Settings of ``+experiment=orca_static``."""

    preset: Literal["quick", "full"] = Field(
        "full", description="full: B of 8 and 32, 3 seeds, a device; quick: B of 8, one seed, no device"
    )
    batches: int | None = Field(
        None, ge=1, description="requests over B; null: the preset's, 256 (full) or 48 (quick)"
    )
    seeds: int | None = Field(None, ge=1, description="seeds per point; null: the preset's")


class OrcaStatic(ManyRuns):
    """Keeps no state between runs."""

    title = "Request-level against iteration-level batching (Orca, OSDI 2022)"

    def __init__(self, config: OrcaStaticConfig, context: Context) -> None:
        super().__init__(config, context)
        full = config.preset == "full"
        self._places = (8, 32) if full else (8,)
        self._batches = config.batches or (256 if full else 48)
        self._seeds = range(context.seed, context.seed + (config.seeds or (3 if full else 1)))
        self._device = full

    def cells(self, found: Found) -> Sequence[Cell]:
        counted = [
            self._cell(scheduler, law, places, seed)
            for seed, places, law, scheduler in product(self._seeds, self._places, LAWS, SCHEDULERS)
        ]
        on_device = [
            self._cell(scheduler, law, self._places[-1], self._seeds[0], device=True)
            for law, scheduler in product(LAWS, SCHEDULERS)
        ]
        return [*map(_worked, SCHEDULERS), *counted, *(on_device if self._device else ())]

    def _cell(self, scheduler: str, law: Lengths, places: int, seed: int, device: bool = False) -> Cell:
        requests = self._batches * places
        return Cell(
            name=_name(scheduler, law, places, seed, device),
            changes={
                **_common(places, longest=1024),
                "seed": seed,
                "scheduler": {"name": scheduler, "max_num_seqs": places},
                "workload": backlog(
                    requests, prompt_length=PROMPT, output_length=dict(law.law), max_new_tokens=1024
                ),
                **(_DEVICE if device else _COUNTED),
                "executor": {"name": "sim" if device else "scripted", "num_kv_pages": places * 80},
            },
            weight=places,
        )

    def rows(self, found: Found) -> Sequence[Row]:
        rows = [
            Row(
                name=f"iterations of {scheduler}: B = 2, outputs 2, 10, 2, 10",
                paper=paper,
                bound=within(paper, 0),
                setup="the worked example",
                **measured(values(found, [_worked(scheduler).name], _iterations)),
            )
            for scheduler, paper in zip(SCHEDULERS, (20.0, 14.0), strict=True)
        ]
        for places, law in product(self._places, LAWS):
            expected = law.expected_max(places) / law.expected_max(1)
            drain = expected / self._batches if law.deviation else 0.0
            rows.append(
                Row(
                    name=f"iterations, static over orca: B = {places}, {law.name}",
                    paper=expected,
                    bound=Bound(
                        f"-{100 * (SHARE + drain):.1f} to +{100 * SHARE:g} %",
                        expected * (1 - SHARE - drain),
                        expected * (1 + SHARE),
                    ),
                    setup=f"{self._batches * places} requests at once, E[max] / E[mean]",
                    **measured(self._ratios(found, law, places, _iterations)),
                )
            )
        if self._device:
            rows += [self._on_device(found, law) for law in LAWS]
        return rows

    def _on_device(self, found: Found, law: Lengths) -> Row:
        places = self._places[-1]
        got = self._ratios(found, law, places, _duration, device=True)
        return Row(
            name=f"throughput, orca over static on a device: B = {places}, {law.name}",
            bound=at_least(1) if law.deviation else None,
            setup="Llama-2-7B on an A100 80 GB, roofline",
            note="On a device the gap is smaller than in iterations: those of a batch that has become small "
            "cost less.",
            **measured(got),
        )

    def _ratios(
        self, found: Found, law: Lengths, places: int, figure: Callable[[Any], float], device: bool = False
    ) -> list[float]:
        """Static over orca, seed by seed."""
        pairs = [
            [values(found, [_name(s, law, places, seed, device)], figure) for s in SCHEDULERS]
            for seed in self._seeds
        ]
        return [static[0] / orca[0] for static, orca in pairs if static and orca]

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        def over_variance(axes: Axes) -> None:
            deviations = [law.deviation for law in LAWS]
            for k, places in enumerate(self._places):
                expected = [law.expected_max(places) / law.expected_max(1) for law in LAWS]
                axes.plot(deviations, expected, "-", color=f"C{k}", label=f"E[max] / E[mean], B = {places}")
                ours = [
                    (law.deviation, ratio)
                    for law in LAWS
                    for ratio in self._ratios(found, law, places, _iterations)
                ]
                if ours:
                    axes.plot(*zip(*ours, strict=True), "o", color=f"C{k}", label=f"measured, B = {places}")
            axes.set(
                xlabel="standard deviation over mean of output lengths", ylabel="iterations, static / orca"
            )
            axes.legend(frameon=False)

        return {"ratio": over_variance}


def _name(scheduler: str, law: Lengths, places: int, seed: int, device: bool) -> str:
    return f"{scheduler} B {places} {law.name} seed {seed}{' on a device' if device else ''}"


def _common(places: int, longest: int) -> dict[str, Any]:
    return {
        "kvcache": {"name": "paged", "page_tokens": 16},
        "engine.max_model_len": PROMPT + longest,
        "engine.max_batch_tokens": max(8192, places * PROMPT),
    }


_COUNTED: Mapping[str, Any] = {"cost": EQUAL_STEPS}
_DEVICE: Mapping[str, Any] = {"cost": {"name": "roofline"}}


def _worked(scheduler: str) -> Cell:
    """Phases make the lengths 2, 10, 2, 10."""
    phases = [{"after": k, "output_length": length} for k, length in ((1, 10), (2, 2), (3, 10))]
    return Cell(
        name=f"{scheduler} worked example",
        changes={
            **_common(2, longest=16),
            **_COUNTED,
            "scheduler": {"name": scheduler, "max_num_seqs": 2},
            "workload": backlog(4, prompt_length=PROMPT, output_length=2, max_new_tokens=16, phases=phases),
            "executor": {"name": "scripted", "num_kv_pages": 64},
        },
    )


def _iterations(one: Any) -> float:
    return float(one.results["servelab"]["batch"]["steps"])


def _duration(one: Any) -> float:
    return float(one.results["duration"])

"""Steps of ``transform``: each changes the requests that another workload sends, one after the other.

Chance is by request, not by order: what is drawn for a request depends on its id and on the step's place,
so that requests which come as reactions are treated as any other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from servelab.core.api import Arrival, Cancel, RequestSpec, Truth, WorkloadError
from servelab.plugins.workloads._arrivals import MIN_RATE, NS, Process, unit_gap
from servelab.plugins.workloads._ids import DrawnIds
from servelab.plugins.workloads._labels import Labels
from servelab.plugins.workloads._laws import LengthLaw

Item = Arrival | Cancel
WORDS = 2**64


@dataclass(frozen=True, slots=True)
class Chance:
    """A step's random numbers."""

    key: str
    """Of the run, the workload and the step's place."""

    def uniform(self, what: str) -> float:
        """In [0, 1), the same whenever it is asked for."""
        word = blake2b(f"{self.key}/{what}".encode(), digest_size=8).digest()
        return (int.from_bytes(word) >> 11) / 2**53

    def stream(self) -> Random:
        """Numbers for what goes by order."""
        return Random(self.key)


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _with_its_name(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Also where only what differs from defaults is asked for."""
        return {"step": getattr(self, "step", None), **dump(self)}

    @property
    def moves(self) -> bool:
        """Whether it changes times, or which requests there are: only in open loops."""
        return False

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        """Items as the step leaves them, as lazily as they come."""
        change = self.changer(chance)
        return (item if isinstance(item, Cancel) else change(item) for item in items)

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        """For steps that leave times as they are: what becomes of a request."""
        raise NotImplementedError  # abstract

    @property
    def limit(self) -> int | None:
        """Prompt plus output that it leaves at most, if it says so."""
        return None


class _Moving(_Step):
    @property
    def moves(self) -> bool:
        return True


class Scale(_Moving):
    """All times divided: bursts keep their size, and the CV of gaps stays. Waits of clients that give up
    shrink as well."""

    step: Literal["scale"] = "scale"
    by: float = Field(gt=0, le=1e6, description="Times as many requests per second.")

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        return (at(item, round(item.time_ns / self.by)) for item in items)


class Thin(_Moving):
    """Each request, with its whole program, kept with the same probability: times stay, and bursts shrink."""

    step: Literal["thin"] = "thin"
    keep: float = Field(gt=0, le=1, description="Probability that a request stays.")
    others: bool = Field(default=False, description="Keep those that would go, instead.")

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        programs: dict[str, str] = {}
        for item in items:
            if isinstance(item, Cancel):
                lot = programs.get(item.request_id.partition("#")[0], item.request_id.partition("#")[0])
            else:
                lot = item.spec.program or item.spec.id
                if item.spec.program:
                    programs[item.spec.id] = lot
            if (chance.uniform(lot) < self.keep) != self.others:
                yield item


class Slice(_Moving):
    """Part of the traffic, moved to time 0. What comes after it is not read, cancellations included; later
    turns of programs that began before it are left out."""

    step: Literal["slice"] = "slice"
    from_s: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Where it begins, seconds.")
    until_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Where it ends, itself left out; null: nowhere."
    )
    first: int | None = Field(default=None, ge=1, description="At most so many requests; null: all.")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.until_s is not None and self.until_s <= self.from_s:
            raise ValueError(f"until_s={self.until_s:g} is not after from_s={self.from_s:g}")
        return self

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        start = round(self.from_s * NS)
        end = None if self.until_s is None else round(self.until_s * NS)
        ids, programs, left = set[str](), set[str](), self.first
        for item in items:
            if end is not None and item.time_ns >= end:
                return
            if isinstance(item, Cancel):
                if item.request_id.partition("#")[0] in ids:
                    yield at(item, item.time_ns - start)
                continue
            program = item.spec.program
            began = program is None or item.spec.turn == 0 or program in programs
            if item.time_ns < start or not began:
                continue
            if left == 0:
                return
            if program is not None:
                programs.add(program)
            ids.add(item.spec.id)
            left = None if left is None else left - 1
            yield at(item, item.time_ns - start)


class Retime(_Moving):
    """New arrival times in the same order, from a renewal process."""

    step: Literal["retime"] = "retime"
    rate: float = Field(ge=MIN_RATE, allow_inf_nan=False, description="Requests per second.")
    process: Process = Field(
        default="poisson", description="Gaps: exponential, Gamma, Weibull, or all equal."
    )
    shape: float = Field(
        default=1.0, ge=0.05, le=1e6, description="Shape of Gamma (CV = 1/sqrt(shape)) or Weibull gaps."
    )

    @model_validator(mode="after")
    def _shape_counts(self) -> Self:
        if self.shape != 1 and self.process not in ("gamma", "weibull"):
            raise ValueError(f"shape={self.shape:g} has no effect on process {self.process!r}: leave it at 1")
        return self

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        gap, now = unit_gap(self.process, self.shape, chance.stream()), 0.0
        for item in items:
            if isinstance(item, Cancel):
                raise WorkloadError(
                    f"request {item.request_id} is cancelled, and new times have no place for that",
                    where="workload 'transform', step 'retime'",
                    why="when a client gives up is told by the times that are replaced",
                    do="take traffic without cancellations, or step 'scale'",
                )
            now += gap() / self.rate
            yield at(item, round(now * NS))


class Modulate(_Moving):
    """A rate that goes up and down, as by day and night: time is stretched and compressed, so that order,
    number and mean rate over whole periods stay, and bursts are where they were."""

    step: Literal["modulate"] = "modulate"
    period_s: float = Field(default=86_400.0, gt=0, allow_inf_nan=False, description="Length of a period.")
    profile: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        min_length=1,
        description="Relative rates in equal parts of the period, such as 24 numbers for the hours of a day.",
    )

    def apply(self, items: Iterator[Item], chance: Chance) -> Iterator[Item]:
        warp = self.warp()
        return (at(item, warp(item.time_ns)) for item in items)

    def warp(self) -> Callable[[int], int]:
        """New time of an old one, both in ns; never decreasing."""
        period, parts = self.period_s * NS, len(self.profile)
        whole = sum(self.profile)
        # the share of a period's requests that has come by the end of each part
        ends = [0.0, *(x / whole for x in accumulate(self.profile))]
        ends[-1] = 1.0

        def moved(time_ns: int) -> int:
            periods, share = divmod(time_ns / period, 1.0)
            part = min(bisect_right(ends, share) - 1, parts - 1)
            within = (share - ends[part]) / (ends[part + 1] - ends[part])
            return round((periods + (part + within) / parts) * period)

        return moved


class Clip(_Step):
    """Longer prompts, outputs and caps cut."""

    step: Literal["clip"] = "clip"
    prompt: int | None = Field(default=None, ge=1, description="Longest prompt, tokens; null: any.")
    output: int | None = Field(default=None, ge=1, description="Longest true output, tokens; null: any.")
    cap: int | None = Field(default=None, ge=1, description="Greatest max_new_tokens; null: any.")

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        def change(item: Arrival) -> Arrival:
            spec = with_prompt(item.spec, least(item.spec.prompt_tokens, self.prompt))
            spec = with_cap(spec, least(spec.max_new_tokens, self.cap))
            return Arrival(item.time_ns, spec, mapped(item.truth, lambda n, k: least(n, self.output)))

        return change


class Fit(_Step):
    """Prompt and output together cut to a total: the prompt to three quarters of it, then the output to what
    is left."""

    step: Literal["fit"] = "fit"
    total: int = Field(ge=2, description="Prompt plus output, tokens.")

    @property
    def limit(self) -> int | None:
        return self.total

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        def change(item: Arrival) -> Arrival:
            spec, truth = item.spec, item.truth
            most = max((truth.output_tokens, *truth.further)) if truth else spec.max_new_tokens
            if spec.prompt_tokens + min(most, spec.max_new_tokens) <= self.total:
                return item
            spec = with_prompt(spec, min(spec.prompt_tokens, max(1, self.total * 3 // 4)))
            room = self.total - spec.prompt_tokens
            if truth is None:
                spec = with_cap(spec, min(spec.max_new_tokens, room))
            return Arrival(item.time_ns, spec, mapped(truth, lambda n, k: min(n, room)))

        return change


class Quantise(_Step):
    """Prompts, outputs and caps divided and rounded up, for toy models."""

    step: Literal["quantise"] = "quantise"
    by: int = Field(ge=1, description="The divisor.")

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        def change(item: Arrival) -> Arrival:
            spec = with_prompt(item.spec, -(-item.spec.prompt_tokens // self.by))
            spec = with_cap(spec, -(-spec.max_new_tokens // self.by))
            return Arrival(item.time_ns, spec, mapped(item.truth, lambda n, k: -(-n // self.by)))

        return change


class Outputs(_Step):
    """True outputs drawn from a law instead."""

    step: Literal["outputs"] = "outputs"
    length: LengthLaw = Field(description="The law.")

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        sample = self.length.sampler()

        def change(item: Arrival) -> Arrival:
            name = item.spec.id
            return replace(item, truth=mapped(item.truth, lambda n, k: sample(chance.uniform(f"{name}#{k}"))))

        return change


class Caps(_Step):
    """The clients' caps drawn from a law instead."""

    step: Literal["caps"] = "caps"
    length: LengthLaw = Field(description="The law.")

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        sample = self.length.sampler()
        return lambda item: replace(item, spec=with_cap(item.spec, sample(chance.uniform(item.spec.id))))


class Label(Labels, _Step):
    """Another class, tenant, priority or bounds."""

    step: Literal["label"] = "label"

    def changer(self, chance: Chance) -> Callable[[Arrival], Arrival]:
        return lambda item: replace(item, spec=self.on(item.spec))


Step = Annotated[
    Scale | Thin | Slice | Retime | Modulate | Clip | Fit | Quantise | Outputs | Caps | Label,
    Field(
        discriminator="step",
        title="a mapping with the key step: scale, thin, slice, retime, modulate, clip, fit, quantise, "
        "outputs, caps or label",
    ),
]
"""Any of them."""


def at(item: Item, time_ns: int) -> Item:
    """The item at another time."""
    if isinstance(item, Cancel):
        return Cancel(time_ns, item.request_id)
    return Arrival(time_ns, item.spec, item.truth)


def least(value: int, most: int | None) -> int:
    """The value, or its bound if there is one and it is less."""
    return value if most is None else min(value, most)


def mapped(truth: Truth | None, change: Callable[[int, int], int]) -> Truth | None:
    """True lengths of all samples, changed by (length, sample)."""
    if truth is None:
        return None
    further = tuple(change(n, k) for k, n in enumerate(truth.further, 1))
    return Truth(change(truth.output_tokens, 0), further)


def with_cap(spec: RequestSpec, cap: int) -> RequestSpec:
    """A request with another cap, for its client and for its sampler."""
    if cap == spec.max_new_tokens:
        return spec
    sampling: Any = spec.sampling
    if getattr(sampling, "max_tokens", None) is not None:
        sampling = replace(sampling, max_tokens=cap)
    return replace(spec, max_new_tokens=cap, sampling=sampling)


def with_prompt(spec: RequestSpec, length: int) -> RequestSpec:
    """A request with only the beginning of its prompt.

    Raises:
        WorkloadError: it carries hashes of the whole prompt.
    """
    if length >= spec.prompt_tokens:
        return spec
    if "block_hashes" in spec.features:
        raise WorkloadError(
            f"the prompt of request {spec.id} cannot be cut to {length} tokens",
            where="workload 'transform'",
            why="its block hashes (features) are of the whole prompt",
            do="let the workload itself cut prompts (over_length), or leave them whole",
        )
    ids: Sequence[int] | None = spec.prompt_ids
    if isinstance(ids, DrawnIds):
        ids = ids.first(length)
    elif ids is not None:
        ids = ids[:length]
    context = min(spec.context_tokens, length)
    return replace(spec, prompt_tokens=length, prompt_ids=ids, context_tokens=context)

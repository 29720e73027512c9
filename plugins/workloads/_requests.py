"""Settings of what is asked: lengths, caps, classes, and how they change in the course of a run.

Workloads that draw requests share them; when the requests come is a matter of each workload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from servelab.plugins.workloads._labels import Bounds
from servelab.plugins.workloads._laws import Constant, LengthLaw, LogNormal
from servelab.plugins.workloads._named_lengths import NAMED, named


class _Lengths(BaseModel):
    """Base of settings that state laws of lengths, which may have a name together."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    lengths: str | None = Field(
        default=None,
        description=f"Laws by name: {', '.join(NAMED)}. What is stated beside it comes first.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(name := data.get("lengths"), str):
            laws = named(name)
            if "classes" in laws and "classes" not in cls.model_fields:
                raise ValueError(
                    f"lengths {name!r} are a mixture of {len(laws['classes'])} parts: state them for the "
                    "whole workload or for a phase"
                )
            return {**{key: law for key, law in laws.items() if key in cls.model_fields}, **data}
        return data

    @model_serializer(mode="wrap")
    def _without_named(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """Where only what differs from defaults is asked for, laws that have a name are told by it."""
        dumped: dict[str, Any] = dump(self)
        if info.exclude_defaults and self.lengths:
            laws = dict(_parsed(self.lengths))
            dumped = {key: x for key, x in dumped.items() if laws.get(key) != getattr(self, key)}
        return dumped

    @model_validator(mode="after")
    def _whole_mixture(self) -> Self:
        mixture = _parsed(self.lengths).classes if self.lengths else None
        if mixture and getattr(self, "classes", None) != mixture:
            raise ValueError(
                f"lengths {self.lengths!r} are a mixture of parts, and classes would replace it: remove one "
                "of the two"
            )
        return self


class RequestClass(_Lengths, Bounds):
    """A share of the requests, with its own tenant, priority, bounds and laws. Several of one name and tenant
    are parts of one class: what policies see of them is equal, and they have laws of their own."""

    name: str = Field(min_length=1, description="Value of the requests' ``request_class``.")
    weight: float = Field(
        default=1.0, gt=0, le=1e9, description="Its share is this over the sum of all weights. Ours."
    )
    tenant: str = Field(default="default", min_length=1, description="Who pays. Ours.")
    priority: int = Field(default=0, description="Higher is more important. Ours.")
    prompt_length: LengthLaw | None = Field(
        default=None, description="Law of its prompts in tokens; null: that of all."
    )
    output_length: LengthLaw | None = Field(
        default=None, description="Law of its true outputs in tokens; null: that of all."
    )
    max_new_tokens: LengthLaw | None = Field(
        default=None, description="Law of its clients' caps in tokens; null: that of all."
    )


class _NamedLaws(BaseModel):
    """What a name stands for."""

    prompt_length: LengthLaw | None = None
    output_length: LengthLaw | None = None
    max_new_tokens: LengthLaw | None = None
    classes: tuple[RequestClass, ...] | None = None


@cache
def _parsed(name: str) -> _NamedLaws:
    return _NamedLaws.model_validate(named(name))


class Phase(_Lengths):
    """From some request or time on, other laws; what it leaves out stays as it was before."""

    after: int | None = Field(
        default=None, ge=1, description="So many requests come before it; or give after_s."
    )
    after_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="It begins so many seconds into the run."
    )
    prompt_length: LengthLaw | None = Field(default=None, description="As of the workload.")
    output_length: LengthLaw | None = Field(default=None, description="As of the workload.")
    max_new_tokens: LengthLaw | None = Field(default=None, description="As of the workload.")
    classes: tuple[RequestClass, ...] | None = Field(default=None, description="As of the workload.")

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.after is None) == (self.after_s is None):
            raise ValueError(
                "a phase begins after a number of requests (after) or a time (after_s): state one"
            )
        return self


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one class in one phase: whose they are, and by which laws they are drawn."""

    request_class: RequestClass
    prompt: LengthLaw
    output: LengthLaw
    cap: LengthLaw


class Requests(_Lengths):
    """Base of the settings of workloads that draw requests. Defaults are ours, for a small model on a CPU."""

    prompt_length: LengthLaw = Field(
        default=LogNormal(median=128, sigma=0.6, min=16, max=1024),
        description="Law of the prompt length in tokens, without the shared prefix.",
    )
    output_length: LengthLaw = Field(
        default=LogNormal(median=64, sigma=0.7, min=1, max=512),
        description="Law of the true output length in tokens: enforced, and hidden from policies.",
    )
    max_new_tokens: LengthLaw = Field(
        default=Constant(value=1024),
        description="Law of the client's cap in tokens, independent of the true length. An output above its "
        "cap is cut there and ends with reason 'length'; ``describe`` counts them as ``length_capped``.",
    )
    over_length: Literal["refuse", "clip"] = Field(
        default="refuse",
        description="What happens to requests longer than the model. refuse: no run. clip: the prompt is cut "
        "to three quarters of the model's length, then the output to what is left; ``describe`` counts them.",
    )

    with_prompt_ids: bool = Field(
        default=True, description="Give prompts token ids, which executors that run a model need."
    )
    prefix_tokens: int = Field(
        default=0,
        ge=0,
        le=100_000_000,
        description="Tokens at the start of every prompt that all requests share, on top of prompt_length.",
    )

    classes: tuple[RequestClass, ...] = Field(
        default=(), description="Mixture of classes; empty: all requests of class 'online', without bounds."
    )
    slo_scale: float = Field(
        default=1.0, gt=0, le=1e6, description="Multiplies the bounds of all classes, for sweeps of them."
    )
    phases: tuple[Phase, ...] = Field(
        default=(), description="Laws that change in the course of the run, in the order in which they begin."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prefix_tokens and not self.with_prompt_ids:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} cannot be shared without token ids: "
                "set with_prompt_ids to true, or prefix_tokens to 0"
            )
        for place, kinds in zip(self._places(), self.kinds(), strict=True):
            for kind in kinds:
                if kind.cap.highest < kind.output.lowest:
                    raise ValueError(
                        f"{place}every request would be cut: max_new_tokens is at most {kind.cap.highest}, "
                        f"output_length at least {kind.output.lowest}: raise the first or lower the second"
                    )
            _check_classes(place, kinds)
        for field in ("after", "after_s"):
            starts = [value for phase in self.phases if (value := getattr(phase, field)) is not None]
            if starts and len(starts) < len(self.phases):
                raise ValueError("some phases begin after requests and some after a time: take one of them")
            if starts != sorted(set(starts)):
                raise ValueError(f"phases must begin one after the other; {field} is {starts}")
        return self

    def kinds(self) -> list[list[Kind]]:
        """Per phase, the first being the beginning of the run, the kinds of its classes."""
        prompt, output, cap = self.prompt_length, self.output_length, self.max_new_tokens
        classes = self.classes or (RequestClass(name="online"),)
        found = [_of(classes, prompt, output, cap)]
        for phase in self.phases:
            prompt, output = phase.prompt_length or prompt, phase.output_length or output
            cap, classes = phase.max_new_tokens or cap, phase.classes or classes
            found.append(_of(classes, prompt, output, cap))
        return found

    def _places(self) -> Iterator[str]:
        yield ""
        yield from (f"phases.{i}: " for i in range(len(self.phases)))


def _check_classes(place: str, kinds: list[Kind]) -> None:
    """A class may be listed again with other laws: its parts then differ in lengths and in nothing else."""
    listed: dict[tuple[str, str], list[Kind]] = {}
    for kind in kinds:
        listed.setdefault((kind.request_class.name, kind.request_class.tenant), []).append(kind)
    for (name, tenant), parts in listed.items():
        class_ = f"{place}class {name!r} of tenant {tenant!r}"
        if len({(part.prompt, part.output, part.cap) for part in parts}) < len(parts):
            raise ValueError(
                f"{class_} is listed {len(parts)} times with equal laws: merge them or rename one"
            )
        if len({(part.request_class.priority, part.request_class.slo()) for part in parts}) > 1:
            raise ValueError(f"{class_} is listed with different priorities or bounds: rename one")


def _of(
    classes: tuple[RequestClass, ...], prompt: LengthLaw, output: LengthLaw, cap: LengthLaw
) -> list[Kind]:
    return [
        Kind(c, c.prompt_length or prompt, c.output_length or output, c.max_new_tokens or cap)
        for c in classes
    ]

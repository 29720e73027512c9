"""What workloads from traces share: columns of numbers, slices, another rate, the model's length.

A trace becomes one column of numbers per quantity (16 to 24 bytes a request), from which requests are made as
they are asked for. In this order rows are sliced (``start_s``, ``duration_s``), thinned (``rescale: thin``),
cut to ``num_requests``, stretched in time (``rescale: times``), scaled in length and fitted to the model.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from random import Random
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.core.api import Arrival, Cancel, Context, RequestSpec, Truth, WorkloadError
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._arrivals import MIN_RATE
from servelab.plugins.workloads._describe import arrival_statistics, json_settings, statistics
from servelab.plugins.workloads._ids import DrawnIds
from servelab.plugins.workloads._laws import Constant, LengthLaw

log = logging.getLogger("servelab")

NS = 1_000_000_000


class TraceConfig(BaseModel):
    """Base of the settings of workloads that can be replayed from a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_s: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Begin this long after the first row of the file."
    )
    duration_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Take rows of this long, in the file's own time; None: to its end.",
    )
    num_requests: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Take only so many; None: all of the slice."
    )
    request_rate: float | None = Field(
        default=None,
        ge=MIN_RATE,
        allow_inf_nan=False,
        description="Mean rate to be replayed, requests/s; None: as recorded.",
    )
    rescale: Literal["times", "thin"] = Field(
        default="times",
        description="How request_rate is reached. times: all times are divided, bursts keep their size and "
        "the CV of gaps stays. thin: each request is kept with the same probability, times stay and bursts "
        "shrink.",
    )
    prompt_scale: float = Field(
        default=1.0, gt=0, le=1000, description="Multiplies prompt lengths, for toy models. Ours: 1."
    )
    output_scale: float = Field(
        default=1.0, gt=0, le=1000, description="Multiplies true output lengths. Ours: 1."
    )
    max_new_tokens: LengthLaw = Field(
        default=Constant(value=2048),
        description="Law of the client's cap in tokens, drawn independently of true lengths. An output above "
        "its cap is cut there; ``describe`` counts them as ``length_capped``. Ours.",
    )
    over_length: Literal["clip", "drop", "refuse"] = Field(
        default="clip",
        description="What happens to requests longer than the model. clip: the prompt is cut to "
        "max_prompt_tokens, then the output to what is left. drop: they are left out. refuse: no run. "
        "``describe`` counts them. Ours.",
    )
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt under ``over_length: clip``; None: three quarters of the model's length. "
        "Ours.",
    )
    with_prompt_ids: bool = Field(
        default=True,
        description="Give prompts token ids, which executors that run a model need; made when read.",
    )

    @model_validator(mode="after")
    def _prompts_are_clipped(self) -> Self:
        if self.max_prompt_tokens is not None and self.over_length != "clip":
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} has no effect on over_length "
                f"{self.over_length!r}: remove it, or set over_length to 'clip'"
            )
        return self


@dataclass(slots=True)
class Columns:
    """Requests as columns of equal length, in time order."""

    times: array[int] = field(default_factory=lambda: array("q"))
    """ns from the beginning of the slice."""
    prompts: array[int] = field(default_factory=lambda: array("i"))
    """Prompt lengths, tokens."""
    outputs: array[int] = field(default_factory=lambda: array("i"))
    """True output lengths, tokens."""
    tags: array[int] = field(default_factory=lambda: array("q"))
    """What else a workload knows of each request, as it likes."""

    def __len__(self) -> int:
        return len(self.times)

    def add(self, time_ns: int, prompt: int, output: int, tag: int) -> None:
        """One request more."""
        self.times.append(time_ns)
        self.prompts.append(prompt)
        self.outputs.append(output)
        self.tags.append(tag)

    def keep(self, chosen: Callable[[int], bool]) -> None:
        """Leave out the requests whose place is not chosen, asked once each in order."""
        places = array("q", (i for i in range(len(self)) if chosen(i)))
        for each in fields(self):
            column = getattr(self, each.name)
            setattr(self, each.name, array(column.typecode, map(column.__getitem__, places)))


Row = Sequence[int]
"""Time in ns, prompt tokens, output tokens, tag."""


def sliced(rows: Iterable[Row], config: TraceConfig, begin_ns: int | None = None) -> Iterator[Row]:
    """The rows of the slice, with times from its beginning. Reading ends with it.

    Args:
        rows: of the file.
        config: where the slice begins and ends.
        begin_ns: when the file begins; None: with its first row.
    """
    origin = end_ns = None
    for time_ns, prompt, output, tag in rows:
        if origin is None:
            begin_ns = time_ns if begin_ns is None else begin_ns
            origin = begin_ns + round(config.start_s * NS)
            end_ns = None if config.duration_s is None else origin + round(config.duration_s * NS)
        if end_ns is not None and time_ns >= end_ns:
            return
        if time_ns >= origin:
            yield time_ns - origin, prompt, output, tag


def taken(rows: Iterable[Row], config: TraceConfig, thin: Random) -> tuple[Columns, dict[str, Any]]:
    """As many rows as the settings ask for, at the rate they ask for, and what was done to get it.

    Raises:
        WorkloadError: there are none; the rate cannot be reached.
    """
    thinned = config.request_rate is not None and config.rescale == "thin"
    columns = Columns()
    for row in islice(rows, None if thinned else config.num_requests):
        columns.add(*row)
    if not columns:
        raise _nothing(config, "no row of the slice is wanted")
    done = _at_rate(columns, config, thin)
    if config.num_requests is not None and len(columns) < config.num_requests:
        log.warning(
            "the trace has %d requests for workload.num_requests=%d: so many are replayed, once",
            len(columns),
            config.num_requests,
        )
    return columns, done


def _at_rate(columns: Columns, config: TraceConfig, thin: Random) -> dict[str, Any]:
    n, last = len(columns), columns.times[-1]
    recorded = n * NS / last if last else None
    done: dict[str, Any] = {"recorded_rate": recorded, "rescaled_by": None, "factor": None}
    wanted = config.request_rate
    if wanted is None:
        return done
    if recorded is None:
        raise WorkloadError(
            "the slice has no rate that could be changed",
            where="workload.request_rate",
            why=f"its {n} requests all arrive at its beginning",
            do="take a longer slice, or leave request_rate out",
        )
    done |= {"rescaled_by": config.rescale, "factor": wanted / recorded}
    if config.rescale == "times":
        factor = recorded / wanted
        columns.times = array("q", [round(t * factor) for t in columns.times])
        return done
    share = wanted / recorded
    if share > 1:
        raise WorkloadError(
            f"thinning cannot raise the rate to {wanted:g} requests/s",
            where="workload.rescale",
            why=f"the slice has {recorded:.4g} requests/s, and thinning only leaves requests out",
            do="set workload.rescale to times, or lower workload.request_rate",
        )
    draw, places = thin.random, config.num_requests
    columns.keep(lambda i: draw() < share)
    if places is not None:
        columns.keep(lambda i: i < places)
    if not columns:
        raise _nothing(config, f"thinning to {wanted:g} requests/s left none of {n}")
    return done


def scaled(lengths: array[int], by: float) -> array[int]:
    """Each length times ``by``, rounded, at least 1."""
    return array("i", [max(1, round(length * by)) for length in lengths])


def _nothing(config: TraceConfig, why: str) -> WorkloadError:
    return WorkloadError(
        "no request is left of the trace",
        where=", ".join(f"workload.{name}={value}" for name, value in _chosen(config)) or "workload.path",
        why=why,
        do="take an earlier or a longer slice, or another filter",
    )


def _chosen(config: TraceConfig) -> Iterator[tuple[str, Any]]:
    """The settings that choose rows, where they are not at their defaults."""
    for name in ("start_s", "duration_s", "log_type", "model", "failures"):
        field = type(config).model_fields.get(name)
        if field is not None and (value := getattr(config, name)) != field.default:
            yield name, f"{value:g}" if isinstance(value, float) else value


class Replay:
    """Base of workloads that are columns: requests, their fit to the model, statistics.

    State: the columns; ``arrivals()`` only reads them. A subclass says what a tag means (``about``).

    Args:
        config: its settings.
        ctx: the run.
        columns: filled; prompts and outputs are changed in place to fit the model.
        done: what ``describe()`` says of how the columns came to be.
    """

    def __init__(self, config: TraceConfig, ctx: Context, columns: Columns, done: Mapping[str, Any]) -> None:
        self._config, self._columns, self._done = config, columns, dict(done)
        self._where, self._vocab = f"workload {ctx.name!r}", ctx.model.vocab
        if config.prompt_scale != 1:
            self.scale_prompts(config.prompt_scale)
        if config.output_scale != 1:
            columns.outputs = scaled(columns.outputs, config.output_scale)
        cap, uniform = config.max_new_tokens.sampler(), self._stream("cap").random
        self._caps = array("i", [cap(uniform()) for _ in range(len(columns))])
        self._done["over_length"] = self._fit(ctx.limits.max_model_len)

    root: int
    """Begins the key of every random stream; a subclass draws it once, before anything else."""

    def about(self, place: int) -> Mapping[str, Any]:
        """Further fields of the request's specification."""
        return {}

    def ids(self, place: int, length: int) -> Sequence[int]:
        """Token ids of the prompt."""
        return DrawnIds(f"{self.root}/tokens/{place}", length, self._vocab)

    def scale_prompts(self, by: float) -> None:
        """Apply ``prompt_scale``."""
        self._columns.prompts = scaled(self._columns.prompts, by)

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """The requests, in time order."""
        c, about, ids = self._columns, self.about, self.ids if self._config.with_prompt_ids else None
        rows = zip(c.times, c.prompts, c.outputs, self._caps, strict=True)
        for i, (time_ns, prompt, output, cap) in enumerate(rows):
            spec = RequestSpec(
                id=f"r{i}",
                prompt_tokens=prompt,
                max_new_tokens=cap,
                prompt_ids=None if ids is None else ids(i, prompt),
                **about(i),
            )
            yield Arrival(time_ns, spec, Truth(output))

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """Nothing: the loop is open."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Sample statistics, what was done to the trace, and every setting, ready for JSON."""
        c = self._columns
        return {
            **arrival_statistics(c.times),
            "prompt_tokens": statistics(c.prompts),
            "output_tokens": statistics(c.outputs),
            "max_new_tokens": statistics(self._caps),
            "length_capped": sum(o > cap for o, cap in zip(c.outputs, self._caps, strict=True)),
            "turns": 1,
            "cancellations": 0,
            **self._done,
            "settings": json_settings(self._config),
        }

    def _stream(self, quantity: str) -> Random:
        """The generator of one quantity, at its start."""
        return Random(f"{self.root}/{quantity}")

    def _fit(self, limit: int) -> dict[str, Any]:
        """Apply ``over_length``; how many requests it met."""
        c, config = self._columns, self._config
        over = array("q", (i for i in range(len(c)) if self._served(i) > limit))
        counts = {"rule": config.over_length, "limit": limit, "requests": len(over)}
        if not over:
            return counts
        if config.over_length == "refuse" or limit < 2:
            raise self._too_long(over[0], limit)
        if config.over_length == "drop":
            if len(over) == len(c):
                raise self._too_long(over[0], limit, f"all {len(c)} requests are")
            gone = set(over)
            self._caps = array("i", [cap for i, cap in enumerate(self._caps) if i not in gone])
            c.keep(lambda i: i not in gone)
            return counts
        longest = min(config.max_prompt_tokens or limit * 3 // 4, limit - 1)
        cut_prompts = cut_outputs = 0
        for i in over:
            if c.prompts[i] > longest:
                c.prompts[i] = longest
                cut_prompts += 1
            if self._served(i) > limit:
                c.outputs[i] = limit - c.prompts[i]
                cut_outputs += 1
        counts |= {"max_prompt_tokens": longest, "prompts_cut": cut_prompts, "outputs_cut": cut_outputs}
        log.log(
            logging.WARNING if len(over) * 20 > len(c) else logging.INFO,
            "%s: requests longer than the model's %d tokens are cut: %d of %d (over_length)",
            self._where,
            limit,
            len(over),
            len(c),
        )
        return counts

    def _served(self, place: int) -> int:
        """Tokens of a request, prompt and output."""
        return self._columns.prompts[place] + min(self._columns.outputs[place], self._caps[place])

    def _too_long(self, place: int, limit: int, whose: str = "") -> WorkloadError:
        first = f"that of r{place}, the first: " if whose else ""
        rules = [rule for rule in ("clip", "drop") if rule != self._config.over_length]
        return WorkloadError(
            f"{whose or f'request r{place} is'} longer than the model allows",
            where=f"{self._where}, over_length: {self._config.over_length}",
            why=f"{first}prompt of {self._columns.prompts[place]} tokens plus "
            f"{self._served(place) - self._columns.prompts[place]} of output is {self._served(place)}, limit "
            f"{limit} (max_model_len)",
            do=f"set workload.over_length to {' or '.join(rules)}, scale lengths (workload.prompt_scale, "
            "workload.output_scale), or choose a model with a longer context",
        )

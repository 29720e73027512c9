"""Requests by number, drawn as far as somebody asks: lengths, caps, classes; no times."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from servelab.core.api import Context, RequestSpec, Truth, WorkloadError
from servelab.plugins.workloads._arrivals import NS
from servelab.plugins.workloads._describe import statistics
from servelab.plugins.workloads._laws import LengthLaw, Sampler, chooser
from servelab.plugins.workloads._requests import Kind, Requests

Time = Callable[[int], int]
"""When a request of a number comes, in nanoseconds."""


class Population:
    """The requests of a workload, numbered from 0.

    Every quantity has a random stream of its own and the ``i``-th number of it is for request ``i``, whatever
    the laws are: changing one law leaves every other quantity as it was. A request is the same in whatever
    order requests are asked for.

    Args:
        config: what requests are like.
        samples: outputs drawn from each prompt.
        stream: the generator of a quantity, at its start.
        ctx: whose limits they have to fit.

    Raises:
        WorkloadError: a prompt that all share leaves no room under ``over_length: clip``.
    """

    def __init__(self, config: Requests, samples: int, stream: Callable[[str], Random], ctx: Context) -> None:
        self.config, self.samples = config, samples
        self._where, self._limit = f"workload {ctx.name!r}", ctx.limits.max_model_len
        self._max_position = ctx.model.max_position
        phases = config.kinds()
        self.kinds = [kind for kinds in phases for kind in kinds]
        self._choose = [chooser([kind.request_class.weight for kind in kinds]) for kinds in phases]
        self._first = [sum(map(len, phases[:p])) for p in range(len(phases))]
        """Per phase, the index of its first kind."""
        self._by_time = any(phase.after_s is not None for phase in config.phases)
        self._starts = [phase.after or round((phase.after_s or 0) * NS) for phase in config.phases]
        self._slos = [kind.request_class.slo(config.slo_scale) for kind in self.kinds]

        names = ["class", "prompt", "output", *(f"output/{k}" for k in range(1, samples)), "cap"]
        self._uniform = {name: stream(name).random for name in names}
        self._samplers = {
            "prompt": self._each(lambda kind: kind.prompt),
            "cap": self._each(lambda kind: kind.cap),
            **dict.fromkeys(names[2:-1], self._each(lambda kind: kind.output)),
        }
        self.kind_of, self.prompts, self.caps = array("q"), array("q"), array("q")
        self.outputs = [array("q") for _ in range(samples)]
        """True lengths, of each sample."""
        self.clipped = 0
        """Requests cut to the model's length."""
        self._longest_prompt = min(self._limit * 3 // 4, self._limit - 1)
        if config.over_length == "clip" and config.prefix_tokens >= self._longest_prompt:
            raise WorkloadError(
                f"prefix_tokens={config.prefix_tokens} leaves no room for prompts",
                where=self._where,
                why=f"over_length 'clip' cuts prompts to {self._longest_prompt} tokens, three quarters of "
                f"{self._limit} (max_model_len)",
                do="lower prefix_tokens, or choose a model with a longer context",
            )

    def __len__(self) -> int:
        """Requests drawn so far."""
        return len(self.prompts)

    @property
    def by_time(self) -> bool:
        """Whether what a request is like depends on when it comes."""
        return self._by_time

    def extend(self, n: int, time: Time | None = None) -> None:
        """Draw until there are ``n``.

        Args:
            n: how many.
            time: when each comes; asked only if phases begin at times.

        Raises:
            WorkloadError: one is longer than the model allows, under ``over_length: refuse``.
        """
        start = len(self)
        if n <= start:
            return
        kinds = self._kinds(start, n, time)
        self.kind_of.extend(kinds)
        prefix = self.config.prefix_tokens
        self.prompts.extend(length + prefix for length in self._column("prompt", kinds))
        self.caps.extend(self._column("cap", kinds))
        for k, column in enumerate(self.outputs):
            column.extend(self._column(f"output/{k}" if k else "output", kinds))
        self._fit(start)

    def refuse_laws(self) -> None:
        """Whether every request that could ever be drawn fits the model.

        Raises:
            WorkloadError: one might not, under ``over_length: refuse``.
        """
        for kind in self.kinds:
            prompt = self.config.prefix_tokens + kind.prompt.highest
            output = min(kind.output.highest, kind.cap.highest)
            if self.config.over_length == "refuse" and prompt + output > self._limit:
                raise self._too_long("a request may be longer than the model allows", kind, prompt, output)

    def spec(self, number: int, id: str, ids: Sequence[int] | None) -> RequestSpec:
        """What the client asks for."""
        which = self.kind_of[number]
        about = self.kinds[which].request_class
        return RequestSpec(
            id=id,
            prompt_tokens=self.prompts[number],
            max_new_tokens=self.caps[number],
            prompt_ids=ids,
            tenant=about.tenant,
            request_class=about.name,
            priority=about.priority,
            slo=self._slos[which],
            n=self.samples,
        )

    def truth(self, number: int) -> Truth:
        """What will really happen."""
        first, *further = self.outputs
        return Truth(first[number], tuple(each[number] for each in further))

    def describe(self) -> dict[str, Any]:
        """Statistics of the requests drawn so far, for the workload's ``describe()``."""
        total = sum(self.prompts)
        return {
            "prompt_tokens": statistics(self.prompts),
            "output_tokens": statistics([o for each in self.outputs for o in each]),
            "max_new_tokens": statistics(self.caps),
            "length_capped": sum(
                o > c for each in self.outputs for o, c in zip(each, self.caps, strict=True)
            ),
            "clipped": self.clipped,
            "shared_prefix_share": self.config.prefix_tokens * (len(self) - 1) / total,
            "classes": self._class_counts(),
        }

    def _class_counts(self) -> list[dict[str, Any]]:
        counts: Counter[tuple[str, str]] = Counter()
        for which, times in Counter(self.kind_of).items():
            counts[_group(self.kinds[which])] += times
        groups = dict.fromkeys(map(_group, self.kinds))
        return [{"name": name, "tenant": tenant, "requests": counts[name, tenant]} for name, tenant in groups]

    def _each(self, law: Callable[[Kind], LengthLaw]) -> list[Sampler]:
        return [law(kind).sampler() for kind in self.kinds]

    def _kinds(self, start: int, n: int, time: Time | None) -> list[int]:
        draw = self._uniform["class"]
        if not self._starts:
            choose = self._choose[0]
            return [choose(draw()) for _ in range(start, n)]
        found = []
        for number in range(start, n):
            at = number if not self._by_time or time is None else time(number)
            phase = bisect_right(self._starts, at)
            found.append(self._first[phase] + self._choose[phase](draw()))
        return found

    def _column(self, quantity: str, kinds: list[int]) -> Iterable[int]:
        draw, samplers = self._uniform[quantity], self._samplers[quantity]
        if len(samplers) == 1:
            sample = samplers[0]
            return [sample(draw()) for _ in kinds]
        return [samplers[kind](draw()) for kind in kinds]

    def _fit(self, start: int) -> None:
        """What a request really takes is its prompt and the output it is allowed."""
        limit, prompts, caps = self._limit, self.prompts, self.caps
        longest = (
            self.outputs[0] if len(self.outputs) == 1 else list(map(max, zip(*self.outputs, strict=True)))
        )
        for i in range(start, len(self)):
            served = min(longest[i], caps[i])
            if prompts[i] + served <= limit:
                continue
            if self.config.over_length == "refuse":
                kind = self.kinds[self.kind_of[i]]
                raise self._too_long(
                    f"request r{i} is longer than the model allows", kind, prompts[i], served
                )
            self.clipped += 1
            prompts[i] = min(prompts[i], self._longest_prompt)
            for each in self.outputs:
                each[i] = min(each[i], limit - prompts[i])

    def _too_long(self, what: str, kind: Kind, prompt: int, served: int) -> WorkloadError:
        config, limit = self.config, self._limit
        longest_output = min(kind.output.highest, kind.cap.highest)
        longest = config.prefix_tokens + kind.prompt.highest + longest_output
        prefix = f" with {config.prefix_tokens} of prefix_tokens" if config.prefix_tokens else ""
        if limit < self._max_position:
            otherwise = f"raise engine.max_model_len (the model allows {self._max_position})"
        else:
            otherwise = "choose a model with a longer context"
        return WorkloadError(
            what,
            where=f"{self._where}, prompt_length {kind.prompt}, output_length {kind.output}",
            why=f"prompt of {prompt} tokens{prefix} plus {served} of output is {prompt + served}, "
            f"limit {limit} (max_model_len)",
            do=f"these laws reach {longest} tokens: lower them to {limit} together (max of prompt_length "
            f"and output_length, or their values), cut requests (workload.over_length=clip), or {otherwise}",
        )


def _group(kind: Kind) -> tuple[str, str]:
    return kind.request_class.name, kind.request_class.tenant

"""Conformance of workloads: traffic in order, repeatable, possible, that keeps true lengths to itself."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import count, islice
from types import FrameType
from typing import Any, ClassVar, get_args

import pytest

from servelab.core.context import seeded
from servelab.core.errors import ServeLabError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.records import Ending, RequestFinished
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth, sample_id
from servelab.core.testing.parts import parts_like
from servelab.core.testing.suite import PluginSuite
from servelab.core.testing.traps import forbidden_calls
from servelab.core.testing.words import Words

MOST = 5000
"""Items of a workload that are looked at; longer ones are cut there."""
SAMPLE = 240
"""Requests that are enough to see whether caps follow true lengths; several seeds are put together."""
ENDINGS: tuple[Ending, ...] = get_args(Ending)
TELLING = ("prompt_tokens", "prompt_ids", "context_tokens")
"""Fields that may go with output lengths: people who ask at length are answered at length."""


@dataclass
class Played:
    """What a workload did when everything it asked was answered."""

    items: list[Arrival | Cancel]
    """Of ``arrivals()``."""
    reactions: list[tuple[RequestFinished, list[Arrival | Cancel]]] = field(default_factory=list)

    @property
    def every(self) -> list[Arrival | Cancel]:
        return [*self.items, *(x for _, items in self.reactions for x in items)]

    @property
    def arrivals(self) -> list[Arrival]:
        return [x for x in self.every if isinstance(x, Arrival)]


class WorkloadSuite(PluginSuite):
    """What is true of every workload.

    Keep it small: settings of about 20 to 100 requests show as much as those of a million.
    """

    kind: ClassVar[str] = "workload"
    contract: ClassVar[str] = "servelab/core/families/workload.py"
    max_model_len: ClassVar[int] = 4096
    """Prompt plus output that the toy model allows."""
    other_lengths: ClassVar[Mapping[str, Any] | None] = None
    """Settings that change true output lengths and nothing else. None: ``output_length: 1``, where there is
    such a setting."""

    # ------------------------------------------------------------- requests

    def test_times_are_in_order(self) -> None:
        """Times are whole nanoseconds from 0 on, and ``arrivals()`` never goes back."""
        played, last = self._played(), 0
        for x in played.every:
            if type(x.time_ns) is not int or x.time_ns < 0:
                self.fail(
                    f"{self.name}: {_named(x)} comes at {x.time_ns!r}",
                    rule="times are whole nanoseconds from the start of the run",
                    do="round to an int, and begin at 0 or later",
                )
        for x in played.items:
            if x.time_ns < last:
                self.fail(
                    f"{self.name}: {_named(x)} comes at {x.time_ns} ns, after an item at {last} ns",
                    rule="arrivals: requests and cancellations in time order",
                    do="sort by time before yielding, cancellations included",
                )
            last = x.time_ns

    def test_ids_are_unique(self) -> None:
        """No two requests of a run have one id, nor the id of a sample of another."""
        seen: set[str] = set()
        for x in self._played().arrivals:
            ids = [sample_id(x.spec.id, k) for k in range(x.spec.n)]
            if again := seen.intersection(ids):
                self.fail(
                    f"{self.name}: a second request is called {sorted(again)[0]!r}",
                    rule="ids are unique over the run",
                    do="number requests through the whole run, reactions included; no '#' in ids",
                )
            seen.update(ids)

    def test_lengths_are_possible(self) -> None:
        """Prompts, caps and samples are at least 1, and what is served fits the model."""
        for x in self._played().arrivals:
            spec = x.spec
            for name in ("prompt_tokens", "max_new_tokens", "n"):
                value = getattr(spec, name)
                if type(value) is not int or value < 1:
                    self.fail(
                        f"{self.name}: request {spec.id} has {name}={value!r}",
                        rule="a request has a prompt, may say something, and has at least one output",
                        do="draw whole numbers from 1 on: clip what a law gives below that",
                    )
            served = min(spec.max_new_tokens, _longest(x.truth))
            if spec.prompt_tokens + served > self.max_model_len:
                self.fail(
                    f"{self.name}: request {spec.id} has {spec.prompt_tokens} prompt tokens and {served} of "
                    f"output, the model allows {self.max_model_len} together",
                    rule="prompt plus output fit ctx.limits.max_model_len",
                    do="check in the constructor, and raise WorkloadError with the setting to lower",
                )
            if not 0 <= spec.context_tokens <= spec.prompt_tokens:
                self.fail(
                    f"{self.name}: {spec.context_tokens} context tokens of {spec.prompt_tokens} in {spec.id}",
                    rule="context_tokens: leading prompt tokens that repeat the program's previous turn",
                    do="count them within the prompt",
                )

    def test_prompt_ids(self) -> None:
        """As many as ``prompt_tokens``, all in the vocabulary; there, if declared."""
        vocab = self._model().vocab
        for x in self._played().arrivals:
            ids = x.spec.prompt_ids
            if ids is None:
                if self.provides("workload.prompt_ids"):
                    self.fail(
                        f"{self.name}: request {x.spec.id} has no prompt_ids",
                        rule="workload.prompt_ids: carries real token ids",
                        do="fill RequestSpec.prompt_ids, or take 'workload.prompt_ids' out of the spec",
                    )
                continue
            if len(ids) != x.spec.prompt_tokens:
                self.fail(
                    f"{self.name}: request {x.spec.id} has {len(ids)} prompt_ids and "
                    f"prompt_tokens={x.spec.prompt_tokens}",
                    rule="prompt_ids: token ids, length prompt_tokens",
                    do="set prompt_tokens=len(prompt_ids)",
                )
            if wrong := [i for i in ids if not isinstance(i, int) or not 0 <= i < vocab]:
                self.fail(
                    f"{self.name}: request {x.spec.id} has the prompt id {wrong[0]!r}; ids go from 0 to "
                    f"{vocab - 1}",
                    rule="prompt_ids: token ids for executors that run a model",
                    do="draw ids below ctx.model.vocab, or take them from ctx.tokenizer",
                )

    def test_truths(self) -> None:
        """True lengths are there if declared, at least 1, one for each sample or one for all."""
        for x in self._played().arrivals:
            if x.truth is None:
                if self.provides("workload.truth"):
                    self.fail(
                        f"{self.name}: request {x.spec.id} has no truth",
                        rule="workload.truth: carries output lengths, needed by executors without a model",
                        do="give Arrival a Truth, or take 'workload.truth' out of the spec",
                    )
                continue
            lengths = (x.truth.output_tokens, *x.truth.further)
            if any(type(length) is not int or length < 1 for length in lengths):
                self.fail(
                    f"{self.name}: request {x.spec.id} has the true lengths {lengths}",
                    rule="Truth: output tokens of a request, at least 1",
                    do="draw whole numbers from 1 on",
                )
            if x.truth.further and len(x.truth.further) != x.spec.n - 1:
                self.fail(
                    f"{self.name}: request {x.spec.id} has n={x.spec.n} samples and {len(x.truth.further)} "
                    "further true lengths",
                    rule="Truth.further: of the further samples; empty: all are as long as the first",
                    do="give n - 1 lengths, or none",
                )

    def test_cancellations(self) -> None:
        """A cancellation names a request that has arrived by then."""
        played = self._played()
        arrived = {sample_id(x.spec.id, k): x.time_ns for x in played.arrivals for k in range(x.spec.n)}
        for x in played.every:
            if isinstance(x, Cancel) and not arrived.get(x.request_id, x.time_ns + 1) <= x.time_ns:
                when = arrived.get(x.request_id)
                self.fail(
                    f"{self.name}: request {x.request_id!r} is cancelled at {x.time_ns} ns, "
                    + ("there is no such request" if when is None else f"it arrives at {when} ns"),
                    rule="Cancel: the client gives up on a request",
                    do="cancel by the id of an arrival, at or after its time",
                )

    def test_programs(self) -> None:
        """Turns of a program come in order from 0, and nothing follows the last one."""
        programs: dict[str, list[RequestSpec]] = {}
        for x in self._played().arrivals:
            if x.spec.program is not None:
                programs.setdefault(x.spec.program, []).append(x.spec)
        if not programs:
            if self.provides("workload.programs"):
                self.fail(
                    f"{self.name}: no request belongs to a program",
                    rule="workload.programs: conversations or jobs of several turns",
                    do="set RequestSpec.program and turn, or take 'workload.programs' out of the spec",
                )
            pytest.skip(f"{self.name} has no programs")
        for program, turns in programs.items():
            numbers = [spec.turn for spec in turns]
            if numbers != sorted(numbers) or numbers[0] != 0:
                self.fail(
                    f"{self.name}: program {program} has the turns {numbers}",
                    rule="turn: turn within the program, from 0",
                    do="number the turns of a program from 0, and send each after the one before",
                )
            after = [spec.id for spec in turns[:-1] if spec.is_last_turn and spec.turn < turns[-1].turn]
            if after:
                self.fail(
                    f"{self.name}: {after[0]} says it is the last turn of program {program}, more follow",
                    rule="is_last_turn: whether the program ends with it",
                    do="set is_last_turn=False on all turns but the last",
                )

    # ---------------------------------------------------------- what is hidden

    def test_specs_do_not_tell_the_length(self) -> None:
        """Nothing of what policies see follows the true length, the cap least of all."""
        self._specs_under_other_lengths()
        arrivals: list[Arrival] = []
        for seed in range(8):
            arrivals += [x for x in self._played(seed).arrivals if x.truth is not None]
            if len(arrivals) >= SAMPLE:
                break
        truths = [x.truth.output_tokens for x in arrivals if x.truth is not None]
        if len(set(truths)) < 4 or len(truths) < 30:
            pytest.skip(f"{self.name}: {len(truths)} requests of {len(set(truths))} different true lengths")
        shown = [dict(_numbers(x.spec)) for x in arrivals]
        for name in dict.fromkeys(name for one in shown for name in one):
            values = [one.get(name) for one in shown]
            if None in values:
                continue
            numbers = [value for value in values if value is not None]
            same = sum(a == b for a, b in zip(numbers, truths, strict=True)) / len(truths)
            related = abs(_rank_correlation(numbers, truths))
            cap = name.rpartition(".")[2] in ("max_new_tokens", "max_tokens")
            if same > 0.9 or related > (6 / len(truths) ** 0.5 if cap else 0.95):
                self.fail(
                    f"{self.name}: {name} of a request follows its true length: equal in {100 * same:.0f} % "
                    f"of {len(truths)} requests, rank correlation {related:.2f}; for instance {name}="
                    f"{numbers[0]:g}, {numbers[1]:g}, {numbers[2]:g} where the lengths are {truths[:3]}",
                    rule="RequestSpec never contains the true output length; the cap is drawn independently",
                    do="draw caps from a stream and a law of their own; keep lengths in Arrival.truth only",
                )

    def _specs_under_other_lengths(self) -> None:
        """The same specs when the settings of true lengths change, where there are such settings."""
        other = self.other_lengths
        if other is None:
            other = {"output_length": 1} if hasattr(self._selected[2].config, "output_length") else {}
        if not other:
            return
        changed = type(type(self).__name__, (type(self),), {"config": {**self.config, **other}})()
        pairs = zip(self._played().items, changed._played().items, strict=False)
        for mine, theirs in pairs:
            if _without_truth(mine) != _without_truth(theirs):
                self.fail(
                    f"{self.name}: with other true lengths ({dict(other)}), {_named(mine)} becomes another "
                    f"request: {_difference(mine, theirs)}",
                    rule="RequestSpec never contains the true output length; the cap is drawn independently",
                    do="draw true lengths from a stream of their own, which nothing else reads",
                )

    # ---------------------------------------------------------------- chance

    def test_same_seed_same_traffic(self) -> None:
        """Two workloads of one seed send the same, whatever the global generator says."""
        first = self._play(self.make())
        state = random.getstate()
        random.seed(0x5EED)
        try:
            second = self._play(self.make())
        finally:
            random.setstate(state)
        self._equal(
            first,
            second,
            "two workloads of one seed",
            rule="pure in its seed: the same seed gives the same requests, byte for byte",
            do="draw from ctx.rng only; iterate over no set, read no clock",
        )

    def test_other_seed_other_traffic(self) -> None:
        """Where chance is drawn at all, another seed sends other requests."""
        rng = seeded(self.seed, self.kind, self.spec.name)
        before, drawn = rng.getstate(), [False]
        with _draws(drawn):
            mine = self._play(self.make(rng=rng))
        if rng.getstate() == before and not drawn[0]:
            pytest.skip(f"{self.name} draws nothing")
        other = self._played(self.seed + 1)
        if mine.every == other.every and len(mine.every) > 1:
            self.fail(
                f"{self.name}: seeds {self.seed} and {self.seed + 1} send the same {len(mine.every)} items",
                rule="pure in its seed: chance comes from ctx.rng, which depends on the run's seed",
                do="draw from ctx.rng, not from a generator with a seed of its own",
            )

    def test_arrivals_begin_anew(self) -> None:
        """A second ``arrivals()`` sends the same again, also after a first that was not read to its end."""
        workload = self.make()
        list(islice(workload.arrivals(), 2))
        first, second = (list(islice(workload.arrivals(), MOST)) for _ in range(2))
        whole = Played(list(islice(self.make().arrivals(), MOST)))
        for again in (first, second):
            self._equal(
                whole,
                Played(again),
                "the first arrivals() of a workload and a later one",
                rule="arrivals: each call begins anew",
                do="draw what a request needs at construction, or from a stream that each call restarts",
            )

    def test_touches_no_clock_and_no_global_chance(self) -> None:
        """Neither clocks, nor the global generator, nor the environment."""
        found: list[str] = []
        self.make()  # imports and reads the registry, once
        with forbidden_calls(found.append):
            workload = self.make()
            for _ in islice(workload.arrivals(), 200):
                pass
            workload.describe()
        if found:
            self.fail(
                f"{self.name} calls {', '.join(dict.fromkeys(found))}",
                rule="no clock, no chance but its own, no environment in a plugin",
                do="use ctx.rng for chance, times of records for time, settings for everything else",
            )

    # -------------------------------------------------------------- reactions

    def test_reactions(self) -> None:
        """What follows from an end comes at or after it, for every sort of end; only if declared."""
        declared, reacted = self.provides("workload.closed_loop"), 0
        for outcome in ENDINGS:
            played = self._play(self.make(), outcome=outcome)
            for record, items in played.reactions:
                reacted += len(items)
                for x in items:
                    if x.time_ns < record.t_ns:
                        self.fail(
                            f"{self.name}: reacts to {record.request}, which ended ({outcome}) at "
                            f"{record.t_ns} ns, with {_named(x)} at {x.time_ns} ns",
                            rule="react: what follows from a terminal record, at or after its time",
                            do="count pauses from finished.t_ns",
                        )
            if reacted and not self.may("workload.closed_loop"):
                self.fail(
                    f"{self.name}: react() sends requests, and the spec does not say so",
                    rule="workload.closed_loop: reacts to completions",
                    do="declare 'workload.closed_loop'",
                )
        if declared and not reacted:
            self.fail(
                f"{self.name}: declares 'workload.closed_loop', and react() sends nothing, whatever ends",
                rule="workload.closed_loop: reacts to completions",
                do="send the next request from react(), or take the capability out of the spec",
            )

    # ------------------------------------------------------------ description

    def test_description(self) -> None:
        """``describe()`` is JSON, the same before and after, and its counts are those of the traffic."""
        workload = self.make()
        before = workload.describe()
        try:
            text = json.dumps(before, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as exc:
            self.fail(
                f"{self.name}: describe() is not JSON: {exc}",
                rule="describe: statistics and settings for the run card, JSON types only",
                do="write infinity as text, enums and paths as str, keys as str",
                cause=exc,
            )
        played = self._play(workload)
        if json.dumps(workload.describe(), allow_nan=False, sort_keys=True) != text:
            self.fail(
                f"{self.name}: describe() says something else after the requests were sent",
                rule="describe: of the whole workload; it is asked before the run",
                do="compute it from what was drawn at construction",
            )
        truths = [_true(x.truth, k) for x in played.arrivals if x.truth for k in range(x.spec.n)]
        counted: dict[str, int] = {
            "requests": len(played.arrivals),
            "cancellations": sum(isinstance(x, Cancel) for x in played.every),
            "prompt_tokens.total": sum(x.spec.prompt_tokens for x in played.arrivals),
            "max_new_tokens.total": sum(x.spec.max_new_tokens for x in played.arrivals),
            "output_tokens.total": sum(truths),
        }
        if len(played.every) >= MOST:
            return
        for name, value in counted.items():
            outer, _, inner = name.partition(".")
            said = before.get(outer)
            said = said.get(inner) if inner and isinstance(said, Mapping) else None if inner else said
            if isinstance(said, int | float) and said != value:
                self.fail(
                    f"{self.name}: describe() says {name}={said}, its traffic has {value}",
                    rule="describe: statistics and settings for the run card",
                    do="count what arrivals() yields, in tokens as it yields them",
                )

    def test_too_long_requests_are_refused(self) -> None:
        """A model that is too short for the traffic is refused at construction, or the traffic fits it."""
        longest = max(
            (
                x.spec.prompt_tokens + min(x.spec.max_new_tokens, _longest(x.truth))
                for x in self._played().arrivals
            ),
            default=0,
        )
        limit = longest // 2
        if limit < 2:
            pytest.skip(f"{self.name} sends nothing that a short model could not serve")
        limits = replace(self._limits(), max_model_len=limit)
        registry, spec, choice = self._selected
        context = self._context(limits=limits)
        context = replace(context, part=parts_like(context, registry, None))
        try:
            registry.resolve(self.kind, spec.name, "factory")(choice.config, context)
        except ServeLabError as exc:
            if not exc.do:
                self.fail(
                    f"{self.name}: the refusal of a model of {limit} tokens does not say what to do: {exc}",
                    rule="every error says what, where, why and what to do",
                    do="name the settings to lower in WorkloadError(do=...)",
                )
            return
        workload = super().make(**self._known(limits=limits))
        for x in islice(workload.arrivals(), MOST):
            if isinstance(x, Arrival):
                served = min(x.spec.max_new_tokens, _longest(x.truth))
                if x.spec.prompt_tokens + served > limit:
                    self.fail(
                        f"{self.name}: on a model of {limit} tokens, request {x.spec.id} still has "
                        f"{x.spec.prompt_tokens} of prompt and {served} of output",
                        rule="prompt plus output fit ctx.limits.max_model_len",
                        do="check in the constructor, and raise WorkloadError with the setting to lower",
                    )

    # ------------------------------------------------------------- what is used

    def make(self, **context: Any) -> Any:
        """As of every suite, in a context with room for long requests, and a tokenizer if one is required."""
        return super().make(**self._known(**context))

    def _known(self, **context: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"limits": self._limits(), "model": self._model()}
        if "executor.tokenizer" in self.spec.requires:
            known["tokenizer"] = Words()
        return known | context

    def _context(self, **context: Any) -> Any:
        from servelab.core.context import Context

        return Context(
            kind=self.kind,
            name=self.spec.name,
            rng=seeded(self.seed, self.kind, self.spec.name),
            hardware=None,
            seed=self.seed,
            **self._known(**context),
        )

    def _limits(self) -> Limits:
        return Limits(max_batch_tokens=64, max_batch_requests=16, max_model_len=self.max_model_len)

    def _model(self) -> ModelFacts:
        return ModelFacts(
            name="toy",
            layers=2,
            hidden=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn=128,
            vocab=Words.vocab_size if "executor.tokenizer" in self.spec.requires else 97,
            max_position=self.max_model_len,
        )

    def _played(self, seed: int | None = None) -> Played:
        """The traffic of a seed, all answered."""
        seed = self.seed if seed is None else seed
        rng = seeded(seed, self.kind, self.spec.name)
        return self._play(self.make(rng=rng, seed=seed))

    def _play(self, workload: Any, outcome: Ending = "completed") -> Played:
        """Answer every request, one after the other on a device that serves all at once."""
        played = Played(list(islice(workload.arrivals(), MOST)))
        order = count()
        heap = [
            (x.time_ns + 1000, next(order), x)
            for x in played.items
            if isinstance(x, Arrival) and isinstance(x.time_ns, int)
        ]
        heapify(heap)
        total = len(played.items)
        while heap and total < MOST:
            now, _, x = heappop(heap)
            for k in range(x.spec.n if isinstance(x.spec.n, int) else 1):
                out = min(x.spec.max_new_tokens, _true(x.truth, k) if x.truth else 5)
                record = RequestFinished(
                    t_ns=now,
                    request=sample_id(x.spec.id, k),
                    outcome=outcome,
                    reason="stop",
                    output_tokens=out if outcome == "completed" else 0,
                )
                follow = list(workload.react(record))
                total += len(follow)
                if follow:
                    played.reactions.append((record, follow))
                for y in follow:
                    if isinstance(y, Arrival):
                        heappush(heap, (max(now, y.time_ns) + 1000, next(order), y))
        return played

    def _equal(self, one: Played, other: Played, what: str, *, rule: str, do: str) -> None:
        mine, theirs = one.every, other.every
        for a, b in zip(mine, theirs, strict=False):
            if a != b:
                self.fail(f"{self.name}: {what} differ: {_difference(a, b)}", rule=rule, do=do)
        if len(mine) != len(theirs):
            self.fail(f"{self.name}: {what} send {len(mine)} and {len(theirs)} items", rule=rule, do=do)


@contextmanager
def _draws(noted: list[bool]) -> Iterator[None]:
    """Notes whether any generator of module ``random`` is asked while it lasts."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and isinstance(getattr(argument, "__self__", None), random.Random):
            noted[0] = True

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _named(x: Arrival | Cancel) -> str:
    return f"request {x.spec.id}" if isinstance(x, Arrival) else f"the cancellation of {x.request_id}"


def _true(truth: Truth, k: int) -> int:
    """Of sample ``k``; that of the first where it is missing, which ``test_truths`` reports."""
    return truth.of(k).output_tokens if k <= len(truth.further) else truth.output_tokens


def _longest(truth: Truth | None) -> int:
    return max((truth.output_tokens, *truth.further)) if truth else 1


def _without_truth(x: Arrival | Cancel) -> Arrival | Cancel:
    return replace(x, truth=None) if isinstance(x, Arrival) else x


def _difference(a: Arrival | Cancel, b: Arrival | Cancel) -> str:
    """The first field in which two items differ."""
    pairs = [(a, b)]
    if isinstance(a, Arrival) and isinstance(b, Arrival):
        pairs.append((a.spec, b.spec))  # type: ignore[arg-type]
    for x, y in reversed(pairs):
        if type(x) is not type(y):
            return f"{_named(a)} and {_named(b)}"
        for f in fields(x):
            if getattr(x, f.name) != getattr(y, f.name):
                return f"{_named(a)} has {f.name} {getattr(x, f.name)!r:.60} and {getattr(y, f.name)!r:.60}"
    return f"{_named(a)} and {_named(b)}"


def _numbers(spec: RequestSpec) -> Iterator[tuple[str, float]]:
    """Every number that a policy can read from a spec, also those within texts, but for the prompt's."""
    for f in fields(spec):
        if f.name not in TELLING:
            yield from _within(f.name, getattr(spec, f.name))


def _within(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | None):
        return
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, str):
        yield from ((f"{name}[{i}]", int(x)) for i, x in enumerate(re.findall(r"\d{1,18}", value)))
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _within(f"{name}.{key}", one)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _within(f"{name}.{f.name}", getattr(value, f.name))
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value[:8]):
            yield from _within(f"{name}[{i}]", one)


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 where one of them never changes."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(x) + 1) / 2
    over = sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True))
    under = (sum((i - middle) ** 2 for i in x) * sum((j - middle) ** 2 for j in y)) ** 0.5
    return over / under if under else 0.0


def _ranks(values: Iterable[float]) -> list[float]:
    """From 1 on; equal values share the mean of theirs."""
    numbers = list(values)
    places: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(numbers), 1):
        places.setdefault(value, []).append(rank)
    return [sum(places[value]) / len(places[value]) for value in numbers]

"""Conformance of executors: composed into whole runs, every launch compared with the contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import pytest

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.engine.swap import Transfer
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import ServeLabError
from servelab.core.events import Batch
from servelab.core.plan import Outcome
from servelab.core.records import Record, RequestFinished, StepDone, TokensEmitted, TransferEnded
from servelab.core.request import Arrival, Phase
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import ListWorkload
from servelab.core.testing.kvcache import AnyPlans
from servelab.core.testing.suite import PluginSuite, registry_with
from servelab.core.testing.worlds import World, expected_output, worlds

MODEL_LEN = 64
ENGINE = "docs/explanation/engine.md"


class Checked:
    """An executor, every answer of which is compared with what was asked."""

    def __init__(self, suite: ExecutorSuite, inner: Any) -> None:
        self.suite, self.inner = suite, inner
        self.simulated = inner.simulated
        self.transfers = 0
        self.drafted = 0
        self.forked = 0

    def horizon(self, batch: Batch, max_steps: int) -> int:
        steps, again = self.inner.horizon(batch, max_steps), self.inner.horizon(batch, max_steps)
        if type(steps) is not int or not 1 <= steps <= max_steps or again != steps:
            self.suite.fail(
                f"{self.suite.name}: horizon() of at most {max_steps} steps is {steps!r}, asked again "
                f"{again!r}",
                rule="horizon() is pure, and from 1 to max_steps",
                do="return 1 if the executor cannot know when a request ends",
            )
        return int(steps)

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        outcomes = list(self.inner.launch(batch, steps))
        if len(outcomes) != len(batch.requests):
            self.suite.fail(
                f"{self.suite.name}: launch {batch.launch} of {len(batch.requests)} requests has "
                f"{len(outcomes)} "
                "outcomes",
                rule="launch() reports one outcome per request, in the order of the batch",
                do="return Outcome() for a prompt chunk that is not the last",
            )
        for i, outcome in enumerate(outcomes):
            r = batch.requests[i]
            if r.phase is not Phase.FINISHED and r.lease is batch.leases[i]:  # else it is dropped
                self._check(batch, i, steps, outcome)
        return outcomes

    def _check(self, batch: Batch, i: int, steps: int, outcome: Outcome) -> None:
        r, sampled = batch.requests[i], batch.samples[i]
        draft = batch.extras[i].draft if i in batch.extras else 0
        self.drafted += draft
        if not 0 <= outcome.accepted <= draft:
            self.suite.fail(
                f"{self.suite.name}: launch {batch.launch} accepted {outcome.accepted} of {draft} draft "
                f"tokens of request {r.id}",
                rule="an executor accepts a beginning of the draft it was given",
                do="count verified draft tokens up to the first that differs",
            )
        wanted = (outcome.accepted + 1 if draft else steps) if sampled else 0
        if len(outcome.tokens) != wanted:
            self.suite.fail(
                f"{self.suite.name}: launch {batch.launch} of {steps} steps gave request {r.id} "
                f"{len(outcome.tokens)} tokens instead of {wanted}",
                rule="a request with batch.samples[i] yields exactly `steps` tokens (drafts: accepted + "
                "1), others "
                "none",
                do="look at batch.samples, and at the steps of a held launch",
            )
        if any(type(token) is not int or token < 0 for token in outcome.tokens):
            self.suite.fail(
                f"{self.suite.name}: tokens of request {r.id} are {outcome.tokens[:4]}",
                rule="tokens are ids, whole numbers from 0",
                do="convert them: int(token)",
            )
        forks = batch.forks.get(i, ())
        self.forked += len(forks)
        if len(outcome.forks) != len(forks) or any(len(one.tokens) != 1 for one in outcome.forks):
            self.suite.fail(
                f"{self.suite.name}: launch {batch.launch} began {len(outcome.forks)} of {len(forks)} "
                f"samples of request {r.id}",
                rule="where Batch.forks asks for samples, Outcome.forks has the first token of each",
                do="draw one more token from the same logits for each request in batch.forks[i]",
            )

    def transfer(self, transfer: Transfer) -> None:
        self.transfers += 1
        self.inner.transfer(transfer)


class ExecutorSuite(PluginSuite):
    """What is true of every executor; see ``servelab.core.families.executor``.

    Runs are composed of scheduler ``vllm_v1``, kvcache ``paged`` and cost ``scripted`` around the executor.
    One that runs a model overrides ``model_section``.
    """

    kind: ClassVar[str] = "executor"
    contract: ClassVar[str] = "servelab/core/families/executor.py"

    kernel: ClassVar[str | None] = None
    """Attention backend that it runs with."""
    tight: ClassVar[Mapping[str, Any]] = {}
    """Settings that leave 80 tokens of KV memory in pages of 4; empty: it is not tried with little memory."""
    host: ClassVar[Mapping[str, Any]] = {}
    """Settings that give it 160 tokens on the device and 80 on the host; empty: it has no host tier."""

    # ------------------------------------------------------------- running

    def model_section(self) -> dict[str, Any]:
        """The ``model`` section of the configuration; one with files for executors that run models."""
        return {
            **dict(name="toy", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256),
            "max_position": 256,
        }

    def vocab(self) -> int:
        """Prompts have token ids below this number."""
        return 90

    def world(self, name: str) -> World:
        """One of the worlds, with prompts as token ids."""
        world = next(w for w in worlds(self.seed) if w.name == name)
        return self.with_ids(world)

    def with_ids(self, world: World) -> World:
        """The world with prompts as token ids."""
        rng, items = Random(world.name), []
        for x in world.items:
            if isinstance(x, Arrival):
                ids = [rng.randrange(1, self.vocab()) for _ in range(x.spec.prompt_tokens)]
                x = replace(x, spec=replace(x.spec, prompt_ids=ids))
            items.append(x)
        return replace(world, items=tuple(items))

    def composed(self, world: World, *, scheduler: Any = None, **settings: Any) -> Run:
        """A run of the executor with a world as its traffic."""
        own, name = registry_with(type(self))
        truths = frozenset({"workload.truth", "workload.prompt_ids"})
        given = PluginSpec(name="suite", factory="suite:World", provides=truths)
        own.add("workload", given, factory=lambda config, context: ListWorkload(world.items))
        chosen: dict[str, Any] = {
            "name": "vllm_v1",
            "max_num_batched_tokens": world.limits.max_batch_tokens,
            "max_num_seqs": world.limits.max_batch_requests,
        }
        if scheduler is not None:
            provides = frozenset({"scheduler.chunks", "scheduler.swap"})
            spec = PluginSpec(name="suite", factory="suite:Plans", provides=provides)
            own.add("scheduler", spec, factory=lambda config, context: scheduler)
            chosen = {"name": "suite"}
        raw = {
            "scheduler": chosen,
            "kvcache": {"name": "paged", "page_tokens": 4},
            "cost": {"name": "scripted", "step_ns": 1000, "token_ns": 10, "context_ns": 1},
            "executor": {"name": name, **self.config, **settings},
            "workload": {"name": "suite"},
            "task": {"name": "bench"},
            "observers": [],
            "engine": {
                "checks": "full",
                "max_model_len": MODEL_LEN,
                "max_batch_tokens": world.limits.max_batch_tokens,
                "max_batch_requests": world.limits.max_batch_requests,
            },
            "model": self.model_section(),
            **({"kernel": {"name": self.kernel}} if self.kernel else {}),
        }
        _ = self.spec  # skips where the plugin cannot run
        try:
            return compose(validate(raw, own), own)
        except ServeLabError as exc:
            self.fail(
                f"{self.name} cannot be composed into a run: {exc}",
                rule="compose() asks a factory for the executor, and capacity() for its pages",
                where=ENGINE,
                do="mend the plugin, or give 'config', model_section() and 'kernel' of the suite",
                cause=exc,
            )

    def run(self, world: World, **parts: Any) -> tuple[Run, Checked, list[Record]]:
        """A world served to its end."""
        run = self.composed(world, **parts)
        checked, records = Checked(self, run.executor), list[Record]()
        run.engine.token_log = True
        run.engine.horizon = checked.horizon
        driver = VirtualDriver(
            engines=[run.engine],
            executors=[checked],  # type: ignore[list-item]
            costs=[run.cost],
            workload=run.workload,
            truths=run.truths,
            emit=records.append,
        )
        try:
            driver.run()
        except ServeLabError as exc:
            cause = exc.__cause__ or exc
            if isinstance(cause, AssertionError):
                raise cause from None
            self.fail(
                f"{self.name}, in world {world.name!r}: {exc.what}; {exc.why}",
                rule="an executor runs every batch that the engine can make, and reports what came out",
                where=ENGINE,
                do=exc.do or "mend the plugin; the cause is chained",
                cause=cause,
            )
        finally:
            self._close(run.executor)
        return run, checked, records

    def _close(self, executor: Any) -> None:
        try:
            executor.close()
        except Exception as exc:
            self.fail(
                f"{self.name}: close() raised {type(exc).__name__}: {exc}",
                rule="close() is called once, also after errors, and releases everything",
                do="release what is there, whatever state it is in",
                cause=exc,
            )

    def lengths(self, world: World, records: list[Record]) -> None:
        """Every request that completes has its true length."""
        expected, count = expected_output(world), dict[str, int]()
        for x in records:
            if isinstance(x, TokensEmitted):
                count[x.request] = count.get(x.request, 0) + len(x.tokens)
        for x in records:
            if (
                isinstance(x, RequestFinished)
                and x.outcome == "completed"
                and count[x.request] != expected[x.request]
            ):
                self.fail(
                    f"{self.name}: request {x.request} ended after {count[x.request]} tokens instead of "
                    f"{expected[x.request]}, in world {world.name!r}",
                    rule="where the workload states true lengths, requests end there or at their cap",
                    do="set Outcome.finish with the token that ends the request, counting from r.generated",
                )

    def texts(self, records: list[Record]) -> dict[str, list[int]]:
        """Output tokens by request."""
        out: dict[str, list[int]] = {}
        for x in records:
            if isinstance(x, TokensEmitted):
                out.setdefault(x.request, []).extend(x.tokens)
        return out

    # -------------------------------------------------------------- checks

    def test_builds(self) -> None:
        """A run is composed around it, and it is closed without having run anything."""
        self._close(self.composed(self.world("one request")).executor)

    def test_capacity(self) -> None:
        """Whole numbers of pages, one per pool."""
        run = self.composed(self.world("one request"))
        capacity, layout = run.engine.capacity, run.engine.layout
        self._close(run.executor)
        pages = (*capacity.device_pages, *capacity.host_pages)
        if any(type(n) is not int or n < 0 for n in pages) or len(capacity.device_pages) != len(layout.pools):
            self.fail(
                f"{self.name}: capacity() is {capacity} for {len(layout.pools)} pools",
                rule="capacity() says how many pages it holds, per pool and in layout order",
                do="return Capacity(device_pages=(...)) with one whole number per pool",
            )

    def test_describes_itself(self) -> None:
        """What it says of itself goes into JSON."""
        run = self.composed(self.world("one request"))
        describe = getattr(run.executor, "describe", None)
        self._close(run.executor)
        if describe is None:
            pytest.skip(f"{self.name} has no describe()")
        try:
            json.dumps(run.info["weights"])
        except (TypeError, ValueError) as exc:
            self.fail(
                f"{self.name}: describe() is no JSON: {exc}",
                rule="what describe() says is written to results.json",
                do="use texts, numbers, lists and dicts",
                cause=exc,
            )

    def test_serves_the_worlds(self) -> None:
        """Chunks, decodes, holds, samples and clients that give up: every launch yields what was asked."""
        for name in (
            "one request",
            "small batches",
            "burst of long prompts",
            "clients give up",
            "samples that share",
        ):
            world = self.world(name)
            _, checked, records = self.run(world)
            self.lengths(world, records)
            if name == "samples that share" and not checked.forked:
                self.fail(
                    f"{self.name}: no sample was forked in world {name!r}",
                    rule="further samples of a prompt fork from it",
                    do="report their first tokens in Outcome.forks",
                )

    def test_tokens_do_not_depend_on_the_schedule(self) -> None:
        """The same requests in other company, chunks and holds have the same tokens."""
        plenty, small = self.world("small batches"), self.world("plenty of memory")
        alone = self._alone(plenty)
        for limits in (plenty.limits, small.limits):
            together = self.texts(self.run(replace(plenty, limits=limits))[2])
            self._same(alone, together, "alone and in company")

    def _alone(self, world: World) -> dict[str, list[int]]:
        """Each request when nobody else is there."""
        apart = tuple(
            replace(x, time_ns=k * 10**12) for k, x in enumerate(world.items) if isinstance(x, Arrival)
        )
        return self.texts(self.run(replace(world, items=apart))[2])

    def _same(self, one: dict[str, list[int]], other: dict[str, list[int]], what: str) -> None:
        for id, tokens in one.items():
            if other.get(id) != tokens:
                self.fail(
                    f"{self.name}: request {id} has tokens {tokens[:8]} and {other.get(id, [])[:8]}, {what}",
                    rule="greedy tokens do not depend on the schedule",
                    do="compute a row from its own request's tokens, positions and pages only",
                )

    def test_same_run_twice(self) -> None:
        """A second executor gives the same tokens and the same steps."""
        world = self.world("classes of service")
        runs = [self.run(world)[2] for _ in range(2)]
        self._same(self.texts(runs[0]), self.texts(runs[1]), "in two runs of one seed")
        steps = [[x for x in records if isinstance(x, StepDone)] for records in runs]
        if steps[0] != steps[1]:
            self.fail(
                f"{self.name} runs other steps the second time",
                rule="on the virtual clock one seed gives one run",
                where=ENGINE,
                do="keep state in the instance; draw from context.rng or from the seed and the request",
            )

    def test_survives_preemption(self) -> None:
        """With little memory requests are computed again, and have the same tokens."""
        if not self.tight:
            pytest.skip(f"{type(self).__name__}.tight states no settings with little memory")
        world = self.world("little memory")
        _, _, records = self.run(world, **self.tight)
        self.lengths(world, records)
        if not any(x.ev == "preempted" for x in records):
            pytest.skip(f"the settings {self.tight} leave enough memory")
        self._same(self._alone(world), self.texts(records), "computed at once and again after a preemption")

    def test_moves_kv(self) -> None:
        """Swapped to the host and back, in any order with everything else: the same tokens."""
        if not self.host:
            pytest.skip(f"{type(self).__name__}.host states no settings with a host tier")
        kinds = frozenset({"recompute", "swap", "pause", "resume", "swap_in"})
        world, moved = self.world("host tier"), 0
        alone = self._alone(world)
        for seed in range(3):
            _, _, records = self.run(world, scheduler=AnyPlans(seed, kinds, shrinks=False), **self.host)
            moved += sum(isinstance(x, TransferEnded) for x in records)
            self._same(alone, self.texts(records), "left alone and moved between tiers")
        if not moved:
            self.fail(
                f"{self.name} has moved no KV with {self.host}",
                rule="a host tier takes the KV of swapped requests",
                do="report host_pages in capacity()",
            )

    def test_drafts(self) -> None:
        """Of a draft a beginning is accepted, and one token more comes out."""
        if not self.provides("executor.sim"):
            pytest.skip(
                f"{self.name} does not declare 'executor.sim': real models verify drafts with a speculator"
            )
        kinds = frozenset({"draft", "recompute", "resume"})
        world = self.world("plenty of memory")
        _, checked, records = self.run(world, scheduler=AnyPlans(1, kinds, shrinks=False))
        self.lengths(world, records)
        if not checked.drafted:
            pytest.skip("no plan of this world has a draft")

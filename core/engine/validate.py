"""Plan validation: a plan is executed exactly as given, or refused with the exact reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from servelab.core.engine.pages import place
from servelab.core.engine.state import Lease, Request
from servelab.core.errors import PlanError
from servelab.core.plan import Background, Hold, StepPlan, Tokens
from servelab.core.request import Phase, RequestView

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine

ON_DEVICE = (Phase.RUNNING, Phase.PAUSED)


class PlanCheck:
    """Checks one plan against the engine's state. Changes nothing but the duplicate marks of requests."""

    __slots__ = ("engine", "lane", "mark")

    def __init__(self, engine: Engine, lane: int, mark: int) -> None:
        self.engine = engine
        self.lane = lane
        self.mark = mark

    def run(self, plan: StepPlan) -> None:
        """Raises PlanError naming plugin, step, request, value and limit."""
        if not isinstance(plan, StepPlan):
            what = f"plan() returned {type(plan).__name__}"
            self.refuse(what, "a StepPlan is expected", "return StepPlan()")
        try:
            self._check(plan)
        except (TypeError, AttributeError, ValueError) as exc:
            # checking every type beforehand would cost each step; here the plan is known to be malformed
            raise self._error(
                f"the plan is malformed: {type(exc).__name__}: {exc}",
                "one of its parts is not what StepPlan says it is",
                "give views where views are asked for and whole numbers where counts are",
            ) from exc

    def _check(self, plan: StepPlan) -> None:
        freed = self._changes(plan) if self._has_changes(plan) else []
        host_need = [0] * len(self.engine.ledger.pools)
        short = self._swaps(plan, host_need) if plan.preemptions or plan.swap_ins else None
        self._work(plan.work, freed, short)
        if plan.hold is not None:
            self._hold(plan, plan.hold)
        if plan.wake_at is not None:
            if type(plan.wake_at) is not int:
                raise TypeError(f"wake_at is {plan.wake_at!r}, not a whole number of nanoseconds")
            if plan.wake_at <= self.engine.now_ns:
                self.refuse(
                    f"wake_at {plan.wake_at} is not in the future",
                    f"now is {self.engine.now_ns}",
                    "ask for a later time, or plan the work now",
                )

    def _error(self, what: str, why: str, do: str, request: Request | None = None) -> PlanError:
        where = f"scheduler {self.engine.scheduler_name!r}, step {self.engine.step}, lane {self.lane}"
        return PlanError(what, where=where + (f", request {request.id}" if request else ""), why=why, do=do)

    def refuse(self, what: str, why: str, do: str, request: Request | None = None) -> NoReturn:
        raise self._error(what, why, do, request)

    @staticmethod
    def _has_changes(plan: StepPlan) -> bool:
        return bool(plan.preemptions or plan.rejections or plan.aborts or plan.unpins)

    def _own(self, view: object, role: str) -> Request:
        """The engine's request behind a view, checked to be live here and named once."""
        if not isinstance(view, RequestView):
            self.refuse(
                f"{role} names {view!r}", "a request view of this engine is expected", "use view.running"
            )
        r = view._r
        if r.home is not self.engine:
            self.refuse(
                f"{role} names request {r.id}, which is not live here",
                f"its phase is {r.phase}",
                "plan only requests found in this call's queues",
                r,
            )
        if r.mark == self.mark:
            self.refuse(
                f"request {r.id} is named twice in one plan",
                f"second time as {role}",
                "one decision per request and lane",
                r,
            )
        r.mark = self.mark
        if r.launches and r.lane != self.lane:
            self.refuse(
                f"{role} names request {r.id}, in flight on lane {r.lane}",
                f"this plan is for lane {self.lane}",
                "take requests from this call's queues",
                r,
            )
        return r

    def _changes(self, plan: StepPlan) -> list[Lease]:
        """Check rejections, aborts and preemptions; returns the leases that are given up."""
        freed: list[Lease] = []
        dropped: set[str] = set()
        for unpin in plan.unpins:
            lease, heir = self.engine.contexts.held_by(unpin.program)
            if lease is None or unpin.program in dropped:
                self.refuse(
                    f"program {unpin.program!r} keeps no KV that could be dropped",
                    "it was dropped in this plan" if unpin.program in dropped else "it has no context here",
                    "unpin programs of view.contexts, or whose next turn waits with cached_tokens",
                )
            if heir is not None:
                self._own(heir.view, "unpin")
            dropped.add(unpin.program)
            freed.append(lease)
        for verdict in plan.rejections:
            r = self._own(verdict.request, "rejection")
            if r.phase is not Phase.WAITING or r.admitted_ns is not None:
                was = "it was admitted before" if r.phase is Phase.WAITING else f"its phase is {r.phase}"
                self.refuse(f"request {r.id} cannot be rejected", was, "abort admitted requests", r)
            freed.append(r.lease)
        for verdict in plan.aborts:
            r = self._own(verdict.request, "abort")
            if r.admitted_ns is None and r.phase is Phase.WAITING:
                self.refuse(
                    f"request {r.id} cannot be aborted", "it never ran", "reject requests that never ran", r
                )
            freed.append(r.lease)
        for p in plan.preemptions:
            r = self._own(p.request, "preemption")
            if r.phase not in ON_DEVICE or (p.mode == "pause" and r.phase is Phase.PAUSED):
                self.refuse(
                    f"request {r.id} cannot be preempted ({p.mode})",
                    f"its phase is {r.phase}",
                    "preempt running requests (or paused ones, by recompute or swap)",
                    r,
                )
            if p.mode == "recompute":
                freed.append(r.lease)
            elif p.mode == "swap":
                if not self.engine.ledger.has_host_tier:
                    self.refuse(
                        f"request {r.id} cannot be swapped out",
                        "this run has no host tier",
                        "preempt by recompute, or give the executor host pages",
                        r,
                    )
                if r.lease.in_flight:
                    self.refuse(
                        f"request {r.id} cannot be swapped out while it is in flight",
                        f"{r.lease.in_flight} launches or transfers name its pages",
                        "swap it when they have ended",
                        r,
                    )
            elif p.mode != "pause":
                self.refuse(
                    f"unknown preemption mode {p.mode!r}",
                    "known: recompute, swap, pause",
                    "use one of them",
                    r,
                )
        return freed

    def _swaps(self, plan: StepPlan, host_need: list[int]) -> list[int]:
        """Check host room for swap-outs; returns the device pages that swap-ins take, per pool."""
        ledger = self.engine.ledger
        device_need = [0] * len(ledger.pools)
        for p in plan.preemptions:
            if p.mode == "swap":
                for i, table in enumerate(p.request._r.lease.tables):
                    host_need[i] += len(table)
        for i, (need, free) in enumerate(zip(host_need, ledger.free("host"), strict=True)):
            if need > free:
                self.refuse(
                    f"swapping out needs {need} host pages",
                    f"{free} are free in pool {ledger.pools[i].id!r}",
                    "preempt fewer requests by swap",
                )
        for verdict in plan.swap_ins:
            r = self._own(verdict.request, "swap-in")
            if r.phase is not Phase.SWAPPED:
                self.refuse(
                    f"request {r.id} cannot be swapped in", f"its phase is {r.phase}", "use view.swapped", r
                )
            for i, table in enumerate(r.lease.host_tables):
                device_need[i] += len(table)
        return device_need

    def _work(self, work: list[Tokens | Background], freed: list[Lease], taken: list[int] | None) -> None:
        engine = self.engine
        mark, lane = self.mark, self.lane
        running, may_run = Phase.RUNNING, (Phase.RUNNING, Phase.WAITING, Phase.PAUSED)
        tokens = count = 0
        needy: list[tuple[Request, int]] = []
        groups: dict[str, int] = {}
        for item in work:
            if type(item) is not Tokens:
                if isinstance(item, Background):
                    continue
                self.refuse(
                    f"work item {item!r}", "Tokens or Background is expected", "use plan.run(request, n)"
                )
            r = item.request._r
            n = item.n
            # the common case, inlined: live here, first time, not on another lane
            if r.mark == mark or r.home is not engine or (r.launches and r.lane != lane):
                self._own(item.request, "work")
            r.mark = mark
            if item is not r.one:
                _check_types(item)
            if r.phase is not running and r.phase not in may_run:
                self.refuse(
                    f"request {r.id} cannot run",
                    f"its phase is {r.phase}",
                    "swap it in first and wait for the transfer" if r.phase is Phase.SWAPPED else "wait",
                    r,
                )
            count += 1
            tokens += n
            if item.plain:
                if n < 1 or n > r.pending:
                    self._wrong_count(r, n)
                if r.layer_cursor:
                    self._mid_chunk(r)
            else:
                if n < 1:
                    self._wrong_count(r, n)
                tokens += item.draft
                n = self._special(item, r, groups)
            if n > r.slack:
                needy.append((r, n))
        limits = engine.limits
        if tokens > limits.max_batch_tokens:
            self.refuse(
                f"the plan runs {tokens} tokens",
                f"max_batch_tokens is {limits.max_batch_tokens}",
                "plan fewer tokens, or raise engine.max_batch_tokens",
            )
        if count > limits.max_batch_requests:
            self.refuse(
                f"the plan names {count} requests",
                f"max_batch_requests is {limits.max_batch_requests}",
                "plan fewer requests, or raise engine.max_batch_requests",
            )
        if needy or taken:
            self._memory(needy, freed, taken)

    def _memory(self, needy: list[tuple[Request, int]], freed: list[Lease], taken: list[int] | None) -> None:
        ledger = self.engine.ledger
        free = list(ledger.free())
        if freed:
            hits = [r.lease for r, _ in needy if r.lease.hit is not None]
            given = zip(ledger.releasable(freed, hits), ledger.withdrawing(), strict=True)
            free = [have + max(0, n - gone) for have, (n, gone) in zip(free, given, strict=True)]
        need = list(taken) if taken else [0] * len(free)
        scratches = ledger.scratches()
        for lease in freed:
            for scratch, table in zip(scratches or (), lease.tables, strict=False):
                scratch.give_back(() if lease.in_flight else table)
        for r, n in needy:
            missing = ledger.missing(r, n)
            for i, pages in enumerate(missing):
                need[i] += pages
                if need[i] > free[i]:
                    self.refuse(
                        f"the plan needs {need[i]} KV pages up to request {r.id}",
                        f"{free[i]} are free in pool {ledger.pools[i].id!r} after its preemptions",
                        "preempt more, or use view.kv.budget() while planning",
                        r,
                    )
            if scratches is not None and not place(scratches, missing, r.lease.tables):
                self.refuse(
                    f"the plan needs {tuple(missing)} adjacent KV pages for request {r.id}",
                    "they are free, but nowhere side by side",
                    "use view.kv.budget() while planning",
                    r,
                )
        for i, pages in enumerate(need):
            if pages > free[i]:
                self.refuse(
                    f"swapping in needs {pages} KV pages",
                    f"{free[i]} are free in pool {ledger.pools[i].id!r}",
                    "swap in fewer requests",
                )

    def _mid_chunk(self, r: Request) -> NoReturn:
        self.refuse(
            f"request {r.id} is at layer {r.layer_cursor} of a chunk",
            "the chunk must pass all layers before other tokens run",
            f"continue it with Tokens(request, {r.layer_chunk}, layers=({r.layer_cursor}, ...))",
            r,
        )

    def _wrong_count(self, r: Request, n: int) -> NoReturn:
        if r.pending == 0 and n > 0:
            self.refuse(
                f"request {r.id} has nothing to run",
                "its last tokens are in flight, or its output cap is reached in flight",
                "skip requests whose pending_tokens is 0",
                r,
            )
        self.refuse(
            f"request {r.id} is to run {n} tokens",
            f"it has {r.pending} pending",
            "plan between 1 and pending_tokens",
            r,
        )

    def _special(self, item: Tokens, r: Request, groups: dict[str, int]) -> int:
        """Check an item with layers, drafts, rewrites or groups; returns the new tokens it needs room for."""
        if item.barrier_group is not None and groups.setdefault(item.barrier_group, item.n) != item.n:
            self.refuse(
                f"request {r.id} runs {item.n} tokens in barrier group {item.barrier_group!r}",
                f"others of the group run {groups[item.barrier_group]}",
                "give all items of a group the same n",
                r,
            )
        if item.advance != "append":
            if item.layers or item.draft or (item.advance == "rewrite" and item.n > r.computed):
                self.refuse(
                    f"request {r.id} cannot {item.advance} {item.n} tokens",
                    f"{r.computed} are computed; layers and drafts need advance='append'",
                    "rewrite at most computed_tokens",
                    r,
                )
            if item.advance == "rewrite":
                self._still_stored(item.n, r)
                if self.engine.reuse is not None:
                    self.refuse(
                        f"request {r.id} cannot rewrite {item.n} tokens",
                        "a prefix store may hand its pages to others, which must never change",
                        "run without a prefix store (prefix=null)",
                        r,
                    )
            return 0
        if r.layer_cursor and not item.layers:
            self._mid_chunk(r)
        if item.draft < 0 or (item.draft and (item.layers or r.flying or item.n != r.pending)):
            self.refuse(
                f"request {r.id} cannot verify {item.draft} drafts after {item.n} tokens",
                f"drafts follow the last pending token ({r.pending}) of a request that is not in flight",
                "draft only when n equals pending_tokens, without layer ranges",
                r,
            )
        if item.layers:
            return self._layers(item, r, item.layers)
        if item.n > r.pending:
            self._wrong_count(r, item.n)
        return item.n + item.draft

    def _still_stored(self, n: int, r: Request) -> None:
        """What rewritten tokens see must be there, and must not be given up before they run."""
        ledger = self.engine.ledger
        if ledger.windows and (r.flying or not ledger.sees_all(r.lease, r.computed - n)):
            self.refuse(
                f"request {r.id} cannot rewrite {n} tokens",
                f"{r.flying} tokens are in flight, and pools with a window let go of what earlier ones see",
                "rewrite while computed_tokens is below every window and nothing is in flight",
                r,
            )

    def _layers(self, item: Tokens, r: Request, layers: tuple[int, int]) -> int:
        first, end = layers
        last = self.engine.model.layers
        chunk = r.layer_chunk if r.layer_cursor else item.n
        if first != r.layer_cursor or not first < end <= last or item.n != chunk:
            self.refuse(
                f"request {r.id} is to run {item.n} tokens in layers {first} to {end}",
                f"its chunk of {chunk} tokens is at layer {r.layer_cursor} of {last}",
                "continue a chunk at its layer cursor with the same n",
                r,
            )
        if not first and item.n > r.pending:
            self._wrong_count(r, item.n)
        return item.n if not first else 0

    def _hold(self, plan: StepPlan, hold: Hold) -> None:
        if type(hold.max_steps) is not int or type(hold.until_ns) not in (int, type(None)):
            raise TypeError(f"{hold!r}: max_steps and until_ns must be whole numbers")
        if hold.max_steps < 1 or (hold.until_ns is not None and hold.until_ns <= self.engine.now_ns):
            self.refuse(
                f"hold of {hold.max_steps} steps until {hold.until_ns}",
                f"at least 1 step and a time after now ({self.engine.now_ns}) are needed",
                "leave hold=None instead",
            )
        for item in plan.work:
            if type(item) is not Tokens or not item.plain or item.n != 1 or item.request._r.pending != 1:
                self.refuse(
                    f"a hold repeats decodes only, not {item!r}",
                    "a held item runs one token per step and brings one",
                    "hold plans in which every item is Tokens(request, 1) with pending_tokens == 1",
                )


def _check_types(item: Tokens) -> None:
    """Raises TypeError or ValueError for an item that no rule could be applied to."""
    if type(item.n) is not int or type(item.draft) is not int:
        raise TypeError(f"{item!r}: n and draft must be whole numbers")
    if item.advance not in ("append", "rewrite", "none"):
        raise ValueError(f"{item!r}: advance must be 'append', 'rewrite' or 'none'")
    if item.layers is not None:
        first, end = item.layers
        if type(first) is not int or type(end) is not int:
            raise TypeError(f"{item!r}: layers must be two whole numbers")

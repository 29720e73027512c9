"""What a router sees: ``ClusterView`` over what instances last reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from servelab.core.cluster.rows import LiveRow, Member, report
from servelab.core.errors import CapabilityError, PluginError
from servelab.core.families.router import InstanceRow, Role
from servelab.core.request import RequestSpec


class View:
    """One per cluster, reused for every call of the router.

    Args:
        members: every instance there ever was, by id.
        about: per id, the fields of its rows that never change.
        live: instances report whenever something happens to them; else rows are as of the last report.
        sync: brings one instance up to date: steps of its held launches that have ended are committed.
        model: name of the run's model.
        transfer_ns: predicted time of so many bytes from one instance to another.
        kv_bytes: KV bytes of so many tokens.
    """

    def __init__(
        self,
        *,
        members: Sequence[Member],
        about: Sequence[Mapping[str, Any]],
        live: bool,
        sync: Callable[[int], None],
        model: str,
        transfer_ns: Callable[[int, int, int], int],
        kv_bytes: Callable[[int], int],
    ) -> None:
        self._members, self._about, self._live, self._sync = members, about, live, sync
        self._model = model
        self._transfer_ns, self._kv_bytes = transfer_ns, kv_bytes
        self.now_ns = 0
        self.homes: dict[str, int] = {}
        self._active: tuple[int, ...] | None = None
        self._rows: dict[int, LiveRow] = {}
        """Made during this call."""

    def begin(self, now_ns: int) -> None:
        """A call of the router begins."""
        self.now_ns = now_ns

    def end(self) -> None:
        """The call is over: what it was shown counts no more."""
        for row in self._rows.values():
            row.expire()
        self._rows.clear()

    def changed(self) -> None:
        """Instances came, went, or changed their role."""
        self._active = None

    # ------------------------------------------------------- the router's side

    def instances(self, role: Role | None = None, model: str | None = None) -> Sequence[int]:
        if self._active is None:
            self._active = tuple(m.id for m in self._members if m.state == "active")
        if model is not None and model != self._model:
            return ()
        if role is None:
            return self._active
        return tuple(i for i in self._active if self._members[i].role == role)

    def row(self, instance: int) -> InstanceRow:
        member = self._member(instance)
        if not self._live:
            assert member.row is not None
            return member.row
        row = self._rows.get(instance)
        if row is None:
            self._sync(instance)
            row = self._rows[instance] = report(member, self._about[instance], member.reported_ns)
        return row

    def cached_tokens(self, instance: int, request: RequestSpec) -> int:
        engine = self._member(instance).engine
        if not self._live and (engine.reuse is not None or request.context_tokens):
            raise CapabilityError(
                "what an instance has cached is not part of its periodic reports",
                where="ClusterView.cached_tokens",
                why="cluster.report_interval_ms is not 0",
                do="set cluster.report_interval_ms=0, or take a router that does not ask",
            )
        self._sync(instance)
        context = engine.contexts.kept.get(request.program) if request.program is not None else None
        kept = 0 if context is None else min(context.tokens, request.context_tokens)
        kept = max(0, min(kept, request.prompt_tokens - 1))
        return max(kept, engine.reuse.known_tokens(request) if engine.reuse is not None else 0)

    def home(self, session: str) -> int | None:
        return self.homes.get(session)

    def ttft_ns(self, instance: int, request: RequestSpec, cached_tokens: int = 0) -> int:
        row, prices = self.row(instance), self._member(instance).prices
        own = prices.prompt_ns(max(request.prompt_tokens - cached_tokens, 1), cached_tokens)
        return row.prefill_backlog_ns + own

    def tpot_ns(self, instance: int, extra_requests: int = 0, extra_tokens: int = 0) -> int:
        row = self.row(instance)
        requests, context = row.running + extra_requests, row.context_tokens + extra_tokens
        return self._member(instance).prices.decode_ns(requests, context)

    def transfer_ns(self, nbytes: int, source: int, target: int) -> int:
        self._member(source), self._member(target)
        return self._transfer_ns(nbytes, source, target)

    def kv_bytes(self, tokens: int) -> int:
        return self._kv_bytes(tokens)

    def _member(self, instance: int) -> Member:
        if type(instance) is not int or not 0 <= instance < len(self._members):
            raise PluginError(
                f"there is no instance {instance!r}",
                where="ClusterView, asked by the router",
                why=f"there are instances 0 to {len(self._members) - 1}",
                do="ask for ids that view.instances() gives",
            )
        return self._members[instance]

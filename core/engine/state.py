"""The engine's own record of a request. Policies see it through ``RequestView``; executors may read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from servelab.core.plan import Tokens
from servelab.core.records import RequestArrived
from servelab.core.request import Phase, RequestSpec, RequestView

if TYPE_CHECKING:
    from servelab.core.families.prefix import Span


class Lease:
    """The pages one sequence holds, per pool.

    A lease can outlive its request: after release its pages stay fenced until every launch and transfer
    that names them has ended (``in_flight`` is zero).
    """

    __slots__ = (
        "first",
        "hit",
        "holder",
        "host_tables",
        "in_flight",
        "kept",
        "owner",
        "published",
        "released",
        "sources",
        "tables",
    )

    def __init__(self, owner: str, pools: int) -> None:
        self.owner = owner
        self.tables: list[list[int]] = [[] for _ in range(pools)]
        self.host_tables: list[list[int]] = [[] for _ in range(pools)]
        self.first = [0] * pools
        """Per pool, which page of the sequence its table begins with: those before fell out of the window."""
        self.in_flight = 0
        self.released = False
        self.sources: list[tuple[int, int, int]] = []
        """(pool, page, landings): pages it has given up while launches in flight read them (the window moved
        on, or they are copied from) or write them (trimmed), and how many landings from now the last does."""

        # with a prefix store only
        self.hit: Sequence[Span] | None = None
        """What the store has for a waiting request, while a plan is made. Its tables show these pages without
        holding them."""
        self.holder: str | None = None
        """Its name with the store, while it uses pages that the store holds too."""
        self.published = 0
        """Leading full pages that were offered to the store, or came from it."""
        self.kept: list[tuple[int, int]] = []
        """(pool, page): gone from its tables, held until the store knows that it has let go."""


def arrival_record(spec: RequestSpec, t_ns: int, engine: int, parent: str | None = None) -> RequestArrived:
    """What is told of a request when it arrives."""
    slo = spec.slo
    return RequestArrived(
        t_ns=t_ns,
        engine=engine,
        request=spec.id,
        prompt_tokens=spec.prompt_tokens,
        max_new_tokens=spec.max_new_tokens,
        request_class=spec.request_class,
        priority=spec.priority,
        tenant=spec.tenant,
        program=spec.program,
        turn=spec.turn,
        slo_ttft_ns=slo.ttft_ns if slo else None,
        slo_tpot_ns=slo.tpot_ns if slo else None,
        slo_e2el_ns=slo.e2el_ns if slo else None,
        parent=parent,
        slo_tbt_ns=slo.tbt_ns if slo else None,
    )


class Request:
    """Mutable state, written only by the engine and the ledger. Counts in tokens, times in nanoseconds.

    Always: ``pending = prompt + generated + expected - computed - flying`` (0 once the output cap is
    reached in flight), and ``slack = capacity of the held pages - computed - flying``.
    """

    __slots__ = (
        "accepted",
        "admitted_ns",
        "arrival_ns",
        "cached",
        "computed",
        "drafted",
        "expected",
        "flying",
        "forks",
        "generated",
        "home",
        "id",
        "lane",
        "launches",
        "layer_chunk",
        "layer_cursor",
        "lease",
        "mark",
        "max_new_tokens",
        "memo",
        "one",
        "output",
        "pending",
        "phase",
        "preemptions",
        "program_arrival_ns",
        "prompt_tokens",
        "seen",
        "slack",
        "spec",
        "token_times",
        "view",
    )

    def __init__(self, spec: RequestSpec, arrival_ns: int, max_new_tokens: int, lease: Lease) -> None:
        self.id = spec.id
        self.home: object = None
        """The engine it is live in; None once it has ended."""
        self.spec = spec
        self.prompt_tokens = spec.prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.arrival_ns = arrival_ns
        self.program_arrival_ns = arrival_ns
        self.admitted_ns: int | None = None
        self.phase = Phase.WAITING
        self.computed = 0
        self.generated = 0
        self.flying = 0
        self.expected = 0
        """Output tokens that launches in flight will bring."""
        self.pending = spec.prompt_tokens
        self.slack = 0
        self.layer_cursor = 0
        self.layer_chunk = 0
        self.cached = 0
        self.preemptions = 0
        self.drafted = 0
        self.accepted = 0
        self.token_times: list[int] = []
        self.output: list[int] = []
        self.forks: list[Request] = []
        """Further samples of its prompt that start when it is computed."""
        self.memo: dict[str, Any] | None = None
        """What a prefix store derived from its tokens (hashes)."""
        self.lease = lease
        self.launches = 0
        """Launches in flight that name it, all on ``lane``."""
        self.lane = 0
        self.mark = -1
        """Number of the last plan that named it, to find duplicates."""
        self.view = RequestView(self)
        self.seen = self.view
        """What schedulers are shown: the view, or with ``checks=full`` one that expires with the call."""
        self.one = Tokens(self.view, 1)

    @property
    def num_forks(self) -> int:
        return len(self.forks)

    def untie(self) -> None:
        """It has ended: nothing in it refers back to it, so it goes without a garbage collector's help."""
        del self.view, self.seen, self.one

    def forget_progress(self, lease: Lease) -> int:
        """Back to nothing computed, output so far kept (recompute). Returns the tokens lost."""
        lost = self.computed
        self.computed = self.flying = self.expected = self.launches = 0
        self.layer_cursor = self.layer_chunk = self.cached = self.slack = 0
        self.pending = self.prompt_tokens + self.generated
        self.lease = lease
        return lost

"""Swaps: pages of a request on their way between the device and the host tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from servelab.core.engine.state import Lease, Request
from servelab.core.errors import LedgerError

if TYPE_CHECKING:
    from servelab.core.engine.ledger import Ledger


@dataclass(slots=True)
class Transfer:
    """Pages on their way between tiers. Both sides are fenced until it ends."""

    id: int
    request_id: str
    direction: Literal["out", "in"]
    lease: Lease
    source: list[list[int]]
    """Pages read, per pool."""
    destination: list[list[int]]
    """Pages written, per pool, same lengths."""
    bytes: int
    calls: int
    """Separate copies this takes if adjacent pages move together."""


def swap_out(ledger: Ledger, r: Request) -> Transfer:
    """Start moving a request's pages to the host tier; raises if the host lacks room."""
    lease = r.lease
    _need_host(ledger, [len(t) for t in lease.tables], r.id)
    source = [list(t) for t in lease.tables]
    for i, table in enumerate(source):
        lease.host_tables[i] = ledger.host[i].take(len(table), r) if table else []
    return _transfer(ledger, r, "out", source, [list(t) for t in lease.host_tables])


def swap_in(ledger: Ledger, r: Request) -> Transfer:
    """Start moving a swapped request's pages back to the device."""
    lease = r.lease
    for i, table in enumerate(lease.host_tables):
        left = ledger.device[i].left()
        if len(table) > left:
            raise LedgerError(
                f"request {r.id} cannot be swapped in",
                where=f"pool {ledger.pools[i].id!r}",
                why=f"it needs {len(table)} pages, {left} are free",
            )
    for i, table in enumerate(lease.host_tables):
        lease.tables[i] = ledger.device[i].take(len(table), r) if table else []
    return _transfer(ledger, r, "in", [list(t) for t in lease.host_tables], [list(t) for t in lease.tables])


def finish_transfer(ledger: Ledger, transfer: Transfer, r: Request | None) -> None:
    """The bytes are in place: the side they came from is released. ``r`` is None if its request ended."""
    lease = transfer.lease
    out = transfer.direction == "out"
    tables, tiers = (lease.tables, ledger.device) if out else (lease.host_tables, ledger.host)
    for i, pages in enumerate(transfer.source):
        if pages:
            tiers[i].drop(pages)
        tables[i] = []
    if out and lease.holder is not None:
        ledger.leave_store(lease)
    ledger.landed([lease])
    if r is not None:
        r.slack = 0 if out else ledger.slack_of(r)


def _transfer(
    ledger: Ledger, r: Request, direction: Literal["out", "in"], source: list[list[int]], to: list[list[int]]
) -> Transfer:
    r.lease.in_flight += 1
    ledger.transfers += 1
    size = sum(len(t) * p.bytes_per_page for t, p in zip(source, ledger.pools, strict=True))
    calls = sum(_runs(a, b) for a, b in zip(source, to, strict=True))
    return Transfer(ledger.transfers, r.id, direction, r.lease, source, to, size, calls)


def _need_host(ledger: Ledger, needs: Sequence[int], request_id: str) -> None:
    for i, need in enumerate(needs):
        if need > ledger.host[i].free:
            raise LedgerError(
                f"request {request_id} cannot be swapped out",
                where=f"host tier of pool {ledger.pools[i].id!r}",
                why=f"it needs {need} pages, {ledger.host[i].free} are free",
                do="preempt by recompute, or give the executor more host pages",
            )


def _runs(source: Sequence[int], destination: Sequence[int]) -> int:
    """Copies needed when pages adjacent on both sides move together."""
    pairs = list(zip(source, destination, strict=True))
    return sum(
        k == 0 or a != pairs[k - 1][0] + 1 or b != pairs[k - 1][1] + 1 for k, (a, b) in enumerate(pairs)
    )

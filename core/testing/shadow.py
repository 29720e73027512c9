"""A shadow of KV memory: which text every slot of every page stands for.

It writes where launches write, copies where they copy and moves with transfers. A request reads the right KV
if each slot it reads stands for its own text up to there, whoever wrote it.
"""

from __future__ import annotations

from typing import Any

from servelab.core.engine.engine import Engine
from servelab.core.engine.state import Lease, Request
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch

WRONG = -1
"""Stands for KV of tokens that turned out not to be the text (drafts)."""


class Texts:
    """Numbers for beginnings of texts: two are equal if and only if the texts up to there are.

    Args:
        tenants: equal texts of two tenants are not the same.
    """

    def __init__(self, *, tenants: bool) -> None:
        self._tenants = tenants
        self._numbers: dict[tuple[Any, int], int] = {}
        self._of: dict[str, list[int]] = {}

    def of(self, r: Request, end: int) -> int:
        """The number of a request's text of ``end`` tokens. Output is counted as ``ToyExecutor`` makes it."""
        spec, chain = r.spec, self._of.setdefault(r.id, [])
        while len(chain) < end:
            at = len(chain)
            if at >= r.prompt_tokens:
                token = 1000 * spec.sample + at - r.prompt_tokens
            elif spec.prompt_ids is None:
                token = at
            else:
                token = spec.prompt_ids[at]
            whose = spec.tenant if self._tenants else ""
            root = (whose, None) if spec.prompt_ids is not None else (whose, r.id.partition("#")[0])
            before = chain[-1] if chain else root
            chain.append(self._numbers.setdefault((before, token), len(self._numbers)))
        return chain[end - 1]


class Launched:
    """A launch, with page tables as they were when it was sent."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.begun = False
        self.first = [list(lease.first) for lease in batch.leases]
        self.tables = [[list(t) for t in lease.tables] for lease in batch.leases]

    def page(self, row: int, pool: int, index: int, now_first: list[int], now: list[list[int]]) -> int | None:
        """The page that holds page ``index`` of the sequence; None: nobody counts on it any more.

        ``now_first`` and ``now`` are the tables when it ended: pages taken while a held launch went on.
        """
        for first, table in (
            (self.first[row][pool], self.tables[row][pool]),
            (now_first[pool], now[pool]),
        ):
            if 0 <= index - first < len(table):
                return table[index - first]
        return None


class Shadow:
    """All pools on both tiers.

    Args:
        eager: launches copy and write their first step as soon as they begin; else when they end. Both are
            right for an executor.
        tenants: tenants share no pages.
    """

    def __init__(self, engine: Engine, *, eager: bool, tenants: bool = True) -> None:
        self.engine, self.eager = engine, eager
        self.texts = Texts(tenants=tenants)
        self.copies = 0
        self._slots: dict[tuple[int, str, int, int], int] = {}
        self._due: dict[tuple[int, int], int] = {}
        """(pool, page) that will be a copy, of which page: its launch has been sent and does not run yet."""
        self._sizes = [pool.page_tokens for pool in engine.layout.pools]
        self._released: dict[int, tuple[list[int], list[list[int]]]] = {}
        """By lease, what it held when it was released since the last launch ended: a held launch takes pages
        for its later steps when it ends, and its requests may end with it."""
        release = engine.ledger.release

        def remember(lease: Lease) -> None:
            self._released[id(lease)] = list(lease.first), [list(t) for t in lease.tables]
            release(lease)

        engine.ledger.release = remember  # type: ignore[method-assign]

    # ------------------------------------------------------------------ writes

    def sent(self, launched: Launched) -> None:
        """It is on its way to the device."""
        self._due |= {(pool, target): source for pool, source, target in launched.batch.copies}

    def begin(self, launched: Launched) -> None:
        """It is the oldest of its lane now."""
        if self.eager and not launched.begun:
            self._copy(launched)
            self._write(launched, launched.batch.starts, 1)

    def end(self, launched: Launched, starts: list[int], steps: int) -> None:
        """It ran so many steps, the first of them from ``starts``."""
        self._copy(launched)
        self._write(launched, starts, steps)
        self._released.clear()

    def _copy(self, launched: Launched) -> None:
        if launched.begun:
            return
        launched.begun = True
        self.copies += len(launched.batch.copies)
        for pool, source, target in launched.batch.copies:
            self._move(pool, ("device", source), ("device", target))
            del self._due[pool, target]

    def _write(self, launched: Launched, starts: list[int], steps: int) -> None:
        batch = launched.batch
        for row, (r, lease) in enumerate(zip(batch.requests, batch.leases, strict=True)):
            item = batch.extras.get(row)
            if item is not None and item.advance == "none":
                continue
            known = starts[row] + batch.tokens[row] + steps - 1
            end = known + (item.draft if item is not None else 0)
            for at in range(starts[row], end):
                text = self.texts.of(r, at + 1) if at < known or self._confirmed(r, lease, at) else WRONG
                for pool, size in enumerate(self._sizes):
                    now = self._released.get(id(lease), (lease.first, lease.tables))
                    page = launched.page(row, pool, at // size, *now)
                    if page is not None:
                        self._slots[pool, "device", page, at % size] = text

    @staticmethod
    def _confirmed(r: Request, lease: Lease, at: int) -> bool:
        return r.lease is lease and at < r.computed

    def moved(self, transfer: Transfer) -> None:
        """A transfer has ended."""
        tiers = ("device", "host") if transfer.direction == "out" else ("host", "device")
        for pool, (source, target) in enumerate(zip(transfer.source, transfer.destination, strict=True)):
            for a, b in zip(source, target, strict=True):
                self._move(pool, (tiers[0], a), (tiers[1], b))

    def _move(self, pool: int, source: tuple[str, int], target: tuple[str, int]) -> None:
        for slot in range(self._sizes[pool]):
            self._slots[pool, *target, slot] = self._slots.get((pool, *source, slot), WRONG)

    # ------------------------------------------------------------------- reads

    def check(self, r: Request, tier: str) -> None:
        """Everything a request would read is its own text.

        Raises:
            AssertionError: a slot stands for another text, or for none.
        """
        tables = r.lease.tables if tier == "device" else r.lease.host_tables
        for pool, size in enumerate(self._sizes):
            first, table = r.lease.first[pool], tables[pool]
            assert r.computed <= (first + len(table)) * size, f"{r.id} has lost pages of pool {pool}"
            for at in range(first * size, r.computed):
                page = table[at // size - first]
                while tier == "device" and (pool, page) in self._due:
                    page = self._due[pool, page]
                found = self._slots.get((pool, tier, page, at % size))
                assert found == self.texts.of(r, at + 1), (
                    f"{r.id} reads KV of another text at token {at} of {r.computed}: pool {pool}, "
                    f"{tier} page {page}"
                )

"""Broken prefix stores, each one change away from full pages by the whole text before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import sample
from typing import Any

from servelab.core.families.prefix import Commit, Content, Provenance, Span
from servelab.core.spec import PluginSpec
from servelab.core.testing.mutants import Mutant
from servelab.core.testing.toy_store import Key, ToyStore


class Store(ToyStore):
    """The honest one."""

    spec = PluginSpec(
        name="store",
        factory="servelab.core.testing.mutants.prefix:Store",
        provides=frozenset({"prefix.exact", "prefix.page_sharing", "prefix.owns_pool", "prefix.fork"}),
    )


class CoversTheLastToken(Store):
    def longest(self, content: Content) -> int:
        return content.length // self.page_tokens


class ForgetsTheTenant(Store):
    def key(self, content: Content, provenance: Provenance, end: int) -> Key:
        return super().key(content, replace(provenance, namespace=""), end)


class ForgetsTheCodec(Store):
    def key(self, content: Content, provenance: Provenance, end: int) -> Key:
        return super().key(content, replace(provenance, codec="none"), end)


class ForgetsWhatCameBefore(Store):
    """The key of a page is the page's own tokens."""

    def key(self, content: Content, provenance: Provenance, end: int) -> Key:
        assert content.ids is not None
        return (provenance, *content.ids[end - self.page_tokens : end])


class KeepsEvictedKeys(Store):
    def forget(self, page: int) -> None:
        del self.idle[page]


class EvictsWhatIsUsed(Store):
    def use(self, request_id: str, page: int) -> None:
        super().use(request_id, page)
        self.idle[page] = None


class NeverLetsGo(Store):
    """Forgets a page of each request at its release."""

    def release(self, request_id: str, now_ns: int) -> None:
        self.held[request_id] = self.held.get(request_id, [])[:-1]
        super().release(request_id, now_ns)


class ProbesTouch(Store):
    def match(
        self, content: Content, provenance: Provenance, now_ns: int, *, readonly: bool = False
    ) -> Sequence[Span]:
        spans = super().match(content, provenance, now_ns, readonly=readonly)
        for span in spans:
            for page in span.pages[0]:
                if page in self.idle:
                    self.idle[page] = self.idle.pop(page)
        return spans


class MergesPages(Store):
    """Points the request to the page it has of equal text."""

    def commit(
        self,
        request_id: str,
        content: Content,
        pages: Sequence[Sequence[int]],
        provenance: Provenance,
        now_ns: int,
    ) -> Commit:
        keys = self.chain(content, provenance, content.length // self.page_tokens)
        same = [(page, self.pages[k]) for k, page in zip(keys, pages[0], strict=False) if k in self.pages]
        done = super().commit(request_id, content, pages, provenance, now_ns)
        return Commit(taken=done.taken, replaced=(tuple(pair for pair in same if pair[0] != pair[1]),))


class TakesEverything(Store):
    """Says it took all pages it was shown, again and again."""

    def commit(
        self,
        request_id: str,
        content: Content,
        pages: Sequence[Sequence[int]],
        provenance: Provenance,
        now_ns: int,
    ) -> Commit:
        super().commit(request_id, content, pages, provenance, now_ns)
        return Commit(taken=(tuple(pages[0]),))


class ForgetsSamples(Store):
    def fork(self, request_id: str, pages: Sequence[Sequence[int]], now_ns: int) -> None:
        return None


class HasNoFork(ToyStore):
    fork: Any = property()  # the attribute is not there
    spec = replace(Store.spec, name="no_fork")


class GivesUpByChance(Store):
    def evict(self, pool: int, n: int, now_ns: int) -> Sequence[int]:
        gone = sample(sorted(self.idle), n)
        for page in gone:
            self.forget(page)
        return gone


class FindsNothing(Store):
    def longest(self, content: Content) -> int:
        return 0


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(suite="prefix", plugin=plugin, original=Store, check=check, message=message, breaks=breaks)


MUTANTS = (
    _mutant(
        CoversTheLastToken,
        "test_never_covers_the_last_token",
        "matched 4 of 4 tokens",
        "matches a prompt to its last token",
    ),
    _mutant(
        ForgetsTheTenant,
        "test_keeps_provenance_apart",
        "matches KV whose namespace is ''",
        "shares between tenants",
    ),
    _mutant(
        ForgetsTheCodec, "test_keeps_provenance_apart", "matches KV whose codec is 'none'", "mixes KV codecs"
    ),
    _mutant(
        ForgetsWhatCameBefore,
        "test_matches_only_equal_texts",
        "and its KV was computed behind",
        "keys pages by their own tokens alone",
    ),
    _mutant(
        KeepsEvictedKeys,
        "test_gives_up_what_nobody_uses",
        "which it does not hold (any more)",
        "matches pages it has given up",
    ),
    _mutant(
        EvictsWhatIsUsed,
        "test_gives_up_what_nobody_uses",
        "pages are in nobody's use",
        "counts pages in use as evictable",
    ),
    _mutant(
        NeverLetsGo,
        "test_gives_up_what_nobody_uses",
        "pages are in nobody's use",
        "forgets a page at its release, so it is never evicted",
    ),
    _mutant(
        ProbesTouch,
        "test_readonly_changes_nothing",
        "after lookups with readonly=True",
        "counts a probe as a use",
    ),
    _mutant(
        MergesPages,
        "test_requests_read_their_own_kv",
        "replaced pages",
        "exchanges a page of a running request",
    ),
    _mutant(
        TakesEverything,
        "test_gives_up_what_nobody_uses",
        "commit() of pages",
        "takes a reference twice",
    ),
    _mutant(
        ForgetsSamples, "test_fork", "while a sample still uses the prompt", "does not count samples as users"
    ),
    _mutant(
        HasNoFork, "test_has_what_it_declares", "has fork(): False", "declares fork and does not have it"
    ),
    _mutant(
        GivesUpByChance,
        "test_no_clock_no_chance_no_environment",
        "calls random.sample",
        "evicts at random, from the global generator",
    ),
    _mutant(FindsNothing, "test_requests_read_their_own_kv", "reused nothing", "never matches"),
)

"""What KV memory was used for, over time: tokens stored, and room reserved for tokens still to come."""

from __future__ import annotations

from array import array

from servelab.core.records import RequestAdmitted, RequestFinished, RequestForked, RequestPreempted, StepDone


class MemoryFacts:
    """Token-time sums of one engine. What the end of a launch shows holds until the next end."""

    def __init__(self) -> None:
        self.stored_ns = 0
        """Tokens stored by requests in memory, times nanoseconds."""
        self.shared = False
        """A prefix store gave a request tokens that others may count too."""
        self.unusable_ns: list[int] = []
        """Per pool, free pages that were of no use to the head of the queue, times nanoseconds."""
        self._last_ns: int | None = None
        self._total = 0
        """Tokens stored at ``_last_ns``."""
        self._unusable: tuple[int, ...] = ()
        self._stored: dict[str, int] = {}
        """Per request in memory. If it is on a track, it stores a token in each step of that, which are not
        in here, and what the track had before it joined is taken off."""
        self._on: dict[str, array[int]] = {}
        """Steps of the track that a request is on."""
        self._since: dict[str, int] = {}
        self._begin: dict[str, int] = {}
        """Tokens a request will enter memory with."""
        self._leaving: set[str] = set()
        """Gone at the end of the next launch, like the pages that the last one showed."""
        self._out: set[str] = set()
        """Ended or dropped: what a launch still runs for them is dropped too."""
        self._shared: dict[str, int] = {}
        """By sample, tokens of the prompt that it shares and another counts."""
        self._sharing: dict[str, list[str]] = {}
        """By who counts a prompt, the samples that share it."""
        self._final: dict[str, int] = {}
        """Tokens that live requests stored when they last left."""
        self._resident_ns: dict[str, int] = {}
        """How long these were in memory."""
        self._ended: set[str] = set()
        """Of those who leave, those that will not come back."""
        self._final_ns = 0
        """Of all that ended: tokens stored in the end, times nanoseconds in memory."""

    def admitted(self, record: RequestAdmitted) -> None:
        self._out.discard(record.request)
        self._begin[record.request] = record.cached_tokens
        self.shared |= record.cached_tokens > 0

    def forked(self, record: RequestForked) -> None:
        """What it shares counts once: for who computed it, then for a sample that stays longer."""
        if record.shared_tokens:
            self._begin[record.request] = 0
            self._shared[record.request] = record.shared_tokens
            self._sharing.setdefault(record.parent, []).append(record.request)

    def preempted(self, record: RequestPreempted) -> None:
        name = record.request
        if record.mode == "swap":
            self._begin[name] = self._stored.get(name, 0)
        if record.mode == "recompute":
            self._out.add(name)
        if record.mode != "pause":
            self._shared.pop(name, None)
            if name in self._stored:
                self._leaving.add(name)

    def finished(self, record: RequestFinished) -> None:
        self.left(record.request)
        if record.request in self._stored:
            self._ended.add(record.request)

    def left(self, name: str) -> None:
        """It is not in this engine any more."""
        self._out.add(name)
        self._shared.pop(name, None)
        if name in self._stored:
            self._leaving.add(name)

    def came(self, name: str, tokens: int) -> None:
        """It came from another engine with so many tokens stored."""
        self._out.discard(name)
        self._leaving.discard(name)
        if name in self._stored:  # it was here before, and no launch has ended since
            self._gone(name, self._last_ns or 0)
        self._begin[name] = tokens

    def step(self, step: StepDone) -> None:
        now = step.t_ns
        if self._last_ns is not None:
            span = max(0, now - self._last_ns)
            now = self._last_ns + span
            self.stored_ns += self._total * span
            for pool, pages in enumerate(self._unusable):
                self.unusable_ns[pool] += pages * span
            for name in self._leaving:
                self._gone(name, now)
            self._leaving.clear()
        self._last_ns, self._unusable = now, step.unusable_pages
        self.unusable_ns += [0] * (len(step.unusable_pages) - len(self.unusable_ns))

    def join(self, name: str, ends: array[int]) -> bool:
        """From now on a request stores a token in each step of a track, which ``grow`` counts; False: it was
        dropped, and stores nothing.
        """
        self.store(name, 0)
        if name not in self._stored:
            return False
        self._stored[name] -= len(ends)
        self._on[name] = ends
        return True

    def leave(self, name: str) -> bool:
        """It is on no track any more; whether it was."""
        ends = self._on.pop(name, None)
        if ends is None:
            return False
        self._stored[name] += len(ends)
        return True

    def grow(self, tokens: int) -> None:
        """Requests on tracks stored so many tokens together."""
        self._total += tokens

    def store(self, name: str, tokens: int) -> None:
        """A request stored tokens; those it enters memory with are added when it does."""
        if name in self._out:
            return
        stored = self._stored
        if name not in stored:
            self._since[name] = self._last_ns or 0
            stored[name] = 0
            tokens += self._begin.pop(name, 0)
        stored[name] += tokens
        self._total += tokens

    def _gone(self, name: str, now: int) -> None:
        """What it stored is in memory no longer."""
        final = self._stored.pop(name)
        resident = self._resident_ns.pop(name, 0) + now - self._since.pop(name)
        self._total -= final
        if name in self._ended:
            self._ended.discard(name)
            self._final_ns += final * resident
            self._final.pop(name, None)
        else:
            self._final[name], self._resident_ns[name] = final, resident
        self._hand_over(name)

    def _hand_over(self, name: str) -> None:
        """Who counted a prompt has gone: a sample that still shares it counts it now."""
        left = [other for other in self._sharing.pop(name, ()) if other in self._shared]
        if not left:
            return
        heir, *others = left
        tokens = self._shared.pop(heir)
        if others:
            self._sharing[heir] = others
        if heir in self._stored:
            self._stored[heir] += tokens
            self._total += tokens
        else:
            self._begin[heir] = tokens

    @property
    def awaited_ns(self) -> int:
        """Tokens that requests in memory were still to store before they left it, times nanoseconds."""
        final = {**self._final, **self._stored}
        for name, ends in self._on.items():
            final[name] += len(ends)
        last = self._last_ns or 0
        resident = dict(self._resident_ns)
        for name, since in self._since.items():
            resident[name] = resident.get(name, 0) + last - since
        live = sum(final[name] * ns for name, ns in resident.items())
        return self._final_ns + live - self.stored_ns

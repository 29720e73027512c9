"""The text of a growing output, as far as no later token can take it back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from servelab.core.sampling import SamplingParams
from servelab.core.stops import Decode


class StreamText:
    """Turns new tokens into new text. Holds back half characters, the beginning of a stop text and a final
    stop token, so that what it gave is always the start of what ``stops.visible_text`` says in the end.

    Each token costs the decoding of a few: those since the last whole character, and as many before them as
    brought it (a decoder may drop the space at the start of what it is given).
    """

    def __init__(self, decode: Decode, params: SamplingParams, eos_ids: Collection[int]) -> None:
        self._decode, self._params = decode, params
        self._ends = {*params.stop_token_ids} if params.ignore_eos else {*params.stop_token_ids, *eos_ids}
        self._window: list[int] = []
        self._known = 0
        """Tokens at the start of the window whose text was taken."""
        self._count = 0
        self._held = ""
        self._beginnings = {stop[:n] for stop in params.stop for n in range(1, len(stop))}
        self._longest = max(map(len, self._beginnings), default=0)

    def add(self, tokens: Sequence[int]) -> str:
        """New text, maybe none."""
        self._window += tokens
        self._count += len(tokens)
        if tokens[-1] in self._ends and self._count > self._params.min_tokens:
            return ""  # the output ends here, without this token
        before = self._decode(self._window[: self._known])
        now = self._decode(self._window)
        if now.endswith("\ufffd"):
            return ""
        if len(now) <= len(before):
            if before:
                del self._window[self._known :]  # tokens without text, such as ends that were ignored
            return ""
        del self._window[: self._known]
        self._known = len(self._window)
        old, self._held = len(self._held), self._held + now[len(before) :]
        cut = self._cut(old)
        new, self._held = self._held[:cut], self._held[cut:]
        return new

    def _cut(self, old: int) -> int:
        """Where the held text must wait: at a stop text that its new part, from ``old``, completes, which
        ends the output; else at what may be the beginning of one."""
        text, stops = self._held, self._params.stop
        if self._count > self._params.min_tokens:
            starts = [text.find(stop, max(0, old - len(stop) + 1)) for stop in stops]
            if found := [start for start in starts if start >= 0]:
                return min(found)
        longest = min(self._longest, len(text))
        return next(
            (n for n in range(len(text) - longest, len(text)) if text[n:] in self._beginnings), len(text)
        )

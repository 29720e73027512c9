"""How the next token is drawn: what a client may ask of an executor that runs a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from servelab.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Names, meanings and defaults of vLLM's parameters of the same name.

    Order of application: repetition, presence and frequency penalties, ``min_tokens``; greedy if
    ``temperature`` is 0; else temperature, min-p, top-k, top-p, and one draw.

    ``stop`` may be given as one text and any iterable of ids as ``stop_token_ids``; both are kept as tuples.

    Raises:
        ConfigError: values of the wrong type or out of range; the message names all of them.
    """

    temperature: float = 1.0
    """0 is greedy: the most likely token, the lowest id among equals."""
    top_k: int = 0
    """Only the k most likely tokens; 0 or -1: all. Ties with the k-th stay."""
    top_p: float = 1.0
    """Only the smallest set of most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Only tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the output are divided by this if positive, else multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output."""
    frequency_penalty: float = 0.0
    """Subtracted as many times as the token is in the output."""
    n: int = 1
    """Outputs drawn from the prompt, each a request of its own that shares the prompt's KV; with ``seed``,
    output k draws as a request of seed + k would. 1 if greedy, as all would be equal."""
    seed: int | None = None
    """Draws depend on this, 64 bits, and on the position in the output only; None: derived from run and
    request."""
    max_tokens: int | None = 16
    """Output tokens at most; None: as many as the context has room for. Becomes the request's cap."""
    min_tokens: int = 0
    """No end of text and no stop token before so many output tokens; stop texts completed until then do
    not end it."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output; the token stays in ``token_ids``, its text is left out."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-text tokens (``stop_token_ids`` still end)."""
    logprobs: int | None = None
    """Log-probabilities of the drawn token and of this many most likely ones, of the model's own
    distribution (before penalties and temperature); None: none."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            # what cannot be a tuple is left for the rules to name
            if isinstance(value, Iterable) and not isinstance(value, str | bytes):
                object.__setattr__(self, name, tuple(value))
        problems = [
            f"{name} must be {rule}, got {getattr(self, name)!r}"
            for name, ok, rule in self._rules()
            if not ok
        ]
        if problems:
            raise ConfigError("sampling parameters are out of range: " + "; ".join(problems))

    def _rules(self) -> list[tuple[str, bool, str]]:
        most = self.max_tokens if _whole(self.max_tokens, 1) else None
        return [
            ("temperature", _number(self.temperature, 0), "0 or more"),
            ("top_k", _whole(self.top_k, -1), "-1 or more"),
            ("top_p", _number(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            ("min_p", _number(self.min_p, 0, 1), "0 to 1"),
            (
                "repetition_penalty",
                _number(self.repetition_penalty, 0) and self.repetition_penalty != 0,
                "above 0",
            ),
            ("presence_penalty", _number(self.presence_penalty, -2, 2), "-2 to 2"),
            ("frequency_penalty", _number(self.frequency_penalty, -2, 2), "-2 to 2"),
            ("n", _whole(self.n, 1), "1 or more"),
            ("n", self.n == 1 or self.temperature != 0, "1 with temperature=0, whose outputs are equal"),
            ("seed", self.seed is None or _whole(self.seed, 0, 2**64 - 1), "0 to 2**64 - 1, or None"),
            ("max_tokens", self.max_tokens is None or _whole(self.max_tokens, 1), "1 or more, or None"),
            ("min_tokens", _whole(self.min_tokens, 0, most), "0 or more and at most max_tokens"),
            ("stop", _all(self.stop, lambda s: isinstance(s, str) and s != ""), "texts that are not empty"),
            ("stop_token_ids", _all(self.stop_token_ids, lambda i: _whole(i, 0)), "token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "true or false"),
            ("logprobs", self.logprobs is None or _whole(self.logprobs, 0), "0 or more, or None"),
        ]


def _number(value: object, least: float, most: float = sys.float_info.max) -> bool:
    # comparing refuses NaN, infinities and whole numbers that no float can hold
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _whole(value: object, least: int, most: int | None = None) -> bool:
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= least
        and (most is None or value <= most)
    )


def _all(values: object, rule: Callable[[object], bool]) -> bool:
    return isinstance(values, tuple) and all(rule(value) for value in values)

"""How the next token is drawn: what a client may ask of an executor that runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from servelab.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Names, meanings and defaults of vLLM's parameters of the same name.

    Order of application: repetition, presence and frequency penalties, ``min_tokens``; greedy if
    ``temperature`` is 0; else temperature, min-p, top-k, top-p, and one draw.

    Raises:
        ConfigError: a value out of range; the message names all of them.
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
    seed: int | None = None
    """Draws depend on this and on the position in the output only; None: derived from run and request."""
    max_tokens: int | None = 16
    """Output tokens at most; None: as many as the context has room for. Becomes the request's cap."""
    min_tokens: int = 0
    """No end of text and no stop token before so many output tokens."""
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
        stop: Sequence[str] = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        problems = [
            f"{name} must be {rule}, got {value!r}" for name, value, ok, rule in self._rules() if not ok
        ]
        if problems:
            raise ConfigError("sampling parameters are out of range: " + "; ".join(problems))

    def _rules(self) -> list[tuple[str, object, bool, str]]:
        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)

        def whole(value: object, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        def within(value: float, low: float, high: float) -> bool:
            return number(value) and low <= value <= high

        return [
            (
                "temperature",
                self.temperature,
                number(self.temperature) and self.temperature >= 0,
                "0 or more",
            ),
            ("top_k", self.top_k, whole(self.top_k, -1), "-1 or more"),
            ("top_p", self.top_p, within(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            ("min_p", self.min_p, within(self.min_p, 0, 1), "0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                number(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0",
            ),
            ("presence_penalty", self.presence_penalty, within(self.presence_penalty, -2, 2), "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, within(self.frequency_penalty, -2, 2), "-2 to 2"),
            ("seed", self.seed, self.seed is None or whole(self.seed, 0), "0 or more, or None"),
            (
                "max_tokens",
                self.max_tokens,
                self.max_tokens is None or whole(self.max_tokens, 1),
                "1 or more",
            ),
            ("min_tokens", self.min_tokens, whole(self.min_tokens, 0), "0 or more"),
            ("stop", self.stop, all(isinstance(s, str) and s for s in self.stop), "texts that are not empty"),
            (
                "stop_token_ids",
                self.stop_token_ids,
                all(whole(i, 0) for i in self.stop_token_ids),
                "token ids",
            ),
            ("logprobs", self.logprobs, self.logprobs is None or whole(self.logprobs, 0), "0 or more"),
        ]

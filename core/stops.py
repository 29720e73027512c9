"""Where an output ends: stop tokens, a model's own ends, stop texts. Functions of the output ids only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from servelab.core.errors import CapabilityError
from servelab.core.sampling import SamplingParams

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, as ``Tokenizer.decode``: the text of a longer output goes on where that of a shorter one
ended, apart from U+FFFD in place of an unfinished character."""

_MARGIN = 8
"""Characters at the start of a decoded tail that are not trusted: half of a character, a lost space."""


def stop_check(
    params: SamplingParams, output_ids: Sequence[int], eos_ids: Collection[int], decode: Decode | None
) -> str | None:
    """Whether the newest token ends the output. Call once per token, in order; keeps nothing between calls.

    As in vLLM, nothing ends an output of up to ``min_tokens`` tokens, and a stop text counts only if it is
    completed after them.

    Args:
        output_ids: the output, its newest token last.
        eos_ids: the model's own ends.
        decode: needed for ``params.stop`` only.

    Returns:
        ``"stop"``, or None to go on.

    Raises:
        CapabilityError: there are stop texts and no ``decode``.
    """
    if params.stop and decode is None:
        raise CapabilityError(
            "stop texts need a tokenizer",
            where="sampling parameter stop",
            why="tokens of this executor have no text",
            do="choose an executor with a tokenizer, or use stop_token_ids",
        )
    if len(output_ids) <= params.min_tokens:
        return None
    if _is_end(params, output_ids[-1], eos_ids):
        return "stop"
    if params.stop and decode is not None:
        text, known = _tail(params, output_ids, decode)
        if _first(params, text, known) is not None:
            return "stop"
    return None


def visible_text(
    decode: Decode, output_ids: Sequence[int], params: SamplingParams, eos_ids: Collection[int]
) -> tuple[str, str | int | None]:
    """The text of a finished output as the client sees it, and what ended it.

    Returns:
        The text without the stop text that starts first and all after it, and without a final stop token;
        and that stop text, or the id of that token (also if it is one of ``eos_ids``), or None if neither
        ended it (a length, an abort).
    """
    ended: int | None = None
    ids = output_ids
    if len(ids) > params.min_tokens and _is_end(params, ids[-1], eos_ids):
        ended, ids = ids[-1], ids[:-1]
    text = decode(ids)
    if params.stop and len(ids) > params.min_tokens:
        known = _settled(decode(ids[: params.min_tokens])) if params.min_tokens else ""
        found = _first(params, _settled(text), len(known))
        if found is not None:
            start, stop = found
            return text[:start], stop
    return text, ended


def _is_end(params: SamplingParams, token: int, eos_ids: Collection[int]) -> bool:
    return token in params.stop_token_ids or (not params.ignore_eos and token in eos_ids)


def _first(params: SamplingParams, text: str, known: int) -> tuple[int, str] | None:
    """The stop text that starts first among those that end after ``known`` characters, and its start."""
    starts = ((text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in params.stop)
    return min((found for found in starts if found[0] >= 0), key=lambda found: found[0], default=None)


def _tail(params: SamplingParams, output_ids: Sequence[int], decode: Decode) -> tuple[str, int]:
    """Enough of the end of the text to hold any stop text that the newest token completes, and how many
    characters of it were there before that token."""
    longest = max(len(stop.encode(errors="surrogatepass")) for stop in params.stop)
    size = longest + _MARGIN
    while True:
        tail = output_ids[-size:]
        known = len(_settled(decode(tail[:-1])))
        if size >= len(output_ids) or known >= longest + _MARGIN:
            return _settled(decode(tail)), known
        size *= 2  # tokens without text of their own, such as ends that were ignored


def _settled(text: str) -> str:
    """Without characters at the end that later tokens may still change."""
    return text.rstrip("\ufffd")

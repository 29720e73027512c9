"""Where an output ends: stop tokens, a model's own ends, stop texts, and what the client sees of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servelab.core.errors import CapabilityError
from servelab.core.sampling import SamplingParams
from servelab.core.stops import stop_check, visible_text

EOS = 256
SILENT = 257
"""Ids from 256 have no text of their own."""


def decode(ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def ended(params: SamplingParams, ids: Sequence[int]) -> int | None:
    """Length of the output when it ended."""
    for n in range(1, len(ids) + 1):
        if stop_check(params, ids[:n], {EOS}, decode):
            return n
    return None


def seen(params: SamplingParams, ids: Sequence[int]) -> tuple[str, str | int | None]:
    return visible_text(decode, ids, params, {EOS})


def test_stop_tokens_and_ends() -> None:
    params = SamplingParams(stop_token_ids=(5,))
    assert stop_check(params, [1, 5], {EOS}, None) == "stop"
    assert stop_check(params, [5, 1], {EOS}, None) is None
    assert stop_check(params, [EOS], {EOS}, None) == "stop"
    assert stop_check(params, [], {EOS}, None) is None
    deaf = SamplingParams(stop_token_ids=(5,), ignore_eos=True)
    assert stop_check(deaf, [EOS], {EOS}, None) is None
    assert stop_check(deaf, [5], {EOS}, None) == "stop"


@pytest.mark.parametrize("end", [EOS, 5])
def test_nothing_ends_before_min_tokens(end: int) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(5,))
    assert ended(params, [end] * 5) == 4


def test_stop_texts_need_a_decoder() -> None:
    with pytest.raises(CapabilityError, match="tokenizer"):
        stop_check(SamplingParams(stop=("a",)), [1], {EOS}, None)


@pytest.mark.parametrize("stop", ["é", "日本", "a😀b", "\n\n", "x"])
def test_a_stop_text_over_several_tokens_ends_with_its_last_byte(stop: str) -> None:
    text = "…before " + stop
    ids = [*text.encode(), *b" after"]
    params = SamplingParams(stop=("never", stop))
    assert ended(params, ids) == len(text.encode())
    assert seen(params, ids[: len(text.encode())]) == ("…before ", stop)


def test_half_a_character_is_no_match_for_the_replacement_character() -> None:
    params = SamplingParams(stop=("\ufffd",))
    assert ended(params, list("日".encode())) is None
    assert ended(params, [0xFF, ord("a")]) == 2


def test_tokens_without_text_do_not_hide_a_stop_text() -> None:
    params = SamplingParams(stop=("ab",), max_tokens=None)
    ids = [ord("a"), *[SILENT] * 300, ord("b")]
    assert ended(params, ids) == len(ids)


def test_a_stop_text_within_min_tokens_is_passed_over_and_one_across_it_is_not() -> None:
    params = SamplingParams(stop=("ab",), min_tokens=3)
    assert ended(params, list(b"abcxyzab")) == 8
    assert seen(params, list(b"abcxyzab")) == ("abcxyz", "ab")
    assert ended(params, list(b"xyab")) == 4
    assert seen(params, list(b"xyab")) == ("xy", "ab")
    assert ended(params, list(b"xaby")) is None


def test_the_stop_text_that_starts_first_is_cut() -> None:
    params = SamplingParams(stop=("c", "bc", "abc"))
    words = {0: "x", 1: "abcd"}

    def decode_words(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    assert stop_check(params, [0, 1], (), decode_words) == "stop"
    assert visible_text(decode_words, [0, 1], params, ()) == ("x", "abc")


def test_visible_text_drops_a_final_stop_token_only() -> None:
    params = SamplingParams(stop_token_ids=(ord("z"),))
    assert seen(params, list(b"hiz")) == ("hi", ord("z"))
    assert seen(params, [*b"hi", EOS]) == ("hi", EOS)
    assert seen(params, list(b"hi")) == ("hi", None)
    assert seen(params, []) == ("", None)
    assert seen(SamplingParams(ignore_eos=True), [*b"hi", EOS]) == ("hi", None)
    # within min_tokens it is a token like others
    assert seen(SamplingParams(stop_token_ids=(ord("z"),), min_tokens=3), list(b"hiz")) == ("hiz", None)
    # cut off in the middle of a character
    assert seen(params, list("hé".encode())[:-1]) == ("h\ufffd", None)


@given(
    text=st.text(alphabet="ab é日", max_size=40),
    stops=st.lists(st.text(alphabet="ab é日", min_size=1, max_size=4), min_size=1, max_size=3),
    silent=st.lists(st.integers(0, 60), max_size=30),
    min_tokens=st.integers(0, 12),
)
def test_the_end_is_where_the_whole_text_first_has_a_new_stop_text(
    text: str, stops: list[str], silent: list[int], min_tokens: int
) -> None:
    ids = list(text.encode())
    for at in silent:
        ids.insert(at, SILENT)
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens, max_tokens=None)

    def matches(n: int) -> set[tuple[int, str]]:
        known = bytes(i for i in ids[:n] if i < 256).decode(errors="ignore")
        return {(at, s) for s in stops for at in range(len(known)) if known.startswith(s, at)}

    old = matches(min_tokens)
    expected = next((n for n in range(min_tokens + 1, len(ids) + 1) if matches(n) - old), None)
    assert ended(params, ids) == expected
    shown, why = seen(params, ids[:expected])
    if expected is None:
        assert (shown, why) == (text, None)
    else:
        first = min(at for at, _ in matches(expected) - old)
        assert shown == text[:first]
        assert why in stops and text[first:].startswith(why)

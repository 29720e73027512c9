"""``stream``: what was shown is never taken back, costs little, and closing a stream ends its request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.draws import seeds
from tokenizers import Tokenizer

from servelab import LLM, SamplingParams
from servelab.core.stops import stop_check, visible_text
from servelab.plugins.llm.stream_text import StreamText

EOS = 2


@pytest.fixture(scope="module")
def decode(folder: Path) -> Callable[[Sequence[int]], str]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda ids: backend.decode(list(ids), skip_special_tokens=True)


def _shown(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], params: SamplingParams
) -> tuple[list[str], str]:
    """Pieces of an output that goes through ``ids`` until something ends it, and its final text."""
    growing, pieces, out = StreamText(decode, params, {EOS}), [], list[int]()
    for token in ids:
        out.append(token)
        pieces.append(growing.add([token]))
        if stop_check(params, out, {EOS}, decode):
            break
    return pieces, visible_text(decode, out, params, {EOS})[0]


# ids 3 to 258 are the single bytes: texts of them hold every kind of half and broken character
IDS = st.lists(st.integers(0, 299) | st.sampled_from([EOS, *range(60, 75)]), min_size=1, max_size=40)
STOPS = st.lists(st.text("abcdefgh _]^", min_size=1, max_size=4) | st.just("é"), max_size=3)


@given(ids=IDS, stop=STOPS, min_tokens=st.integers(0, 8), ignore_eos=st.booleans())
def test_what_was_shown_is_the_start_of_the_text(
    decode: Any, ids: list[int], stop: list[str], min_tokens: int, ignore_eos: bool
) -> None:
    params = SamplingParams(
        max_tokens=None, stop=tuple(stop), min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=(80,)
    )
    pieces, text = _shown(decode, ids, params)
    assert text.startswith("".join(pieces))


@given(ids=IDS)
def test_nothing_whole_is_held_back(decode: Any, ids: list[int]) -> None:
    pieces, text = _shown(decode, ids, SamplingParams(max_tokens=None, ignore_eos=True))
    whole = not text.endswith("\ufffd")
    assert "".join(pieces) == text if whole else text.startswith("".join(pieces))


def _ids(folder: Path, text: str) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return found


def test_characters_come_whole(decode: Any, folder: Path) -> None:
    ids = _ids(folder, "né 😀!")
    pieces, text = _shown(decode, ids, SamplingParams(max_tokens=None))
    assert len(ids) > len(text) == 5
    assert [p for p in pieces if p] == ["n", "é", " ", "😀", "!"]


def test_the_beginning_of_a_stop_text_waits(decode: Any, folder: Path) -> None:
    params = SamplingParams(max_tokens=None, stop=("XYZ", "Q"))
    pieces, text = _shown(decode, _ids(folder, "aXYbXXYZc"), params)
    assert text == "aXYbX" and pieces == ["a", "", "", "XYb", "", "X", "", ""]


def test_a_decoder_that_drops_the_first_space() -> None:
    """As those of SentencePiece vocabularies do."""
    words = [" a", " b", "", " ", "c", " ", " d"]
    pieces, text = _shown(
        lambda ids: "".join(words[i] for i in ids).removeprefix(" "),
        [0, 1, 3, 4, 6, 5, 0, 6],
        SamplingParams(max_tokens=None, ignore_eos=True),
    )
    assert "".join(pieces) == text == "a b c d  a d"


@pytest.mark.parametrize("ids", [[70, 71, 72, 73], [70, EOS, EOS, EOS], [EOS]])
def test_a_token_costs_the_decoding_of_a_few(decode: Any, ids: list[int]) -> None:
    decoded = 0

    def counted(some: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(some)
        return str(decode(some))

    n = 500
    growing = StreamText(counted, SamplingParams(max_tokens=None, ignore_eos=True, stop=("##",)), {EOS})
    text = "".join(growing.add([token]) for token in [70, *ids * (n // len(ids))])
    assert text and decoded <= 8 * n


@pytest.mark.parametrize("seed", seeds(6))
def test_chunks_add_up(llm: LLM, seed: int) -> None:
    params = SamplingParams(
        max_tokens=300, seed=seed, stop=["e", "the ", "!"], min_tokens=80, ignore_eos=True
    )
    chunks = list(llm.stream("the fox", params))
    [whole] = llm.generate("the fox", params)
    last = chunks[-1].completion
    assert last is not None and all(chunk.completion is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == last.text == whole.text
    assert tuple(t for chunk in chunks for t in chunk.token_ids) == last.token_ids == whole.token_ids
    assert last.finish_reason == whole.finish_reason and last.stop_reason == whole.stop_reason
    assert len([chunk for chunk in chunks[:-1] if chunk.text]) > 20


LONG = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)


def test_closing_gives_the_request_up(llm: LLM, recorder: Any) -> None:
    before = len(recorder.outcomes())
    stream = llm.stream("the fox", LONG)
    assert [len(next(stream).token_ids) for _ in range(3)] == [1, 1, 1]
    stream.close()
    for _ in llm.stream("the dog", LONG):
        break
    [after] = llm.generate("z", SamplingParams(max_tokens=2))
    assert after.finish_reason == "length"
    assert sorted(recorder.outcomes(before)) == ["cancelled", "cancelled", "completed"]
    assert all(r.output_tokens < 1000 for r in recorder.of("finished")[before:])
    [pool] = llm.info["kv"]["pools"]
    assert recorder.of("step")[-1].free_pages == (pool["pages"] - 1,), "only the last request holds a page"


def test_a_stream_that_never_starts_asks_for_nothing(llm: LLM, recorder: Any) -> None:
    before = len(recorder.of("arrived"))
    llm.stream("the fox", LONG).close()
    llm.generate("z", SamplingParams(max_tokens=1))
    assert len(recorder.of("arrived")) == before + 1
    with pytest.raises(Exception, match="it is empty"):
        llm.stream("")  # at once, not with the first `next`

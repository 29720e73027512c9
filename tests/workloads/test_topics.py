"""The corpus: three parts that share no text, the same on every machine with the same Python."""

from __future__ import annotations

import re
import string
import sys
from hashlib import sha256
from itertools import combinations
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servelab.core import corpus
from servelab.core.corpus import PARTS, Topic, collapsed, digest, distinct, paragraphs, part, part_of
from servelab.core.errors import ConfigError


def long_paragraphs(name: str) -> list[str]:
    texts = (collapsed(p) for topic in part(name) for p in paragraphs(topic.text))
    return [text for text in texts if len(text) >= 40]


def test_parts_share_neither_topic_nor_paragraph() -> None:
    for a, b in combinations(PARTS, 2):
        assert not {t.name for t in part(a)} & {t.name for t in part(b)}
        assert not set(long_paragraphs(a)) & set(long_paragraphs(b))
    for name in PARTS:
        assert len(long_paragraphs(name)) == len(set(long_paragraphs(name))) > 100


def test_no_part_holds_a_stretch_of_another() -> None:
    """Not by paragraphs: 150 characters in a row, wherever they begin."""
    text = {name: collapsed(" ".join(t.text for t in part(name))) for name in PARTS}
    for a, b in combinations(PARTS, 2):
        stretches = {text[a][i : i + 150] for i in range(len(text[a]) - 149)}
        both = [i for i in range(len(text[b]) - 149) if text[b][i : i + 150] in stretches]
        assert not both, f"{a} and {b} share {text[b][both[0] :][:150]!r}"


def test_parts_are_large_enough_and_have_their_shares() -> None:
    sizes = {name: sum(len(topic.text) for topic in part(name)) for name in PARTS}
    counts = {name: len(part(name)) for name in PARTS}
    assert sizes["evaluation"] > 40_000
    for share, name in ((0.5, "prompt"), (0.25, "calibration"), (0.25, "evaluation")):
        assert abs(sizes[name] / sum(sizes.values()) - share) < 0.2
        assert abs(counts[name] / sum(counts.values()) - share) < 0.2


def test_most_of_the_source_is_kept() -> None:
    kept = sum(len(topic.text) for name in PARTS for topic in part(name))
    assert 0.6 < kept / sum(map(len, corpus._source().values())) < 1


def test_a_topic_is_in_its_part_by_name_alone() -> None:
    """The split is a promise: numbers measured on one part are compared over years."""
    expected = {"types": "prompt", "compound": "calibration", "specialnames": "evaluation"}
    assert {name: part_of(name) for name in expected} == expected
    for name in PARTS:
        assert {part_of(topic.name) for topic in part(name)} == {name}
        assert list(part(name)) == sorted(part(name))


def test_digests_cover_names_and_texts() -> None:
    text = "".join(f"{name}\0{text}\0" for name, text in part("evaluation"))
    assert digest("evaluation") == sha256(text.encode()).hexdigest()
    assert len({digest(name) for name in (*PARTS, "whole")}) == 4
    assert re.fullmatch("[0-9a-f]{64}", digest("whole"))


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the help texts differ between Pythons")
def test_digests_of_the_documented_python() -> None:
    assert digest("whole").startswith("6c7d68ce")
    assert [digest(name)[:8] for name in PARTS] == ["2845251f", "127507d5", "a75e3c17"]


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'evaluation'"):
        part("evaluatoin")
    with pytest.raises(ConfigError, match="no part 'whole'"):
        part("whole")
    with pytest.raises(ConfigError, match="no part 'al'"):
        digest("al")


def test_a_python_without_topics_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # type: ignore[arg-type]
    corpus._source.cache_clear()
    corpus._distinct.cache_clear()
    with pytest.raises(ConfigError, match="comes without its help topics"):
        part("prompt")
    stub = ModuleType("pydoc_data.topics")
    stub.topics = {"types": "Kinds.\n"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", stub)
    try:
        assert part("prompt") == (Topic("types", "Kinds."),)
        assert part("evaluation") == ()
    finally:
        corpus._source.cache_clear()
        corpus._distinct.cache_clear()


A, B, C, D = (letter * 20 + " " + letter * 20 for letter in "abcd")


def test_excerpts_are_left_out_and_repeats_stand_once() -> None:
    topics = {
        "long": f"{A}\n\n{B}\n\n{D}\n\nshort\n\nshort\n\n{A}",
        "excerpt": "  " + A.replace(" ", "\n  "),
        "other": f"{C}\n\n{C.upper()}\n\n{B}\n",
        "tiny": "short",
    }
    assert distinct(topics) == (
        Topic("long", f"{A}\n\n{B}\n\n{D}\n\nshort\n\nshort"),
        Topic("other", f"{C}\n\n{C.upper()}"),
        Topic("tiny", "short"),
    )


PARAGRAPH = st.text(string.ascii_lowercase[:3] + " ", max_size=60)


@given(st.dictionaries(st.text("xyz", min_size=1), st.lists(PARAGRAPH, max_size=5).map("\n\n".join)))
def test_no_long_paragraph_stands_twice(topics: dict[str, str]) -> None:
    kept = distinct(topics)
    texts = [collapsed(p) for topic in kept for p in paragraphs(topic.text)]
    long = [text for text in texts if len(text) >= 40]
    assert len(long) == len(set(long))
    assert {topic.name for topic in kept} <= topics.keys()
    assert kept == distinct(dict(reversed(topics.items())))

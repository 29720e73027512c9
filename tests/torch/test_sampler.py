"""The batched sampler against a plain reference in Python floats, chance and transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from servelab.core.errors import ServeLabError  # noqa: E402
from servelab.core.sampling import SamplingParams  # noqa: E402
from servelab.plugins.executors.torch import sampler  # noqa: E402
from servelab.plugins.executors.torch.sampler import Row, sample, uniform, weights  # noqa: E402

INF = float("inf")


def row(prompt: Sequence[int] = (), output: Sequence[int] = (), key: int = 0, **params: Any) -> Row:
    params.setdefault("max_tokens", None)
    return Row(SamplingParams(**params), prompt, output, key, frozenset({0}), "r7")


def draw(logits: list[float], drawn: Row, dtype: Any = None) -> int:
    return sample(torch.tensor([logits], dtype=dtype or torch.float64), [drawn])[0].token


# ------------------------------------------------------------------ the reference


def adjusted(logits: list[float], r: Row) -> list[float]:
    p, out = r.params, []
    for token, x in enumerate(logits):
        if token in r.prompt_ids or token in r.output_ids:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        count = list(r.output_ids).count(token)
        x -= p.frequency_penalty * count
        x -= p.presence_penalty if count else 0.0
        if len(r.output_ids) < p.min_tokens and (token in r.eos_ids or token in p.stop_token_ids):
            x = -INF
        out.append(x)
    return out


def distribution(scores: list[float], p: SamplingParams, nudge: float = 0.0) -> list[float]:
    """Probabilities after the filters; ``nudge`` moves their thresholds a little."""
    top = max(scores)
    probs = [math.exp((x - top) / p.temperature) for x in scores]
    kept = [q if q >= p.min_p * (1 + nudge) or q == 1 else 0.0 for q in probs]
    if 0 < p.top_k < len(kept):
        least = sorted(scores, reverse=True)[p.top_k - 1]
        kept = [q if x >= least else 0.0 for q, x in zip(kept, scores, strict=True)]
    if p.top_p < 1:
        budget = p.top_p * (1 + nudge) * math.fsum(kept)
        before = 0.0
        nucleus = [0.0] * len(kept)
        for token in sorted(range(len(kept)), key=lambda i: (-kept[i], i)):
            if before >= budget:
                break
            nucleus[token] = kept[token]
            before += kept[token]
        kept = nucleus
    total = math.fsum(kept)
    return [q / total for q in kept]


def drawable(logits: list[float], r: Row) -> set[int]:
    """What the reference draws, with every threshold and the draw itself moved by a relative 1e-9."""
    scores = adjusted(logits, r)
    if r.params.temperature == 0:
        return {scores.index(max(scores))}
    u, found = uniform(r.key, len(r.output_ids)), set()
    for nudge in (-1e-9, 0.0, 1e-9):
        probs = distribution(scores, r.params, nudge)
        for mark in (u - 1e-9, u, u + 1e-9):
            below = 0.0
            for token, q in enumerate(probs):
                below += q
                if q > 0 and below > mark:
                    found.add(token)
                    break
    return found


# few distinct values, so that ties are common; sixteenths, so that the reference divides them alike
LOGIT = st.one_of(st.integers(-160, 160).map(lambda n: n / 16), st.sampled_from([-INF, 0.0, 1.0]))
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 1e-5, 0.3, 0.7, 1.0, 1.7, 100.0]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 3, 7, 50, 1000]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-3, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 2.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.0, 0.25, 2.0]),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(0, 60), max_size=2).map(tuple),
    },
)


@st.composite
def steps(draw: Any) -> tuple[list[list[float]], list[Row]]:
    vocab = draw(st.integers(2, 50))
    ids = st.lists(st.integers(0, vocab - 1), max_size=6)
    logits, rows = [], []
    for _ in range(draw(st.integers(1, 5))):
        params = draw(PARAMS)
        r = row(draw(ids), draw(ids), draw(st.integers(0, 2**64 - 1)), **params)
        values = draw(st.lists(LOGIT, min_size=vocab, max_size=vocab))
        values[draw(st.integers(0, vocab - 1))] = 2.0
        if max(adjusted(values, r)) > -INF:
            logits.append(values)
            rows.append(r)
    return logits, rows


@settings(max_examples=300)
@given(steps())
def test_every_combination_draws_what_the_reference_draws(step: tuple[list[list[float]], list[Row]]) -> None:
    logits, rows = step
    assume(rows)
    given_logits = torch.tensor(logits, dtype=torch.float64)
    before = given_logits.clone()
    drawn = sample(given_logits, rows)
    assert torch.equal(given_logits, before)
    for values, r, d in zip(logits, rows, drawn, strict=True):
        assert d.token in drawable(values, r)
        assert d.logprobs is None


@settings(max_examples=100)
@given(steps())
def test_a_row_alone_draws_what_it_draws_in_a_batch(step: tuple[list[list[float]], list[Row]]) -> None:
    logits, rows = step
    together = sample(torch.tensor(logits).reshape(len(rows), -1), rows) if rows else []
    alone = [sample(torch.tensor([v]), [r])[0] for v, r in zip(logits, rows, strict=True)]
    assert together == alone


# ------------------------------------------------------- each parameter by itself


def support(logits: list[float], **params: Any) -> set[int]:
    p = SamplingParams(**params)
    return set(weights(torch.tensor([logits], dtype=torch.float64), [p])[0].nonzero()[:, 0].tolist())


LADDER = [math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert support(LADDER, top_k=2) == {1, 3}
    assert support([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == {1, 2, 3}
    assert support(LADDER, top_k=99) == support(LADDER, top_k=-1) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_token_that_reaches_it_and_the_lowest_ids_among_equals() -> None:
    assert support(LADDER, top_p=0.69) == {1, 3}
    assert support(LADDER, top_p=0.71) == {1, 3, 4}
    assert support(LADDER, top_p=1e-12) == {1}
    assert support([0.0] * 4, top_p=0.5) == {0, 1}
    assert support([0.0] * 4, top_p=0.51) == {0, 1, 2}


def test_top_p_counts_what_the_other_filters_left() -> None:
    # of 0.4 + 0.3, 0.4 is 57%
    assert support(LADDER, top_k=2, top_p=0.55) == {1}
    assert support(LADDER, min_p=0.7, top_p=0.55) == {1}
    assert support(LADDER, top_p=0.55) == {1, 3}


def test_min_p_is_relative_to_the_largest() -> None:
    assert support(LADDER, min_p=0.3) == {1, 3, 4}
    assert support([1.0, 5.0, 5.0, 4.99], min_p=1) == {1, 2}


def test_temperature_comes_before_the_filters() -> None:
    # probabilities go as 0.1, 0.4, 0.05, 0.3, 0.15 squared
    assert support(LADDER, min_p=0.3, temperature=0.5) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-300])
def test_tiny_temperatures_draw_the_best_and_its_equals(temperature: float) -> None:
    assert support([0.0, 1e6, 1e6, -INF], temperature=temperature) == {1, 2}
    p = SamplingParams(temperature=temperature)
    assert weights(torch.tensor([[0.0, 1e6, 1e6, -INF]]), [p])[0].nonzero()[:, 0].tolist() == [1, 2]


def test_penalties_by_hand() -> None:
    def pick(prompt: Sequence[int], output: Sequence[int], **params: Any) -> int:
        return draw([0.0, 2.0, 1.5, -1.0], row(prompt, output, temperature=0, **params))

    assert pick([1], [], repetition_penalty=1.5) == 2  # 2 / 1.5 < 1.5
    assert pick([1], [], repetition_penalty=1.3) == 1
    assert pick([1], [], presence_penalty=2) == 1  # the prompt does not count
    assert pick([], [1], presence_penalty=0.6) == 2
    assert pick([], [1], frequency_penalty=0.3) == 1
    assert pick([], [1, 1], frequency_penalty=0.3) == 2
    # a negative logit is multiplied: further down above 1, up below 1
    assert draw([-1.0, -1.5], row([0], temperature=0, repetition_penalty=2)) == 1
    assert draw([-1.5, -1.0], row([0], temperature=0, repetition_penalty=0.5)) == 0


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_forbids_the_ends_until_reached(ignore_eos: bool) -> None:
    logits = [9.0, 8.0, 1.0]

    def pick(output: Sequence[int]) -> int:
        stops = {"min_tokens": 2, "stop_token_ids": (1, 999), "ignore_eos": ignore_eos}
        return draw(logits, row((), output, temperature=0, **stops))

    assert [pick([2] * n) for n in range(3)] == [2, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 17, 5000])
def test_greedy_takes_the_lowest_id_among_equals(dtype: Any, vocab: int) -> None:
    logits = torch.randint(0, 3, (40, vocab), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [values.index(max(values)) for values in logits.tolist()]
    assert [d.token for d in sample(logits, [row(temperature=0)] * 40)] == expected


# -------------------------------------------------------------------- draws


def test_uniform_is_fixed_and_depends_on_both_arguments() -> None:
    # written down once: these may never change, seeds would lose their meaning
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(7, 3) == 0.1846062188940475
    values = {uniform(key, index) for key in range(50) for index in range(50)}
    assert len(values) == 2500
    assert all(0 <= u < 1 for u in values)
    assert uniform(2**64 - 1, 0) != uniform(0, 0)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws: below the 99.99% point for the degrees of freedom, at fixed keys."""
    logits = [1.2, -0.3, 0.0, 2.0, 0.7, -1.5, 1.1, 0.4]
    bound = {3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9}  # scipy.stats.chi2.ppf(0.9999, dof)
    n = 20_000
    rows = [row((), range(index), key=11, **params) for index in range(100)]
    rows = [Row(r.params, (), r.output_ids, key, r.eos_ids) for key in range(n // 100) for r in rows]
    counts = [0] * len(logits)
    for drawn in sample(torch.tensor(logits).expand(n, -1), rows):
        counts[drawn.token] += 1
    probs = distribution(logits, rows[0].params)
    assert all(count == 0 for count, q in zip(counts, probs, strict=True) if q == 0)
    terms = [(count - n * q) ** 2 / (n * q) for count, q in zip(counts, probs, strict=True) if q > 0]
    assert sum(terms) < bound[len(terms) - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_no_draw_leaves_the_support(monkeypatch: pytest.MonkeyPatch, u: float, dtype: Any) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda key, index: u)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 3001, generator=generator, dtype=dtype) * 5
    logits[:, :10] = -INF
    logits[:, -10:] = -INF
    tokens = [d.token for d in sample(logits, [row()] * 20)]
    assert all(10 <= t < 2991 for t in tokens)
    if u != 0.5:
        assert set(tokens) == {10 if u == 0 else 2990}
    # just one token has a probability
    logits[:] = -INF
    logits[:, 1234] = -7.0
    assert {d.token for d in sample(logits, [row()] * 20)} == {1234}


# ------------------------------------------------- wide rows, as a model's are


def wide(n: int, vocab: int = 20_011) -> tuple[Any, list[Row]]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(n, vocab, generator=generator) * torch.linspace(0.1, 6, n)[:, None]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_k": 2000, "top_p": 0.99, "temperature": 0.8},
        {"min_p": 0.02, "logprobs": 3},
        {"top_p": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
    ]
    return logits, [row(range(9), range(i), i, **kinds[i % len(kinds)]) for i in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_do_not_depend_on_their_batch(dtype: Any) -> None:
    logits, rows = wide(21)
    logits = logits.to(dtype)
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(rows)]
    some = [20, 3, 2, 11, 9]
    assert [together[i] for i in some] == sample(logits[some], [rows[i] for i in some])
    random = [i for i, r in enumerate(rows) if r.params.temperature > 0]
    weighed = weights(logits[random].float(), [rows[i].params for i in random])
    for at, i in enumerate(random):
        assert torch.equal(weighed[at], weights(logits[i : i + 1].float(), [rows[i].params])[0])


def test_the_nucleus_of_a_wide_row_is_that_of_a_full_sort() -> None:
    """Narrow ones are found in the head, wide ones by the sort, and equals at the edge by their ids."""
    logits, _ = wide(12)
    logits = (logits * 4).round() / 4  # many equals
    params = [SamplingParams(top_p=p) for p in (0.3, 0.9, 0.99) for _ in range(4)]
    weighed = weights(logits, params)
    whole = weights(logits, [SamplingParams()] * 12)
    sizes = []
    for got, full, p in zip(weighed, whole, params, strict=True):
        order = full.sort(descending=True, stable=True).indices
        sums = full[order].cumsum(0)
        last = int((sums < p.top_p * int(sums[-1])).sum())
        expected = set(order[: last + 1].tolist())
        assert set(got.nonzero()[:, 0].tolist()) == expected
        assert torch.equal(got[list(expected)], full[list(expected)])
        sizes.append(len(expected))
    assert min(sizes) < 256 < max(sizes)


def test_a_plain_row_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sorted")

    for name in ("topk", "sort", "argsort", "msort"):
        monkeypatch.setattr(torch.Tensor, name, refuse, raising=True)
    assert 0 <= draw([0.5, 1.0, 0.0], row(temperature=0.9, min_p=0.1)) < 3
    with pytest.raises(AssertionError, match="sorted"):
        draw([0.5, 1.0, 0.0], row(top_p=0.9))


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logprobs_are_those_of_the_model(dtype: Any) -> None:
    logits, rows = wide(8, 500)
    logits = logits.to(dtype)
    for i, r in enumerate(rows):
        r.params = SamplingParams(temperature=i / 4, top_k=5, repetition_penalty=1.5, logprobs=i)
    for raw, r, d in zip(logits, rows, sample(logits, rows), strict=True):
        values = raw.double().tolist()
        norm = math.log(math.fsum(math.exp(x) for x in values))
        best = sorted(range(500), key=lambda t: (-values[t], t))[: r.params.logprobs]
        assert d.logprobs is not None
        assert list(d.logprobs) == [d.token, *(t for t in best if t != d.token)]
        assert d.logprobs == pytest.approx({t: values[t] - norm for t in d.logprobs}, abs=2e-5)
        if dtype != torch.float64:
            exact = raw.float().log_softmax(-1)
            assert all(exact[t].item() == value for t, value in d.logprobs.items())


def test_logprobs_beyond_the_vocabulary_are_all() -> None:
    drawn = sample(torch.tensor([[0.0, 1.0, 0.0]]), [row(temperature=0, logprobs=9)])[0]
    assert list(drawn.logprobs or ()) == [1, 0, 2]


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"temperature": 0, "presence_penalty": 1.0}])
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([0.0, math.nan, 1.0], "nan"),
        ([-INF] * 3, "-inf"),
        ([0.0, INF, math.nan], "nan"),
        ([0.0, INF, 0], "inf"),
    ],
)
def test_a_row_without_a_token_is_refused_by_name(
    params: dict[str, Any], bad: list[float], word: str
) -> None:
    rows = [row(**params), row(**params)]
    with pytest.raises(ServeLabError, match=rf"row 1 of the step\n.*request r7\n.* is {word}\n"):
        sample(torch.tensor([[0.0, 1.0, 2.0], bad]), rows)


def test_min_tokens_that_forbids_everything_is_refused() -> None:
    with pytest.raises(ServeLabError, match="min_tokens"):
        draw([1.0, 2.0], row(temperature=0, min_tokens=1, stop_token_ids=(1,)))


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows expected"):
        sample(torch.zeros(3, 5), [row(), row()])
    with pytest.raises(ValueError, match="1 rows expected"):
        sample(torch.zeros(5), [row()])


# ------------------------------------------------------------------ transformers


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 50))
def test_transformers_keeps_the_same_tokens(seed: int, vocab: int) -> None:
    """Where the meanings are the same: no equals, thresholds far from any sum by chance."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    cases = [
        ({"top_k": 5}, processors.TopKLogitsWarper(5)),
        ({"top_p": 0.83}, processors.TopPLogitsWarper(0.83)),
        ({"min_p": 0.07}, processors.MinPLogitsWarper(0.07)),
    ]
    for params, warper in cases:
        theirs = warper(None, logits.clone()).softmax(-1)
        weighed = weights(logits, [SamplingParams(**params)] * 4)
        ours = weighed.double() / weighed.sum(-1, keepdim=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours > 0, theirs > 0)
    ids = torch.randint(0, vocab, (4, 7), generator=torch.Generator().manual_seed(seed))
    theirs = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    best = sample(logits, [row(i[:3], i[3:], temperature=0, repetition_penalty=1.7) for i in ids.tolist()])
    assert [d.token for d in best] == theirs.argmax(-1).tolist()

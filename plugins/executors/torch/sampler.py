"""One draw for every row of a step: penalties, temperature, filters and a counter-based choice.

The order and the meaning of every parameter are those of vLLM v1 (``vllm/v1/sample/sampler.py``: min tokens,
penalties, greedy, temperature, min-p, top-k and top-p, draw; ``vllm/v1/sample/ops/topk_topp_sampler.py``:
ties with the k-th stay, and so does the token that reaches top-p). Three things are stricter here: only
temperature 0 is greedy (there: below 1e-5, and the others below 0.01 are raised to it), the nucleus of top-p
takes the lowest ids among equals (there: any), and every request has draws of its own, seeded or not.

A filtered distribution is held as whole numbers. Their sums are exact in any order, so on one device a token
depends on its own row only, never on the batch around it, and a token of weight 0 cannot be drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf, isfinite, log

import torch

from servelab.core.errors import ServeLabError
from servelab.core.sampling import SamplingParams

_UNIT = 2.0**60
"""Weight of probability 1: sums of a row stay below 2**63, what is lost is below 2**-60 a token."""
_HEAD = 256
"""Most likely tokens looked at before a whole row is sorted for top-p."""


@dataclass(slots=True)
class Row:
    """One sampled row of a step."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    """The output so far; its length is the position of this draw."""
    key: int
    """Seed of the request's draws, 64 bits: ``params.seed``, or derived from run and request."""
    eos_ids: frozenset[int]
    """The model's own ends. ``min_tokens`` forbids them and the stop tokens, also under ``ignore_eos``."""
    request: str = ""
    """Id for messages."""


@dataclass(slots=True, frozen=True)
class Drawn:
    token: int
    logprobs: dict[int, float] | None
    """The drawn token first, then the ``params.logprobs`` most likely ones (lowest ids among equals), of the
    log-softmax of the logits as they came; None if not asked for."""


def uniform(key: int, index: int) -> float:
    """The draw at a position of an output: 53 bits, in [0, 1), a function of the arguments only.

    Args:
        key: seed of the request, 64 bits.
        index: output tokens before this one.
    """
    block = key.to_bytes(8, "little") + index.to_bytes(8, "little")
    return (int.from_bytes(blake2b(block, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[Drawn]:
    """The next token of every row. Leaves ``logits`` as they are.

    Args:
        logits: ``[rows, vocab]``, any floating dtype; -inf forbids a token. Computed in float32, float64 if
            they are float64.
        rows: one per row of ``logits``.

    Raises:
        ServeLabError: a row has a NaN or +inf, or every token of it is forbidden.
        ValueError: the shapes do not match.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits of {len(rows)} rows expected, got shape {tuple(logits.shape)}")
    edited = [i for i, row in enumerate(rows) if _is_edited(row)]
    random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    scores = logits
    if edited or random:
        scores = logits.to(_precision(logits), copy=bool(edited))
    for i in edited:
        _edit(scores[i], rows[i])
    top, best = scores.max(dim=-1)  # the lowest id among equals; NaN counts as largest
    _check(top.tolist(), rows)
    tokens: list[int] = best.tolist()
    if random:
        some = [rows[i] for i in random]
        weighed = weights(scores if len(some) == len(rows) else scores[random], [row.params for row in some])
        for i, token in zip(random, _draw(weighed, some), strict=True):
            tokens[i] = token
    return [
        Drawn(token, None if row.params.logprobs is None else _logprobs(raw, token, row.params.logprobs))
        for raw, token, row in zip(logits, tokens, rows, strict=True)
    ]


def weights(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distributions that rows are drawn from: after temperature, min-p, top-k and top-p.

    Args:
        scores: ``[rows, vocab]``, float32 or float64, after penalties; the largest of each row is finite.
        params: one per row, temperature above 0.

    Returns:
        ``[rows, vocab]`` int64, in proportion to the probabilities; 0 where a token is left out.
    """
    # Relative to the largest before the division: a tiny temperature sends the others to -inf, never to NaN.
    scaled = scores - scores.amax(dim=-1, keepdim=True)
    scaled /= _column([p.temperature for p in params], scaled).clamp(min=torch.finfo(scaled.dtype).tiny)
    probs = scaled.softmax(dim=-1)
    vocab = scaled.shape[-1]
    limited = [i for i, p in enumerate(params) if 0 < p.top_k < vocab]
    if limited or any(p.min_p > 0 for p in params):
        floor = _column([log(p.min_p) if p.min_p else -inf for p in params], scaled)
        if limited:
            k = torch.tensor([params[i].top_k for i in limited], device=scaled.device)
            largest = _rows(scaled, limited).topk(int(k.max())).values
            floor[limited] = floor[limited].maximum(largest.gather(-1, k[:, None] - 1))
        probs.masked_fill_(scaled < floor, 0)
    nuclei = [i for i, p in enumerate(params) if p.top_p < 1]
    if nuclei:
        top_p = torch.tensor([params[i].top_p for i in nuclei], dtype=torch.float64, device=probs.device)
        probs[nuclei] = _nucleus(_rows(probs, nuclei), top_p)
    return _units(probs)


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zeroes all but the smallest set of most likely tokens that reaches a part of each row's sum.

    Args:
        probs: ``[rows, vocab]``, not necessarily summing to 1.
        top_p: ``[rows]``, float64, below 1.
    """
    total = _units(probs).sum(dim=-1)
    needed = (total.double() * top_p).ceil().long().minimum(total)[:, None]
    edge = probs.new_empty(len(probs), 1)  # the least likely probability in the set
    room = total.new_empty(len(probs), 1)  # how many tokens of that probability are in it
    todo = torch.arange(len(probs), device=probs.device)
    # A nucleus is mostly within the head; only rows where it is not are sorted as a whole.
    for size in (min(_HEAD, probs.shape[-1]), probs.shape[-1]):
        head = (probs if len(todo) == len(probs) else probs[todo]).topk(size).values
        last = (_units(head).cumsum(dim=-1) < needed[todo]).sum(dim=-1, keepdim=True)
        found = last[:, 0] < size
        head, last, at = head[found], last[found], todo[found]
        edge[at] = head.gather(-1, last)
        room[at] = last + 1 - (head > edge[at]).sum(dim=-1, keepdim=True)
        todo = todo[~found]
        if not len(todo):
            break
    kept = probs.masked_fill(probs < edge, 0)
    tied = probs == edge
    crowded = (tied.sum(dim=-1) > room[:, 0]).nonzero()[:, 0]
    if len(crowded):
        late = tied[crowded] & (tied[crowded].cumsum(dim=-1) > room[crowded])
        kept[crowded] = kept[crowded].masked_fill(late, 0)
    return kept


def _draw(weighed: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """Inverse of the cumulative distribution in the order of ids: the first token whose sum exceeds the mark.

    The mark is below the total because a uniform draw is below 1; sums only grow at tokens with weight.
    """
    sums = weighed.cumsum(dim=-1)
    marks = [
        int(uniform(row.key, len(row.output_ids)) * 2**53) * total >> 53
        for row, total in zip(rows, sums[:, -1].tolist(), strict=True)
    ]
    found = torch.searchsorted(sums, torch.tensor(marks, device=sums.device)[:, None], right=True)
    tokens: list[int] = found[:, 0].tolist()
    return tokens


def _is_edited(row: Row) -> bool:
    p = row.params
    penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return penalised or len(row.output_ids) < p.min_tokens


def _edit(scores: torch.Tensor, row: Row) -> None:
    """Penalties and forbidden ends of one row, in place on ``[vocab]``."""
    p = row.params
    if p.repetition_penalty != 1:
        seen = _ids({*row.prompt_ids, *row.output_ids}, scores)
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
    if p.presence_penalty or p.frequency_penalty:
        counts = Counter(row.output_ids)
        often = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores[_ids(counts, scores)] -= p.presence_penalty + p.frequency_penalty * often
    if len(row.output_ids) < p.min_tokens:
        # a client may name ids the model does not have
        ends = (i for i in row.eos_ids | set(p.stop_token_ids) if i < len(scores))
        scores[_ids(ends, scores)] = -inf


def _check(top: Sequence[float], rows: Sequence[Row]) -> None:
    for i, (largest, row) in enumerate(zip(top, rows, strict=True)):
        if not isfinite(largest):
            raise ServeLabError(
                f"no token can be drawn for row {i} of the step",
                where=f"request {row.request}" if row.request else "",
                why=f"its largest logit, after penalties and min_tokens, is {largest}",
                do="-inf: every token is forbidden, look at min_tokens and the stop tokens; "
                "nan or inf: the model's output is broken, look at its weights and dtype",
            )


def _logprobs(raw: torch.Tensor, token: int, n: int) -> dict[int, float]:
    """Of one row ``[vocab]`` of logits as they came."""
    logprobs = raw.to(_precision(raw)).log_softmax(dim=-1)
    found = {token: float(logprobs[token])}
    if n:
        least = logprobs.topk(min(n, len(logprobs))).values[-1]
        # topk takes any of equals; these are all of them, by id, and the sort keeps that order
        ids = (logprobs >= least).nonzero()[:, 0]
        values, order = logprobs[ids].sort(descending=True, stable=True)
        top = zip(ids[order[:n]].tolist(), values[:n].tolist(), strict=True)
        found |= {i: value for i, value in top if i != token}
    return found


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _units(probs: torch.Tensor) -> torch.Tensor:
    return (probs * _UNIT).long()


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _ids(values: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.long, device=like.device)


def _rows(table: torch.Tensor, at: Sequence[int]) -> torch.Tensor:
    """Rows of a table, without a copy if it is all of them."""
    return table if len(at) == len(table) else table[at]

"""What text and page show of a run's results, each read in one place; and numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NONE = "\N{EN DASH}"
"""A figure without a sample."""
PERCENTILE = re.compile(r"p\d+(\.\d+)?(?=_ttft_ms$)")


def percentiles(result: Mapping[str, Any]) -> list[str]:
    """The percentiles in the results, as in their keys: ``p50``, ``p99.9``, in order."""
    found = [match[0] for key in result if (match := PERCENTILE.match(key))]
    return sorted(found, key=lambda name: float(name[1:]))


def plugins(info: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kind, plugin); several of one kind follow each other."""
    for kind, stated in (info.get("plugins") or {}).items():
        for one in stated if isinstance(stated, list) else [stated]:
            yield kind, one


def latencies(result: Mapping[str, Any], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By metric the columns in ms, such as ``mean`` and ``p99``, and the samples behind them."""
    extra = result["servelab"]
    found = {metric: result for metric in ("ttft", "tpot", "itl", "e2el")} | {"queueing": extra}
    return {
        metric: (*(number(of[f"{c}_{metric}_ms"], 2) for c in columns), number(extra["samples"][metric]))
        for metric, of in found.items()
    }


def outcomes(extra: Mapping[str, Any]) -> str:
    """``62 completed (3 at their length cap), 2 rejected``."""
    counts = [(state, count) for state, count in extra["requests"].items() if state != "arrived"]
    shown = [f"{number(count)} {state}" for state, count in counts if count or state == "completed"]
    if capped := extra["length_capped_requests"]:
        shown[0] += f" ({number(capped)} at their length cap)"
    return ", ".join(shown)


def instances(extra: Mapping[str, Any]) -> tuple[bool, list[tuple[str, ...]]]:
    """Whether requests were moved between instances, and what each instance did."""
    moved = (extra.get("router") or {}).get("moves", 0) > 0
    rows = [
        (
            str(one["instance"]),
            *(map(number, (one["dispatched"], one["moved_in"], one["moved_out"])) if moved else ()),
            number(one["requests"]),
            number(one["output_tokens"]),
            number(one["run_tokens"]),
            number(one["steps"]),
            number(one["mean_requests"], 1),
            percent(one["mean_kv_use"]),
            percent(one["peak_kv_use"]),
        )
        for one in extra.get("instances") or ()
    ]
    return moved, rows


QUALITY = ("quality", "linears MiB", "mean KL", "p99 KL", "top-1 %", "perplexity", "tokens")
"""The head of ``quality``."""


def quality(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The unquantized model, and each quantized one beside it."""
    first = next(iter(found.values()))
    rows: list[tuple[str, ...]] = [
        (
            *("unquantized", mib(first["reference_linear_bytes"]), NONE, NONE, NONE),
            *(number(first["reference_perplexity"], 3), number(first["tokens"])),
        )
    ]
    for label, one in found.items():
        tokens = number(one["tokens"])
        rows.append(
            (
                label,
                mib(one["linear_bytes"]),
                number(one["kl_mean"], 5),
                number(one["kl_p99"], 4),
                percent(one["top1_agreement"]),
                number(one["perplexity"], 3),
                tokens if one["tokens"] == one["total"] else f"{tokens} of {number(one['total'])}",
            )
        )
    return rows


def quality_note(info: Mapping[str, Any]) -> str:
    """On what text, and against which weights."""
    corpus = (info.get("quality") or {}).get("corpus") or {}
    origin = (info.get("weights") or {}).get("quantization")
    grid = ", already on a grid, which may flatter quantizers: read as relative to it"
    return (
        f"KL(unquantized || quantized) in nats per token, on {corpus.get('source', '?')} of Python "
        f"{corpus.get('python', '?')}, {corpus.get('part', '?')} part. Reference weights: "
        f"{origin or 'not stated'}{grid if origin and origin != 'none' else ''}."
    )


def device(info: Mapping[str, Any]) -> list[tuple[str, object, str]]:
    """Figure, value and source of each figure of the described device that is stated; empty without one."""
    stated = (info.get("settings") or {}).get("hardware") or {}
    sources = stated.get("sources") or {}
    return [
        (name, value, str(sources.get(name, "")) or "not stated")
        for name, value in stated.items()
        if name not in ("name", "tp", "sources") and value not in (None, [], ())
    ]


def device_line(info: Mapping[str, Any]) -> str | None:
    """``4 x a100_80g, each 312 TFLOP/s, 2,039 GB/s, 79.15 GiB``, with
    ``2 instances of`` before it where they are many; None where no device is described.
    """
    stated = (info.get("settings") or {}).get("hardware") or {}
    if not stated:
        return None
    units = (("flops", 1e12, "TFLOP/s"), ("memory_bytes_per_s", 1e9, "GB/s"), ("memory_bytes", 2**30, "GiB"))
    figures = [f"{stated[name] / one:,.4g} {unit}" for name, one, unit in units if stated.get(name)]
    each = ["each " + figures[0], *figures[1:]] if figures else []
    many = (info.get("cluster") or {}).get("instances", 1)
    instances = f"{many} instances of " if many > 1 else ""
    return ", ".join([f"{instances}{stated.get('tp', 1)} x {stated.get('name', '?')}", *each])


def routing(extra: Mapping[str, Any]) -> str | None:
    """What the router did after or in place of a dispatch at arrival; None: nothing."""
    did = extra.get("router") or {}
    parts = []
    if held := did.get("held_requests"):
        wait = did["mean_held_ms"]
        mean = f", for {number(wait, 2)} ms each on average" if wait is not None else ""
        parts.append(f"held {number(held)} requests before it placed them{mean}")
    if moves := did.get("moves"):
        parts.append(
            f"moved requests {number(moves)} times with {mib(did['moved_bytes'])} MiB of KV, and each stood "
            f"still for {number(did['mean_stop_ms'], 2)} ms on average"
        )
    if dropped := did.get("dropped_actions"):
        parts.append(f"{number(dropped)} of its actions were dropped (records action_dropped)")
    return "; ".join(parts) or None


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Nested mappings as dotted names, in order; a list of mappings counts its items."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{name}[{i}]")
    else:
        yield name, value


def number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def mib(size: float | None) -> str:
    return NONE if size is None else number(size / 2**20, 1)


def words(value: object) -> str:
    """A setting as a reader writes it: ``a=1 b=2``, ``a, b``; the names of YAML for none, true and false."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={words(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, list | tuple):
        return ", ".join(words(item) for item in value) or "[]"
    return str(value)


def figures(stated: Mapping[str, Any]) -> str:
    """Figures of a cost model with where each is from: ``device a100, mfu 0.741 (profile)``."""
    found = (
        (name, f"{words(one['value'])} ({one['from']})")
        if isinstance(one, Mapping) and set(one) == {"value", "from"}
        else (name, words(one))
        for name, one in stated.items()
    )
    return ", ".join(f"{name} {text}" for name, text in found)

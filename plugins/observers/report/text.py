"""The report as text: run card, tables, where the artefacts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from servelab.core.metrics.definitions import percentile_name
from servelab.plugins.observers.report.facts import (
    NONE,
    QUALITY,
    device_line,
    figures,
    instances,
    latencies,
    mib,
    number,
    outcomes,
    percent,
    plugins,
    quality,
    quality_note,
    routing,
)
from servelab.plugins.tables import aligned

WIDTH = 100
"""Columns the report keeps to."""
SHOWN = ("torch", "triton", "transformers")
"""Libraries named in the terminal; ``env.json`` has all of them."""
LATENCIES = (
    ("ttft", "TTFT", "first token"),
    ("tpot", "TPOT", "per token after it"),
    ("itl", "ITL", ""),
    ("e2el", "E2E", "end to end"),
)
ITL_NOTES = {"chunk": "gap between chunks", "spread": "gap, spread over tokens"}


def render(result: Mapping[str, Any], percentiles: Sequence[float], folder: Path | None) -> Iterator[str]:
    """The lines of the report, without line ends; at most ``WIDTH`` columns where words allow."""
    for line in _lines(result, percentiles, folder):
        yield line.replace(NONE, "-")  # not every terminal has a dash


def _lines(result: Mapping[str, Any], percentiles: Sequence[float], folder: Path | None) -> Iterator[str]:
    extra = result["servelab"]
    yield from _head(extra)
    yield ""
    yield from _card(extra["plugins"])
    yield ""
    if extra["requests"]["arrived"] or not extra["quality"]:
        yield from _latency_table(result, percentiles)
        yield ""
        yield from _totals(result)
        yield ""
        yield from _classes(extra)
        yield from _instances(extra)
    yield from _quality(extra)
    for note in extra["notes"]:
        yield from _wrapped(f"note: {note}", " " * 6)
    if extra["run"]["partial"]:
        yield from _wrapped(f"PARTIAL: {_partial(result)}", " " * 9)
    if folder is None:
        yield "artefacts: none, this run has no folder"
    else:
        yield f"artefacts: {folder}"


def _partial(result: Mapping[str, Any]) -> str:
    """Why, and what is missing: said again where the eye ends up."""
    run, counts = result["servelab"]["run"], result["servelab"]["requests"]
    why = run["status"] + (f", {run['reason']}" if run["reason"] else "")
    if not result["num_prompts"]:
        return f"{why}; the figures are of what was read until then"
    return (
        f"{why}; {number(counts['completed'])} of {number(result['num_prompts'])} requests completed, "
        "and the figures are of these"
    )


def _head(extra: Mapping[str, Any]) -> Iterator[str]:
    run, info = extra["run"], extra["info"]
    if run["partial"]:
        reason = f": {run['reason']}" if run["reason"] else ""
        yield from _wrapped(f"ServeLab run, PARTIAL ({run['status']}{reason})", "")
    else:
        yield "ServeLab run"
    facts = {
        "model": info.get("model"),
        "clock": extra["clock"],
        "executor": (extra["plugins"].get("executor") or {}).get("name"),
        "instances": _cluster(info),
        "traffic": (info.get("workload") or {}).get("traffic"),
        "seed": extra["seed"],
        "stamps": _words(extra["stamps"]) or "none",
        "hardware": device_line(info),
        "machine": _machine(info.get("machine") or {}),
        "software": _software(info),
        "took": _took(extra),
    }
    for name, value in facts.items():
        if value is not None:
            yield from _wrapped(f"  {name:<9} {_words(value)}", " " * 12)
    if priced := info.get("cost"):
        yield from _wrapped(f"  {'cost':<9} {figures(priced)}", " " * 12)
    yield from _weights(info.get("weights") or {})
    many = (info.get("cluster") or {}).get("instances", 1)
    for pool in (info.get("kv") or {}).get("pools") or ():
        pages, tokens, size = (pool.get(key) for key in ("pages", "page_tokens", "bytes_per_page"))
        yield (
            f"  {'kv':<9} pool {pool.get('id', '?')}: {number(pages)} pages of {number(tokens)} tokens, "
            f"{number(size)} bytes each" + (f", in each of {number(many)} instances" if many > 1 else "")
        )


def _cluster(info: Mapping[str, Any]) -> str | None:
    many = (info.get("cluster") or {}).get("instances")
    every = ((info.get("settings") or {}).get("cluster") or {}).get("report_interval_ms")
    told = f", of which the router knows what they report every {every:,g} ms" if every else ""
    return None if many is None else f"{number(many)}{told}"


def _machine(machine: Mapping[str, Any]) -> str | None:
    if not machine:
        return None
    cores, usable, memory = machine["cores"], machine["usable_cores"], machine["memory_bytes"]
    limit = machine["memory_limit_bytes"]
    parts = [
        machine["cpu"] or "unknown CPU",
        f"{number(cores)} cores" + ("" if usable in (None, cores) else f", {usable:g} usable"),
        f"{'-' if memory is None else number(memory / 2**30, 1)} GiB"
        + (f", {number(limit / 2**30, 1)} GiB usable" if limit else ""),
        *(f"{count} x {name}" for name, count in Counter(machine["gpus"]).items()),
        machine["os"],
    ]
    return "; ".join(parts)


def _software(info: Mapping[str, Any]) -> str | None:
    if "servelab" not in info:
        return None
    commit = f"commit {info['commit'][:12]}" if info.get("commit") else "no checkout"
    changes = ", with changes" if info.get("dirty") else ""
    libraries = info.get("libraries") or {}
    parts = [f"servelab {info['servelab']} ({commit}{changes})", f"Python {info['python']}"]
    return ", ".join([*parts, *(f"{name} {libraries[name]}" for name in SHOWN if name in libraries)])


def _took(extra: Mapping[str, Any]) -> str | None:
    if extra["wall_s"] is None:
        return None
    return f"{extra['wall_s']:,.3g} s of real time, at most {mib(extra['peak_rss_bytes'])} MiB of memory"


def _weights(weights: Mapping[str, Any]) -> Iterator[str]:
    if "bytes" not in weights:
        return
    text = f"  {'weights':<9} {mib(weights['bytes'])} MiB"
    if linears := weights.get("linears"):
        formats = ", ".join(f"{count} {name}" for name, count in linears["formats"].items())
        text += f": linears {mib(linears['dense_bytes'])} -> {mib(linears['packed_bytes'])} MiB ({formats})"
        if linears["tied_head_bytes"]:
            text += (
                f", and {mib(linears['tied_head_bytes'])} for the head, whose table stays as the embedding"
            )
    yield from _wrapped(text, " " * 12)


def _card(stated: Mapping[str, Any]) -> Iterator[str]:
    """One row per plugin."""
    rows = [
        (
            kind,
            str(plugin.get("name", "?")),
            str(plugin.get("version") or NONE),
            plugin.get("paper") or NONE,
            _words(plugin.get("non_default")) or NONE,
        )
        for kind, plugin in plugins({"plugins": stated})
    ]
    if not rows:
        yield "  plugins: not stated"
        return
    yield from _table(("plugin", "name", "version", "paper", "not at default"), rows)


def _latency_table(result: Mapping[str, Any], percentiles: Sequence[float]) -> Iterator[str]:
    extra = result["servelab"]
    columns = ["mean", *(percentile_name(q) for q in percentiles)]
    cells, itl = latencies(result, columns), ITL_NOTES[extra["itl_mode"]]
    rows = [(f"{name} ({note or itl})", "ms", *cells[metric]) for metric, name, note in LATENCIES]
    rows.append(("queueing (arrival to first run)", "ms", *cells["queueing"]))
    yield from _table(("latency", "unit", *columns, "samples"), rows, numbers_from=2)


def _totals(result: Mapping[str, Any]) -> Iterator[str]:
    extra = result["servelab"]
    rows = [
        ("duration", number(result["duration"], 3), "s", "first arrival to last end"),
        ("request throughput", number(result["request_throughput"], 3), "req/s", "completed requests"),
        ("output throughput", number(result["output_throughput"], 1), "tok/s", _peak(result)),
        ("total throughput", number(result["total_token_throughput"], 1), "tok/s", "prompt and output"),
        *_slo_rows(result),
        ("requests", number(extra["requests"]["arrived"]), "", outcomes(extra)),
        ("concurrency", number(result["max_concurrent_requests"]), "req", "most at one time"),
        ("batch", number(extra["batch"]["mean_requests"], 1), "req/step", _batch(extra["batch"])),
        (
            "preemptions",
            number(extra["preemptions"]),
            "",
            f"{number(extra['recomputed_tokens'])} tokens recomputed",
        ),
        ("prefix hits", number(extra["prefix_hit_tokens"]), "tok", _reuse(extra)),
        *(row for pool in extra["kv_pages"] for row in _kv_rows(pool)),
        *_energy(extra),
    ]
    yield from _table(("total", "value", "unit", ""), rows, numbers_from=1, numbers_to=2)


def _energy(extra: Mapping[str, Any]) -> list[tuple[str, ...]]:
    if extra["energy_j"] is None:
        return []
    each = extra["energy_per_output_token_j"]
    note = "all devices, idle included" + (f"; {number(each, 3)} J per output token" if each else "")
    return [("energy", number(extra["energy_j"] / 1e3, 1), "kJ", note)]


def _reuse(extra: Mapping[str, Any]) -> str:
    if not extra["prefix_hit_tokens"]:
        return "prompt tokens not computed again"
    evicted = f"; {number(extra['evicted_pages'])} pages evicted" if extra["evicted_pages"] else ""
    return f"not computed again: {number(100 * extra['prefix_hit_rate'], 1)} % of prompt tokens{evicted}"


def _peak(result: Mapping[str, Any]) -> str:
    return f"busiest second {number(result['max_output_tokens_per_s'])}"


def _slo_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    extra = result["servelab"]
    rows = []
    if result["request_goodput"] is not None:
        judged = f"{number(extra['slo_good'])} good of {number(extra['slo_judged'])} judged"
        shares = extra["slo_attainment_by_metric"].items()
        parts = [f"{m} {'-' if share is None else f'{percent(share)} %'}" for m, share in shares]
        rows += [
            ("goodput", number(result["request_goodput"], 3), "req/s", "requests within every stated bound"),
            ("token goodput", number(extra["token_goodput"], 1), "tok/s", "output of these requests"),
            (
                "SLO attainment",
                percent(extra["slo_attainment"]),
                "%",
                f"{judged}; {', '.join(parts)}",
            ),
        ]
    if extra["tbt_bound_ms"] is not None:
        note = f"gaps of at most {number(extra['tbt_bound_ms'], 2)} ms"
        rows.append(("TBT attainment", percent(extra["tbt_attainment"]), "%", note))
    return rows


def _classes(extra: Mapping[str, Any]) -> Iterator[str]:
    """Goodput by request class, where there are several."""
    classes: Mapping[str, Any] = extra["slo_by_class"]
    if len(classes) < 2:
        return
    metrics = list(extra["slo_attainment_by_metric"])
    rows = [
        (
            name,
            percent(one["attainment"]),
            *(percent(one["attainment_by_metric"].get(metric)) for metric in metrics),
            number(one["request_goodput"], 3),
            number(one["token_goodput"], 1),
            number(one["judged"]),
        )
        for name, one in classes.items()
    ]
    head = ("class", "SLO %", *(f"{metric} %" for metric in metrics), "good req/s", "good tok/s", "judged")
    yield from _table(head, rows, numbers_from=1)
    yield ""


def _instances(extra: Mapping[str, Any]) -> Iterator[str]:
    """What each did, where there are several, and what the router did later."""
    moved, rows = instances(extra)
    if len(rows) > 1:
        yield from _table(
            (
                *("instance", *(("sent", "in", "out") if moved else ()), "requests", "output tok"),
                *("tok run", "steps", "req/step", "mean KV %", "peak KV %"),
            ),
            rows,
            numbers_from=1,
        )
        yield ""
    if told := routing(extra):
        yield from _wrapped(f"  the router {told}", "    ")
        yield ""


def _batch(batch: Mapping[str, Any]) -> str:
    return (
        f"at most {number(batch['max_requests'])} req, {number(batch['max_tokens'])} tok; "
        f"{number(batch['steps'])} steps in {number(batch['launches'])} launches"
    )


def _kv_rows(pool: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    note = f"peak of {number(pool['pages'])}"
    if pool["peak_use"] is not None:
        note += f" ({percent(pool['peak_use'])} %), mean {number(pool['mean_pages'], 1)}"
    yield (f"KV pool {pool['pool']}", number(pool["peak_pages"]), "pages", note)
    stored = pool["mean_stored_tokens"]
    if stored is not None:
        awaited, idle, unusable = (
            number(pool[f"mean_{name}_tokens"], 1) for name in ("awaited", "idle", "unusable")
        )
        note = f"mean; {awaited} reserved for later, {idle} never used, {unusable} free but in pieces"
        yield (f"  stored in {pool['pool']}", number(stored, 1), "tok", note)


def _quality(extra: Mapping[str, Any]) -> Iterator[str]:
    """Quantized models beside the unquantized one."""
    stated = extra["info"].get("quality")
    if not extra["quality"]:
        if stated is not None:
            yield f"  quality: not measured ({stated.get('why') or 'the run ended before'})"
            yield ""
        return
    yield from _table(QUALITY, quality(extra["quality"]), numbers_from=1)
    yield from _wrapped(f"  {quality_note(extra['info'])}", "  ")
    yield ""


def _words(value: object) -> str:
    """A setting as a reader writes it: ``a=1 b=2`` for mappings, ``a, b`` for lists."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(item) for item in value)
    return str(value)


# ---------------------------------------------------------------- tables


def _wrapped(line: str, indent: str) -> list[str]:
    return wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True) or [""]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = -1, numbers_to: int | None = None
) -> Iterator[str]:
    """Aligned columns, numbers to the right; long cells of the last two columns continue below themselves."""
    numbers = range(numbers_from, numbers_to or len(head)) if numbers_from >= 0 else range(0)
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    spare = WIDTH - 2 - sum(width + 2 for width in widths[:-2])
    if not numbers or len(head) - 1 not in numbers:
        widths[-2] = (
            min(widths[-2], max(spare // 2, 20)) if widths[-2] + 2 + widths[-1] > spare else widths[-2]
        )
        widths[-1] = min(widths[-1], max(spare - widths[-2] - 2, 20))
    for row in (head, *rows):
        cells = [
            wrap(cell, width, break_on_hyphens=False) or [""] for cell, width in zip(row, widths, strict=True)
        ]
        lines = list(zip_longest(*cells, fillvalue=""))
        yield from (f"  {line}".rstrip() for line in aligned(lines, numbers, widths))

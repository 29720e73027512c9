"""The report as text: run card, tables, where the artefacts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from servelab.core.metrics.definitions import percentile_name
from servelab.plugins.observers.report.facts import device_line, figures, routing

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
        f"{why}; {_number(counts['completed'])} of {_number(result['num_prompts'])} requests completed, "
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
            f"  {'kv':<9} pool {pool.get('id', '?')}: {_number(pages)} pages of {_number(tokens)} tokens, "
            f"{_number(size)} bytes each" + (f", in each of {_number(many)} instances" if many > 1 else "")
        )


def _cluster(info: Mapping[str, Any]) -> str | None:
    many = (info.get("cluster") or {}).get("instances")
    every = ((info.get("settings") or {}).get("cluster") or {}).get("report_interval_ms")
    told = f", of which the router knows what they report every {every:,g} ms" if every else ""
    return None if many is None else f"{_number(many)}{told}"


def _machine(machine: Mapping[str, Any]) -> str | None:
    if not machine:
        return None
    cores, usable, memory = machine["cores"], machine["usable_cores"], machine["memory_bytes"]
    limit = machine["memory_limit_bytes"]
    parts = [
        machine["cpu"] or "unknown CPU",
        f"{_number(cores)} cores" + ("" if usable in (None, cores) else f", {usable:g} usable"),
        f"{'-' if memory is None else _gib(memory)} GiB" + (f", {_gib(limit)} GiB usable" if limit else ""),
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
    return f"{extra['wall_s']:,.3g} s of real time, at most {_mib(extra['peak_rss_bytes'])} MiB of memory"


def _weights(weights: Mapping[str, Any]) -> Iterator[str]:
    if "bytes" not in weights:
        return
    text = f"  {'weights':<9} {_mib(weights['bytes'])} MiB"
    if linears := weights.get("linears"):
        formats = ", ".join(f"{count} {name}" for name, count in linears["formats"].items())
        text += f": linears {_mib(linears['dense_bytes'])} -> {_mib(linears['packed_bytes'])} MiB ({formats})"
        if linears["tied_head_bytes"]:
            text += (
                f", and {_mib(linears['tied_head_bytes'])} for the head, whose table stays as the embedding"
            )
    yield from _wrapped(text, " " * 12)


def _card(plugins: Mapping[str, Any]) -> Iterator[str]:
    """One row per plugin."""
    rows = [
        (
            kind,
            str(plugin.get("name", "?")),
            str(plugin.get("version") or "-"),
            plugin.get("paper") or "-",
            _words(plugin.get("non_default")) or "-",
        )
        for kind, stated in plugins.items()
        for plugin in (stated if isinstance(stated, list) else [stated])
    ]
    if not rows:
        yield "  plugins: not stated"
        return
    yield from _table(("plugin", "name", "version", "paper", "not at default"), rows)


def _latency_table(result: Mapping[str, Any], percentiles: Sequence[float]) -> Iterator[str]:
    extra = result["servelab"]
    columns = ["mean", *(percentile_name(q) for q in percentiles)]
    rows = []
    for metric, name, note in LATENCIES:
        label = f"{name} ({note or ITL_NOTES[extra['itl_mode']]})"
        figures = [_number(result[f"{column}_{metric}_ms"], 2) for column in columns]
        rows.append((label, "ms", *figures, _number(extra["samples"][metric])))
    figures = [_number(extra[f"{column}_queueing_ms"], 2) for column in columns]
    rows.append(("queueing (arrival to first run)", "ms", *figures, _number(extra["samples"]["queueing"])))
    yield from _table(("latency", "unit", *columns, "samples"), rows, numbers_from=2)


def _totals(result: Mapping[str, Any]) -> Iterator[str]:
    extra = result["servelab"]
    rows = [
        ("duration", _number(result["duration"], 3), "s", "first arrival to last end"),
        ("request throughput", _number(result["request_throughput"], 3), "req/s", "completed requests"),
        ("output throughput", _number(result["output_throughput"], 1), "tok/s", _peak(result)),
        ("total throughput", _number(result["total_token_throughput"], 1), "tok/s", "prompt and output"),
        *_slo_rows(result),
        ("requests", _number(extra["requests"]["arrived"]), "", _outcomes(extra)),
        ("concurrency", _number(result["max_concurrent_requests"]), "req", "most at one time"),
        ("batch", _number(extra["batch"]["mean_requests"], 1), "req/step", _batch(extra["batch"])),
        (
            "preemptions",
            _number(extra["preemptions"]),
            "",
            f"{_number(extra['recomputed_tokens'])} tokens recomputed",
        ),
        ("prefix hits", _number(extra["prefix_hit_tokens"]), "tok", _reuse(extra)),
        *(row for pool in extra["kv_pages"] for row in _kv_rows(pool)),
        *_energy(extra),
    ]
    yield from _table(("total", "value", "unit", ""), rows, numbers_from=1, numbers_to=2)


def _energy(extra: Mapping[str, Any]) -> list[tuple[str, ...]]:
    if extra["energy_j"] is None:
        return []
    each = extra["energy_per_output_token_j"]
    note = "all devices, idle included" + (f"; {_number(each, 3)} J per output token" if each else "")
    return [("energy", _number(extra["energy_j"] / 1e3, 1), "kJ", note)]


def _reuse(extra: Mapping[str, Any]) -> str:
    if not extra["prefix_hit_tokens"]:
        return "prompt tokens not computed again"
    evicted = f"; {_number(extra['evicted_pages'])} pages evicted" if extra["evicted_pages"] else ""
    return f"not computed again: {_number(100 * extra['prefix_hit_rate'], 1)} % of prompt tokens{evicted}"


def _peak(result: Mapping[str, Any]) -> str:
    return f"busiest second {_number(result['max_output_tokens_per_s'])}"


def _slo_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    extra = result["servelab"]
    rows = []
    if result["request_goodput"] is not None:
        judged = f"{_number(extra['slo_good'])} good of {_number(extra['slo_judged'])} judged"
        parts = [f"{m} {_percent(v)}" for m, v in extra["slo_attainment_by_metric"].items()]
        rows += [
            ("goodput", _number(result["request_goodput"], 3), "req/s", "requests within every stated bound"),
            ("token goodput", _number(extra["token_goodput"], 1), "tok/s", "output of these requests"),
            (
                "SLO attainment",
                _percent(extra["slo_attainment"], unit=False),
                "%",
                f"{judged}; {', '.join(parts)}",
            ),
        ]
    if extra["tbt_bound_ms"] is not None:
        note = f"gaps of at most {_number(extra['tbt_bound_ms'], 2)} ms"
        rows.append(("TBT attainment", _percent(extra["tbt_attainment"], unit=False), "%", note))
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
            _percent(one["attainment"], unit=False),
            *(_percent(one["attainment_by_metric"].get(metric), unit=False) for metric in metrics),
            _number(one["request_goodput"], 3),
            _number(one["token_goodput"], 1),
            _number(one["judged"]),
        )
        for name, one in classes.items()
    ]
    head = ("class", "SLO %", *(f"{metric} %" for metric in metrics), "good req/s", "good tok/s", "judged")
    yield from _table(head, rows, numbers_from=1)
    yield ""


def _instances(extra: Mapping[str, Any]) -> Iterator[str]:
    """What each did, where there are several, and what the router did later."""
    moved = extra["router"]["moves"] > 0
    rows = [
        (
            one["instance"],
            *(map(_number, (one["dispatched"], one["moved_in"], one["moved_out"])) if moved else ()),
            _number(one["requests"]),
            _number(one["output_tokens"]),
            _number(one["run_tokens"]),
            _number(one["steps"]),
            _number(one["mean_requests"], 1),
            _percent(one["mean_kv_use"], unit=False),
            _percent(one["peak_kv_use"], unit=False),
        )
        for one in extra["instances"]
    ]
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


def _outcomes(extra: Mapping[str, Any]) -> str:
    counts = [(state, count) for state, count in extra["requests"].items() if state != "arrived"]
    shown = [f"{_number(count)} {state}" for state, count in counts if count or state == "completed"]
    capped = extra["length_capped_requests"]
    if capped:
        shown[0] += f" ({_number(capped)} at their length cap)"
    return ", ".join(shown)


def _batch(batch: Mapping[str, Any]) -> str:
    return (
        f"at most {_number(batch['max_requests'])} req, {_number(batch['max_tokens'])} tok; "
        f"{_number(batch['steps'])} steps in {_number(batch['launches'])} launches"
    )


def _kv_rows(pool: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    note = f"peak of {_number(pool['pages'])}"
    if pool["peak_use"] is not None:
        note += f" ({_percent(pool['peak_use'])}), mean {_number(pool['mean_pages'], 1)}"
    yield (f"KV pool {pool['pool']}", _number(pool["peak_pages"]), "pages", note)
    stored = pool["mean_stored_tokens"]
    if stored is not None:
        awaited, idle, unusable = (
            _number(pool[f"mean_{name}_tokens"], 1) for name in ("awaited", "idle", "unusable")
        )
        note = f"mean; {awaited} reserved for later, {idle} never used, {unusable} free but in pieces"
        yield (f"  stored in {pool['pool']}", _number(stored, 1), "tok", note)


def _quality(extra: Mapping[str, Any]) -> Iterator[str]:
    """Quantized models beside the unquantized one."""
    stated = extra["info"].get("quality")
    if not extra["quality"]:
        if stated is not None:
            yield f"  quality: not measured ({stated.get('why') or 'the run ended before'})"
            yield ""
        return
    figures = list(extra["quality"].values())
    rows = [
        (
            "unquantized",
            _mib(figures[0]["reference_linear_bytes"]),
            "-",
            "-",
            "-",
            _number(figures[0]["reference_perplexity"], 3),
            _number(figures[0]["tokens"]),
        )
    ]
    for label, one in extra["quality"].items():
        tokens = _number(one["tokens"])
        rows.append(
            (
                label,
                _mib(one["linear_bytes"]),
                _number(one["kl_mean"], 5),
                _number(one["kl_p99"], 4),
                _percent(one["top1_agreement"], unit=False),
                _number(one["perplexity"], 3),
                tokens if one["tokens"] == one["total"] else f"{tokens} of {_number(one['total'])}",
            )
        )
    head = ("quality", "linears MiB", "mean KL", "p99 KL", "top-1 %", "perplexity", "tokens")
    yield from _table(head, rows, numbers_from=1)
    corpus = (stated or {}).get("corpus") or {}
    origin = (extra["info"].get("weights") or {}).get("quantization")
    note = (
        f"KL(unquantized || quantized) in nats per token; {corpus.get('source', '?')} of Python "
        f"{corpus.get('python', '?')}, {corpus.get('part', '?')} part; "
        f"reference weights: {origin or 'not stated'}"
    )
    if origin and origin != "none":
        note += ", already on a grid, which may flatter quantizers: read as relative to it"
    yield from _wrapped(f"  {note}", "  ")
    yield ""


def _mib(size: int) -> str:
    return _number(size / 2**20, 1)


def _gib(size: int) -> str:
    return _number(size / 2**30, 1)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None, *, unit: bool = True) -> str:
    return "-" if share is None else f"{100 * share:.1f}{' %' if unit else ''}"


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


def _wrapped(line: str, indent: str, width: int = WIDTH) -> list[str]:
    return wrap(line, width, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True) or [""]


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
        for line in range(max(map(len, cells))):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            aligned = (
                text.rjust(width) if i in numbers else text.ljust(width)
                for i, (text, width) in enumerate(zip(texts, widths, strict=True))
            )
            yield ("  " + "  ".join(aligned)).rstrip()

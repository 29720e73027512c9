"""The page of a run: one HTML file that holds everything, tables and plots, and needs nothing else.

Nothing in it is fetched and nothing runs; links lead to papers and to the files of the run's folder. What
comes from the run (names, reasons, settings) is escaped. ``write_page`` makes it again from a run's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from servelab.core.logs import EVENTS_FILE, PLANS_FILE
from servelab.core.metrics import RESULT_SCHEMA, SummaryOptions, Timeline, summarize
from servelab.core.run_folder import CONFIG_FILE, ENV_FILE, RESULTS_FILE, RunFolder, write_file
from servelab.plugins.observers.report import facts, plots
from servelab.plugins.observers.report.facts import NONE, mib, number, percent, words
from servelab.plugins.observers.report.html import CSS, Markup, fold, join, section, table, tag, text
from servelab.plugins.observers.report.plots import Missing, Plot
from servelab.plugins.observers.report.series import Series

PAGE_FILE = "report.html"
PLOTS_FOLDER = "plots"
ENVIRONMENT = ("servelab", "commit", "dirty", "python", "platform", "machine", "libraries")
"""What the run's info says about where it ran."""
LATENCIES = (
    ("ttft", "TTFT", "arrival to first token"),
    ("tpot", "TPOT", "per output token after it"),
    ("itl", "ITL", "gap between tokens"),
    ("e2el", "E2E latency", "arrival to last token"),
)
FILES = {
    RESULTS_FILE: "every figure; the keys of vllm bench serve, and more under servelab",
    EVENTS_FILE: "what happened, one JSON object per line",
    PLANS_FILE: "every decision of the scheduler, with its reasons",
    CONFIG_FILE: "every effective setting",
    ENV_FILE: "machine, library versions, commit",
    "servelab.log": "messages of the program",
}
ARXIV = re.compile(r"\b(?:arXiv:)?(\d{4}\.\d{4,5})\b")
DOI = re.compile(r"\b(10\.\d{4,9}/[\w.()/:;-]*\w)")


def write_page(run: str | Path) -> list[str]:
    """Make plots and page of a finished run again, from its files.

    The figures are those of ``results.json``. They are computed from the log where there is none, as after a
    run that was killed, or one of another version.

    Args:
        run: its folder, with ``events.jsonl``; or ``last``.

    Returns:
        What is left out or done otherwise, one line each.

    Raises:
        RunFolderError: there is no run, or it has no log.
        LogError: the log or the results are damaged.
        ServeLabError: a file cannot be written.
    """
    found = RunFolder.find(run)
    timeline, series = Timeline(), Series()
    for record in found.events():
        timeline.feed(record)
        series.feed(record)
    notes = []
    result = found.results() if found.has(RESULTS_FILE) else None
    if result is not None and (version := _version(result)) != RESULT_SCHEMA:
        notes.append(f"{RESULTS_FILE}: of version {version}, not {RESULT_SCHEMA}; computed anew from the log")
        result = None
    if result is None:
        result = summarize(timeline, SummaryOptions(percentiles=(50, 90, 99)))
    return notes + write_artefacts(found.path, timeline, series, result)


def _version(result: Mapping[str, Any]) -> object:
    ours = result.get("servelab")
    return ours.get("schema_version") if isinstance(ours, Mapping) else None


def write_artefacts(
    folder: Path,
    timeline: Timeline,
    series: Series | None,
    result: Mapping[str, Any],
    *,
    page: bool = True,
) -> list[str]:
    """Write the plots into ``plots/`` and the page beside the other files of the run.

    Args:
        folder: of the run.
        timeline: the whole run.
        series: likewise; None: plots are not wanted.
        result: its figures, as in ``results.json``.
        page: whether the page is wanted.

    Returns:
        What is left out although it was asked for, one line each.

    Raises:
        ServeLabError: a file cannot be written.
    """
    drawn: list[Plot | Missing] = []
    notes: list[str] = []
    why = ""
    if series is None:
        why = "switched off (plots: false of observer 'report')"
    elif result["servelab"]["requests"]["arrived"]:
        if why := plots.unavailable():
            notes.append(f"plots: left out, {why} ({plots.INSTALL})")
        else:
            drawn = plots.draw(timeline, series, svg=page)
    for plot in drawn:
        if isinstance(plot, Plot):
            write_file(folder / PLOTS_FOLDER / f"{plot.name}.png", plot.png)
    if page:
        made = render_page(result, timeline.info, drawn, no_plots=why, files=_files(folder))
        write_file(folder / PAGE_FILE, made.encode("utf-8"))
    return notes


def _files(folder: Path) -> list[str]:
    """Files of the run beside the page, relative to its folder."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != PAGE_FILE and not name.startswith("."))


# ---------------------------------------------------------------- the page


def render_page(
    result: Mapping[str, Any],
    info: Mapping[str, Any],
    drawn: Sequence[Plot | Missing],
    *,
    no_plots: str = "",
    files: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        result: the figures, as in ``results.json``.
        info: what the run says about itself, as in its first record.
        drawn: its plots, with SVG, and those there is nothing for.
        no_plots: why there are none, if they are missing altogether.
        files: of the run's folder, relative to it, to link to.
    """
    served = bool(result["servelab"]["requests"]["arrived"])
    title = " · ".join(map(str, ("ServeLab run", *_names(info))))
    body = tag(
        "main",
        *_header(result, info, title),
        *((_results(result), *_plots(drawn, no_plots)) if served else ()),
        *_quality(result, info),
        *_card(info),
        *_machine(info),
        _footer(files, info),
    )
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", CSS),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def _names(info: Mapping[str, Any]) -> Iterator[str]:
    """What tells this run from others, shortest first."""
    named = {kind: str(one.get("name", "?")) for kind, one in facts.plugins(info)}
    yield from (named[kind] for kind in ("scheduler", "prefix", "quant") if kind in named)
    if info.get("model"):
        yield str(info["model"])


def _header(result: Mapping[str, Any], info: Mapping[str, Any], title: str) -> Iterator[Markup]:
    extra = result["servelab"]
    run, counts = extra["run"], extra["requests"]
    if run["partial"]:
        reason = f": {run['reason']}" if run["reason"] else ""
        yield tag(
            "p",
            f"PARTIAL ({run['status']}{reason}). ",
            tag(
                "span",
                f"{number(counts['completed'])} of {number(result['num_prompts'])} requests completed; "
                "the figures are of these, and cover only part of the workload.",
            ),
            class_="partial",
            role="alert",
        )
    yield tag("h1", title)
    said = {
        "clock": info.get("clock"),
        "traffic": (info.get("workload") or {}).get("traffic"),
        "seed": info.get("seed"),
        "stamps": words(info.get("stamps") or "none"),
        "ended": result.get("date"),
    }
    yield tag(
        "p", "; ".join(f"{name} {value}" for name, value in said.items() if value is not None), class_="dim"
    )
    for note in extra["notes"]:
        yield tag("p", "Note: ", note)
    if not counts["arrived"]:
        return
    tiles = [
        ("completed requests", number(counts["completed"]), f"of {number(counts['arrived'])}"),
        ("output throughput", number(result["output_throughput"], 1), "tokens/s"),
        ("median TTFT", number(result["median_ttft_ms"], 1), "ms"),
        ("median TPOT", number(result["median_tpot_ms"], 2), "ms"),
        ("median E2E latency", number(result["median_e2el_ms"], 0), "ms"),
    ]
    if result["request_goodput"] is not None:
        tiles.append(("SLO attainment", percent(extra["slo_attainment"]), "%"))
        tiles.append(("goodput", number(result["request_goodput"], 2), "req/s"))
    yield tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value, " ", tag("small", unit)))
            for name, value, unit in tiles
        ),
        class_="facts",
    )


def _results(result: Mapping[str, Any]) -> Markup:
    extra = result["servelab"]
    columns = ["mean", "std", *facts.percentiles(result)]
    if "p50" not in columns:
        columns.insert(2, "median")
    cells = facts.latencies(result, columns)
    rows = [(f"{name}: {note}", "ms", *cells[metric]) for metric, name, note in LATENCIES]
    rows.append(("Queueing: arrival to first run", "ms", *cells["queueing"]))
    head = ("latency", "unit", *columns, "samples")
    itl = "one sample per gap" if extra["itl_mode"] == "chunk" else "a gap shared out over its tokens"
    return section(
        "Results",
        table(
            head,
            rows,
            range(2, len(head)),
            f"Latency of completed requests. ITL: {itl}. Percentiles: linear interpolation.",
        ),
        table(("total", "value", "unit", ""), _totals(result), (1,)),
        *_slo(result),
        *_pools(result),
        *_instances(result),
    )


def _totals(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    extra = result["servelab"]
    batch = extra["batch"]
    hits = extra["prefix_hit_tokens"]
    yield ("duration", number(result["duration"], 3), "s", "first arrival to last end")
    yield ("requests", number(extra["requests"]["arrived"]), "", facts.outcomes(extra))
    yield ("request throughput", number(result["request_throughput"], 3), "req/s", "completed requests")
    yield (
        "output throughput",
        number(result["output_throughput"], 1),
        "tokens/s",
        f"{number(result['total_output_tokens'])} tokens; "
        f"busiest second {number(result['max_output_tokens_per_s'])}",
    )
    yield (
        "total throughput",
        number(result["total_token_throughput"], 1),
        "tokens/s",
        f"with {number(result['total_input_tokens'])} prompt tokens",
    )
    if result["request_goodput"] is not None:
        yield ("goodput", number(result["request_goodput"], 3), "req/s", "requests within every stated bound")
        yield ("token goodput", number(extra["token_goodput"], 1), "tokens/s", "output of these requests")
    if extra["tbt_bound_ms"] is not None:
        note = f"gaps between tokens of at most {number(extra['tbt_bound_ms'], 2)} ms"
        yield ("TBT attainment", percent(extra["tbt_attainment"]), "%", note)
    yield ("concurrency", number(result["max_concurrent_requests"]), "requests", "most at one time")
    yield (
        "batch",
        number(batch["mean_requests"], 1),
        "requests/step",
        f"at most {number(batch['max_requests'])} requests and {number(batch['max_tokens'])} tokens; "
        f"{number(batch['steps'])} steps in {number(batch['launches'])} launches",
    )
    yield (
        "preemptions",
        number(extra["preemptions"]),
        "",
        f"{number(extra['recomputed_tokens'])} tokens recomputed",
    )
    note = (
        f"{percent(extra['prefix_hit_rate'])} % of the prompts"
        if hits
        else "prompt tokens found in a prefix store"
    )
    if extra["evicted_pages"]:
        note += f"; {number(extra['evicted_pages'])} pages evicted"
    yield ("prefix hits", number(hits), "tokens", note)
    if extra["energy_j"] is not None:
        each = number(extra["energy_per_output_token_j"], 3)
        note = f"all devices, idle included; {each} J per output token"
        yield ("energy", number(extra["energy_j"] / 1e3, 1), "kJ", note)
    if extra["wall_s"] is not None:
        yield ("real time", number(extra["wall_s"], 1), "s", "of the whole run")
    if extra["peak_rss_bytes"] is not None:
        yield ("memory", mib(extra["peak_rss_bytes"]), "MiB", "most held by the process")


def _slo(result: Mapping[str, Any]) -> Iterator[Markup]:
    """Attainment by class and metric."""
    extra = result["servelab"]
    if result["request_goodput"] is None:
        return
    metrics = list(extra["slo_attainment_by_metric"])
    rows = [
        (
            "all",
            percent(extra["slo_attainment"]),
            *(percent(extra["slo_attainment_by_metric"][metric]) for metric in metrics),
            number(result["request_goodput"], 3),
            number(extra["slo_judged"]),
        )
    ]
    found = extra["slo_by_class"]
    if len(found) > 1:
        for name, one in found.items():
            by_metric = one["attainment_by_metric"]
            rows.append(
                (
                    f"class {name}",
                    percent(one["attainment"]),
                    *(percent(by_metric.get(metric)) for metric in metrics),
                    number(one["request_goodput"], 3),
                    number(one["judged"]),
                )
            )
    head = ("SLO attainment", "all bounds %", *(f"{m.upper()} %" for m in metrics), "goodput req/s", "judged")
    yield table(head, rows, range(1, len(head)))


def _pools(result: Mapping[str, Any]) -> Iterator[Markup]:
    rows = [
        (
            pool["pool"],
            number(pool["pages"]),
            number(pool["peak_pages"]),
            percent(pool["peak_use"]),
            number(pool["mean_pages"], 1),
            percent(pool["mean_use"]),
            *(
                number(pool.get(f"mean_{name}_tokens"), 1)
                for name in ("stored", "awaited", "idle", "unusable")
            ),
        )
        for pool in result["servelab"]["kv_pages"]
    ]
    if rows:
        head = (
            *("KV pool", "pages", "peak", "%", "mean", "%"),
            *("stored tokens", "reserved", "never used", "in pieces"),
        )
        yield table(
            head,
            rows,
            range(1, len(head)),
            "KV memory: pages in use, and what they hold, mean over time in tokens.",
        )


def _instances(result: Mapping[str, Any]) -> Iterator[Markup]:
    """What each did, where there are several, and what the router did later."""
    extra = result["servelab"]
    moved, rows = facts.instances(extra)
    if len(rows) > 1:
        head = (
            *("instance", *(("dispatched", "moved in", "moved out") if moved else ()), "requests"),
            *("output tokens", "tokens run", "steps", "requests per step", "mean KV %", "peak KV %"),
        )
        yield table(head, rows, range(1, len(head)), "Instances: requests that ended there, and its work.")
    if told := facts.routing(extra):
        yield tag("p", f"The router {told}.")


def _plots(drawn: Sequence[Plot | Missing], no_plots: str) -> Iterator[Markup]:
    if not drawn:
        if no_plots:
            yield section("Plots", tag("p", f"Left out: {no_plots}."))
        return
    shown = [
        tag("figure", Markup(one.svg), tag("figcaption", tag("b", f"{one.title}. "), one.caption))
        for one in drawn
        if isinstance(one, Plot)
    ]
    missing = [f"{one.title}: {one.why}." for one in drawn if isinstance(one, Missing)]
    yield section(
        "Plots", *shown, *([tag("p", "Left out: ", join(missing, " "), class_="dim")] if missing else [])
    )


def _quality(result: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[Markup]:
    """Quantized models beside the unquantized one."""
    found, stated = result["servelab"].get("quality"), info.get("quality")
    if not found:
        if stated is not None:
            why = stated.get("why") or "the run ended before"
            yield section("Quality", tag("p", f"Not measured: {why}."))
        return
    shown = table(facts.QUALITY, facts.quality(found), range(1, len(facts.QUALITY)), facts.quality_note(info))
    yield section("Quality", shown)


def _card(info: Mapping[str, Any]) -> Iterator[Markup]:
    found = list(facts.plugins(info))
    rows = [
        (
            kind,
            one.get("name", "?"),
            one.get("version") or NONE,
            paper(one.get("paper") or NONE),
            tag("code", words(one["non_default"])) if one.get("non_default") else NONE,
        )
        for kind, one in found
    ]
    if found:
        content = [table(("plugin", "name", "version", "paper", "not at default"), rows)]
    else:
        content = [tag("p", "The run states no plugins.")]
    deviations = [
        tag("li", tag("b", f"{kind} {one.get('name', '?')}: "), " ".join(map(str, one["deviations"])))
        for kind, one in found
        if one.get("deviations")
    ]
    if deviations:
        content.append(fold("Deviations from the papers", tag("ul", *deviations)))
    if figures := facts.device(info):
        rows_of = [(name, tag("code", words(value)), source) for name, value, source in figures]
        content.append(
            fold(
                f"The device: {facts.device_line(info)}; every figure with its source",
                table(("figure", "value", "source"), rows_of),
            )
        )
    for title, key in (
        ("All effective settings, defaults included", "settings"),
        ("KV layout", "kv"),
        ("Weights", "weights"),
        ("Figures that prices are made of", "cost"),
        ("Workload", "workload"),
    ):
        if info.get(key):
            content.append(fold(title, _listing(info[key])))
    yield section("What ran", *content)


def paper(name: object) -> Markup:
    """A paper as the plugin states it, leading to where it is."""
    said = str(name)
    for pattern, address in ((ARXIV, "https://arxiv.org/abs/"), (DOI, "https://doi.org/")):
        if match := pattern.search(said):
            link = tag("a", match[0], href=address + match[1])
            return join((said[: match.start()], link, said[match.end() :]))
    return text(said)


def _machine(info: Mapping[str, Any]) -> Iterator[Markup]:
    known = {key: info[key] for key in ENVIRONMENT if key in info}
    if known:
        yield section("Machine and libraries", _listing(known))


def _listing(value: Mapping[str, Any]) -> Markup:
    rows = ((name, words(item)) for name, item in facts.flat(value))
    return tag("div", table(("name", "value"), rows), class_="code")


def _footer(files: Sequence[str], info: Mapping[str, Any]) -> Markup:
    listed = [
        tag(
            "li",
            tag("a", name, href=quote(name, errors="surrogateescape")),
            f": {FILES[name]}" if name in FILES else "",
        )
        for name in files
    ]
    version = f" {info['servelab']}" if isinstance(info.get("servelab"), str) else ""
    return tag(
        "footer",
        *([tag("p", "Files beside this page:"), tag("ul", *listed)] if listed else []),
        tag("p", f"Made by ServeLab{version}. This page needs no network.", class_="dim"),
    )

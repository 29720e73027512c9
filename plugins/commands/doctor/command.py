"""``servelab doctor``: a table of checks out, and 1 as exit status if one of them failed."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import get_args

from servelab.core.findings import Finding, State
from servelab.core.registry import Registry
from servelab.plugins.commands.doctor.configs import config_findings
from servelab.plugins.commands.doctor.here import environment_findings, folder_findings, plot_findings
from servelab.plugins.commands.doctor.libraries import library_findings
from servelab.plugins.commands.doctor.packages import package_findings, plugin_findings

JSON_SCHEMA = 1
WIDTH = 100
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def main(argv: Sequence[str]) -> None:
    """Print what was found; exit status 1 if anything does not work.

    Raises:
        SystemExit: with 1, after everything is printed.
    """
    args = _parser().parse_args(argv)
    findings = []
    if args.json:
        findings = list(examine(online=args.online))
        counts = Counter(finding.state for finding in findings)
        every = {state: counts[state] for state in get_args(State)}
        result = {"schema_version": JSON_SCHEMA, "counts": every, "findings": list(map(asdict, findings))}
        print(json.dumps(result, indent=2))
    else:
        for finding in examine(online=args.online):  # as they come: some take seconds
            findings.append(finding)
            print("\n".join(_told(finding)), flush=True)
        print(f"\n{_summary(findings)}")
    if any(finding.state == "fail" for finding in findings):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab doctor",
        description="Look at this installation: libraries, torch, the default model, memory and disk, plugin "
        "packages and their YAML, the environment. Nothing is changed and nothing is downloaded.",
    )
    parser.add_argument("--online", action="store_true", help="also ask whether the model hub can be reached")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def examine(*, online: bool = False) -> Iterator[Finding]:
    """All checks, in the order they are shown. One that raises is a finding itself, and the rest go on."""
    registry = Registry.load()
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "libraries": library_findings,
        "plugins": lambda: plugin_findings(registry, online=online),
        "packages": lambda: package_findings(registry),
        "configs": lambda: config_findings(registry),
        "plots": plot_findings,
        "folders": folder_findings,
        "environment": environment_findings,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as exc:  # the doctor is asked when things are broken
            yield Finding(
                name,
                "fail",
                f"the check itself failed: {type(exc).__name__}: {exc}",
                "report it; the other checks stand",
            )


def _told(finding: Finding) -> Iterator[str]:
    lead, indent = f"{MARKS[finding.state]}  {finding.check}: ", " " * 6
    yield from wrap(
        lead + finding.about, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    if finding.do:
        yield from wrap(
            f"{indent}do: {finding.do}",
            WIDTH,
            subsequent_indent=indent + "    ",
            break_on_hyphens=False,
            break_long_words=False,
        )


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.state for finding in findings)
    if counts["fail"]:
        verdict = "what is marked FAIL does not work"
    elif counts["warn"]:
        verdict = "everything works that is not marked warn"
    else:
        verdict = "everything works"
    return f"{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail: {verdict}"

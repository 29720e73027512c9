"""The life of a request as JSON: the facts of ``life.py``, times in ns of the run's clock."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from servelab.core.metrics.goodput import judge
from servelab.plugins.commands.explain.life import Life, Stretch
from servelab.plugins.commands.explain.text import shares

JSON_SCHEMA = 1


def as_json(life: Life) -> dict[str, Any]:
    """The same facts; times in ns of the run's clock."""
    facts = life.facts
    verdicts = judge(facts, life.log_end_ns)
    return {
        "schema_version": JSON_SCHEMA,
        "request": facts.id,
        "engine": facts.engine,
        "class": facts.request_class,
        "parent": life.arrived.parent,
        "prompt_tokens": facts.prompt_tokens,
        "max_new_tokens": life.arrived.max_new_tokens,
        "output_tokens": facts.output_tokens,
        "state": facts.state,
        "reason": facts.reason,
        "arrival_ns": facts.arrival_ns,
        "admitted_ns": facts.admitted_ns,
        "end_ns": life.end_ns,
        "ended": facts.ended_ns is not None,
        "ttft_ns": facts.ttft_ns,
        "tpot_ns": facts.tpot_ns if facts.output_tokens > 1 else None,
        "e2el_ns": facts.e2el_ns,
        "slo": {
            metric: {"bound_ns": bound, "met": verdicts[metric]} for metric, bound in facts.bounds.items()
        },
        "phases_ns": shares(life),
        "scene": asdict(life.scene),
        "stretches": [_stretch_json(stretch) for stretch in life.stretches],
        "preemptions": [asdict(p) for p in life.preemptions],
        "moves": [asdict(move) for move in life.moves],
        "gaps": len(life.gaps),
        "median_gap_ns": statistics.median(life.gaps) if life.gaps else None,
        "slowest_gaps": [asdict(gap) | {"ns": gap.ns} for gap in life.slowest],
        "run_status": life.run_status,
        "plans": life.plans_end_ns is not None,
    }


def _stretch_json(stretch: Stretch) -> dict[str, Any]:
    found = {
        name: getattr(stretch, name)
        for name in (
            "phase",
            "start_ns",
            "end_ns",
            "admitted",
            "overtakers",
            "finished",
            "cached_tokens",
            "tokens",
        )
    }
    found["running"] = asdict(stretch.running) if stretch.running else None
    found["free_pages"] = [asdict(one) for one in stretch.free_pages]
    found["chunks"] = [asdict(chunk) for chunk in stretch.chunks]
    found["unanswered_ns"] = stretch.reasons.unanswered_ns
    found["reasons"] = [
        {
            "text": reason.text,
            "of_this_request": reason.own,
            "plans": reason.plans,
            "ns": reason.ns,
            "others": dict(reason.others.most_common()),
        }
        for reason in stretch.reasons
    ]
    return found

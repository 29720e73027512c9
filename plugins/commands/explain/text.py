"""The life of a request as prose."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from servelab.core.metrics.definitions import NS_PER_S
from servelab.core.metrics.goodput import judge, overall
from servelab.core.metrics.phases import WAITING, Phase
from servelab.core.records import RequestRouted
from servelab.plugins.commands.explain.life import Gap, Life, Preemption, Stretch
from servelab.plugins.commands.explain.reasons import Reason
from servelab.plugins.commands.explain.words import (
    SHOWN,
    count,
    duration,
    joined,
    listed,
    number,
    percent,
    span,
    wrapped,
)

MARGIN = 12
"""Column at which sentences begin; times stand before it."""
LANE = 80
"""Cells of the picture."""
SLOW = 1.5
"""A gap is told of when it is so many times the median."""

SIGNS: dict[Phase, str] = {
    "queued": ".",
    "prefill": "#",
    "decode": "=",
    "preempted": "x",
    "recompute": "%",
    "swap out": ">",
    "swapped": "s",
    "swap in": "<",
    "paused": "-",
}


BACK: dict[Phase, str] = {"swap in": "Back on the device", "paused": "Resumed"}
"""Phase -> how what follows begins, for requests that kept their KV."""


def tell(life: Life, folder: str) -> Iterator[str]:
    """The lines of the whole story."""
    yield from _head(life, folder)
    yield ""
    yield from _arrival(life)
    for index, stretch in enumerate(life.stretches):
        yield from _stretch(life, index, stretch)
    yield from _hops(life)
    yield from _end(life)
    yield from _silences(life)


# ---------------------------------------------------------------- the head


def _head(life: Life, folder: str) -> Iterator[str]:
    facts, arrived = life.facts, life.arrived
    ending = f"{facts.state} ({facts.reason})" if facts.reason else facts.state
    if facts.outcome is None:
        ending = "no end in the log"
    yield from wrapped(f"{facts.id} of {folder}: {ending}", "  ")
    yield ""
    parts = [
        f"prompt {number(arrived.prompt_tokens)} tokens",
        f"output {number(facts.output_tokens)} of at most {number(arrived.max_new_tokens)}",
        f"class {arrived.request_class}",
    ]
    if arrived.priority:
        parts.append(f"priority {arrived.priority}")
    if arrived.tenant != "default":
        parts.append(f"tenant {arrived.tenant}")
    if arrived.program is not None:
        parts.append(f"turn {arrived.turn} of program {arrived.program}")
    if arrived.parent is not None:
        parts.append(f"a further sample of the prompt of {arrived.parent}")
    if arrived.engine:
        parts.append(f"engine {arrived.engine}")
    yield from wrapped(f"  asked      {', '.join(parts)}", " " * 13)
    yield from wrapped(f"  SLO        {_slo(life)}", " " * 13)
    total = life.end_ns - life.arrived.t_ns
    found = shares(life)
    known = ", ".join(f"{percent(ns, total)} {phase}" for phase, ns in found.items() if ns)
    yield from wrapped(f"  life       {duration(total)}: {known or 'of no length'}", " " * 13)
    if total:
        yield f"  |{lane(life)}|"
        key = "  ".join(f"{SIGNS[phase]} {phase}" for phase, ns in found.items() if ns)
        yield from wrapped(f"   {key}", "   ")


def shares(life: Life) -> dict[Phase, int]:
    """Nanoseconds per phase, in the order of their first occurrence."""
    shares: dict[Phase, int] = {}
    for stretch in life.stretches:
        shares[stretch.phase] = shares.get(stretch.phase, 0) + stretch.ns
    return shares


def _slo(life: Life) -> str:
    """The verdict, and what became of each stated bound."""
    facts = life.facts
    if not facts.bounds:
        return "none stated"
    verdicts = judge(facts, life.log_end_ns)
    word = {True: "met", False: "missed", None: "undecided"}
    parts = []
    for metric, bound in facts.bounds.items():
        value = getattr(facts, f"{metric}_ns") if facts.times else None
        if value is None:
            shown = f"no {metric.upper()}, bound {duration(bound)}"
        else:
            sign = "<=" if value <= bound else ">"
            shown = f"{metric.upper()} {duration(value)} {sign} {duration(bound)}"
        parts.append(f"{shown}, {word[verdicts[metric]]}")
    return f"{word[overall(verdicts.values())]}: {'; '.join(parts)}"


def lane(life: Life) -> str:
    """The life as a row of ``LANE`` signs; a stretch too short for one takes one all the same."""
    start, total = life.arrived.t_ns, life.end_ns - life.arrived.t_ns
    cells: list[str] = []
    places = [
        (s, (s.start_ns - start) * LANE // total, (s.end_ns - start) * LANE // total)
        for s in life.stretches
        if s.ns
    ]
    for stretch, first, end in places:
        cells += SIGNS[stretch.phase] * (end - max(first, len(cells)))
    cells = cells[:LANE]
    for stretch, first, end in places:
        if end == first:
            cells[min(first, LANE - 1)] = SIGNS[stretch.phase]
    return "".join(cells)


# ---------------------------------------------------------------- the story


def _arrival(life: Life) -> Iterator[str]:
    scene = life.scene
    text = f"Arrived, {duration(life.arrived.t_ns)} into the run."
    if scene.running:
        text += f" {_people(scene.running, 'was running', 'were running')}"
    else:
        text += " Nothing was running"
    if scene.waiting:
        text += f"; {_people(scene.waiting, 'was waiting', 'were waiting')} already"
    text += f"; {free}." if (free := _free(life, scene.free_pages)) else "."
    yield from _at(life, life.arrived.t_ns, text)


def _hops(life: Life) -> Iterator[str]:
    """How it came from the router to an instance, and from one to another."""
    for hop in life.hops:
        if isinstance(hop, RequestRouted):
            yield from _at(life, hop.t_ns, f"The router, which had held it, sent it to {hop.engine}.")
            continue
        kv = f"{count(hop.tokens, 'token')} of KV, {hop.bytes:,} bytes" if hop.tokens else "no KV"
        text = (
            f"Moved from instance {hop.source} to {hop.engine} ({hop.mode}), begun "
            f"{duration(hop.t_ns - hop.started_ns)} before: {kv}. It stood still for "
            f"{duration(hop.t_ns - hop.stopped_ns)}."
        )
        yield from _at(life, hop.t_ns, text)


def _stretch(life: Life, index: int, stretch: Stretch) -> Iterator[str]:
    phase = stretch.phase
    if stretch.preemption is not None:
        yield from _preemption(life, stretch.preemption)
    elif phase == "preempted" and life.fork is not None:
        text = f"First token: TTFT {duration(life.facts.ttft_ns or 0)}, drawn when {life.fork.parent} had"
        text += f" computed the prompt. It cannot share that: {life.fork.reason}."
        yield from _at(life, stretch.start_ns, text)
    if phase in WAITING:
        if phase == "swapped":
            yield from _at(life, stretch.start_ns, f"{_moved(life, 'out', stretch.start_ns)} on the host.")
        yield from _waiting(life, stretch)
    elif phase in ("prefill", "recompute"):
        yield from _prefill(life, index, stretch)
    elif phase == "decode":
        yield from _decode(life, index, stretch)
    elif phase == "swap in":
        move = [m for m in life.moves if m.direction == "in" and m.start_ns <= stretch.start_ns][-1]
        why = f': "{move.reason}"' if move.reason else ""
        text = f"Its KV, {count(move.pages, 'page')}, began to come back{why}."
        yield from _at(life, stretch.start_ns, text)


def _preemption(life: Life, p: Preemption) -> Iterator[str]:
    by = f" by the plan of step {p.plan.step}" if p.plan else ""
    out = sum(s.tokens for s in life.stretches if s.end_ns <= p.t_ns)
    text = f'Preempted{by}, mode {p.mode}: "{p.reason}". '
    text += f"The KV of {count(p.lost_tokens, 'token')} was lost" if p.lost_tokens else "No KV was lost"
    text += f"; {count(out, 'output token')} had come."
    yield from _at(life, p.t_ns, text)
    yield from _behalf(life, p)


def _behalf(life: Life, p: Preemption) -> Iterator[str]:
    """Who profited, as far as the same plan says."""
    if p.plan is None:
        yield from _below("The plan log does not have the plan, so it is not known who ran instead.")
        return
    work = dict(p.plan.work)
    admitted = [name for name in p.admitted if name in work]
    chunks = [name for name, n in work.items() if n > 1 and name not in admitted]
    if not work:
        yield from _below("That plan ran nobody.")
    else:
        text = f"That plan went on with {listed(list(work))}."
        for begin, names in (("It admitted", admitted), ("A chunk of prompt ran for", chunks)):
            if names:
                shown = [f"{name} ({count(work[name], 'token')})" for name in names]
                text += f" {begin} {joined(shown)}."
        yield from _below(text + _grown(life, p, work))
    if p.plan.victims:
        yield from _below(f"It preempted {listed(p.plan.victims)} as well.")


def _grown(life: Life, p: Preemption, work: dict[str, int]) -> str:
    """Whose tokens began another page, counted from the log."""
    sizes = {pool.get("page_tokens") for pool in life.pools}
    size = sizes.pop() if len(sizes) == 1 else None
    if not life.exact or not isinstance(size, int):
        return ""
    grown = [
        name
        for name, n in work.items()
        if name in p.computed and -(-(p.computed[name] + n) // size) > -(-p.computed[name] // size)
    ]
    if not grown:
        return ""
    return f" Counting tokens, {listed(grown)} began a new page of {size} in it."


def _waiting(life: Life, stretch: Stretch) -> Iterator[str]:
    if not stretch.ns and stretch.phase == "queued" and life.facts.admitted_ns is not None:
        return  # taken at once
    what = {
        "queued": "Waited {} to be admitted",
        "preempted": "Waited {} to be admitted again",
        "swapped": "Waited {} on the host",
        "paused": "Paused for {}, its pages kept",
    }[stretch.phase]
    share = percent(stretch.ns, life.end_ns - life.arrived.t_ns)
    yield from _below(f"{what.format(duration(stretch.ns))}, {share} of its life.")
    yield from _said(life, stretch)
    yield from _meanwhile(life, stretch)


def _said(life: Life, stretch: Stretch) -> Iterator[str]:
    reasons = stretch.reasons
    if life.plans_end_ns is None:
        return
    if not reasons.plans:
        if stretch.ns:
            yield from _below("No plan was made in that time.")
        return
    yield from _below(f"What {count(reasons.plans, 'plan')} said in that time:")
    shown = list(reasons)
    for reason in shown[:SHOWN]:
        lead = f"{duration(reason.ns):>10} in {count(reason.plans, 'plan')}: "
        yield from wrapped(" " * MARGIN + lead + _quote(reason), " " * (MARGIN + 14))
    if len(shown) > SHOWN:
        rest = shown[SHOWN:]
        yield from _below(
            f"{duration(sum(r.ns for r in rest)):>10} in {count(sum(r.plans for r in rest), 'plan')}: "
            f"{len(rest)} other reasons (--json has them all)"
        )
    if reasons.unanswered_ns:
        yield from _below(f"{duration(reasons.unanswered_ns):>10} before the first of them")


def _quote(reason: Reason) -> str:
    if reason.own:
        return f'"{reason.text}"'
    if not reason.others:
        return "nobody was passed over, and this request was not named"
    others = [name for name, _ in reason.others.most_common()]
    return f'"{reason.text}", said of {listed(others)}; this request was not named'


def _meanwhile(life: Life, stretch: Stretch) -> Iterator[str]:
    parts = []
    if stretch.running is not None:
        low, high = stretch.running.low, stretch.running.high
        parts.append(f"{span(low, high)} {'request was' if high == 1 else 'requests were'} running")
        for index, free in enumerate(stretch.free_pages):
            were = "was" if free.high == 1 else "were"
            parts.append(f"{span(free.low, free.high)} {_pool(life, index)} {were} free")
    text = f"Meanwhile {joined(parts)} at the ends of launches." if parts else ""
    if stretch.admitted:
        text += f" Admitted meanwhile: {listed(list(dict.fromkeys(stretch.admitted)))}."
        late = stretch.overtakers
        text += (
            f" Of these, {listed(late)} had arrived later." if late else " None of them had arrived later."
        )
    if text:
        yield from _below(text.strip())


def _prefill(life: Life, index: int, stretch: Stretch) -> Iterator[str]:
    plan = life.admitting_steps.get(stretch.start_ns)
    again = stretch.phase == "recompute"
    before = life.stretches[index - 1].phase
    if before in BACK:
        text = f"{BACK[before]}."
    else:
        text = "Admitted again" if again else "Admitted"
        parent = None if again else life.arrived.parent
        whose = f" with {parent}, which computes the prompt" if parent else ""
        text += f" by the plan of step {plan[0]}." if plan else f"{whose}."
    if stretch.cached_tokens:
        text += f" {count(stretch.cached_tokens, 'token')} of KV came from the prefix store."
    chunks = stretch.chunks
    if chunks:
        tokens = sum(chunk.tokens for chunk in chunks)
        took = chunks[-1].end_ns - chunks[0].start_ns
        what = "tokens, its prompt and its output so far," if again else "tokens of its prompt"
        if len(chunks) == 1:
            text += f" {number(tokens)} {what} ran in one step of {duration(took)}"
        else:
            sizes = [number(chunk.tokens) for chunk in chunks]
            dots = " ..." if len(sizes) > SHOWN else ""
            text += f" {number(tokens)} {what} ran in {len(chunks)} chunks ({', '.join(sizes[:SHOWN])}{dots})"
            text += f", {duration(took)} in all"
        batches = [chunk.batch for chunk in chunks]
        text += f", in a batch of {span(min(batches), max(batches))}." if max(batches) > 1 else ", alone."
    elif stretch.ns and (again or not life.arrived.parent):
        text += " No step of it ended."
    yield from _at(life, stretch.start_ns, text)


def _decode(life: Life, index: int, stretch: Stretch) -> Iterator[str]:
    facts = life.facts
    if facts.times and stretch.start_ns == facts.times[0]:
        text = f"First token: TTFT {duration(facts.ttft_ns or 0)}."
        if life.fork is not None:
            text += f" It shares the KV of {count(life.fork.shared_tokens, 'token')} with {life.fork.parent}."
        if stretch.tokens > 1:
            text += f" {count(stretch.tokens - 1, 'further token')} in {duration(stretch.ns)}."
    else:
        text = f"{BACK.get(life.stretches[index - 1].phase, 'Tokens again')}: "
        text += f"{count(stretch.tokens, 'token')} in {duration(stretch.ns)}."
    yield from _at(life, stretch.start_ns, text)
    last = max(i for i, s in enumerate(life.stretches) if s.phase == "decode")
    if index == last:
        yield from _pace(life)


def _pace(life: Life) -> Iterator[str]:
    if not life.gaps:
        return
    median = statistics.median(life.gaps)
    text = f"{count(len(life.gaps), 'gap')} between its tokens, {duration(median)} at the median; "
    text += f"TPOT {duration(life.facts.tpot_ns)}."
    slow = [gap for gap in life.slowest if gap.ns >= SLOW * median or gap.preempted]
    yield from _below(text + (" The slowest:" if slow else f" None was {SLOW:g} times the median."))
    for gap in slow:
        times = f"{gap.ns / median:.1f} times the median, " if median and gap.ns != median else ""
        lead = f"{duration(gap.ns):>10} ({times}from {_since(life, gap.start_ns)}): "
        yield from wrapped(" " * MARGIN + lead + _inside(gap), " " * (MARGIN + 14))


def _inside(gap: Gap) -> str:
    parts = []
    if gap.preempted:
        parts.append("it was preempted" + (f" {gap.preempted} times" if gap.preempted > 1 else ""))
    if gap.steps > 1:
        parts.append(f"{number(gap.steps)} steps passed")
    if gap.prefills:
        tokens = sum(gap.prefills.values())
        parts.append(f"{count(tokens, 'token')} of prompt ran for {listed(list(gap.prefills))}")
    if not parts:
        parts.append("nothing but decoding")
    return f"{joined(parts)}; in the end a batch of {number(gap.batch)}"


def _end(life: Life) -> Iterator[str]:
    facts = life.facts
    if facts.ended_ns is None:
        yield from _at(
            life, life.end_ns, f"The log ends here; the request was in phase {life.stretches[-1].phase!r}."
        )
        return
    where = {"queued": " before it ever ran", "preempted": " while it waited to run again"}
    text = f"{facts.state.capitalize()}"
    if facts.reason:
        text += f": {facts.reason}"
    text += where.get(life.stretches[-1].phase, "") if facts.state != "completed" else ""
    text += f". {count(facts.output_tokens, 'output token')}, {count(facts.preemptions, 'preemption')}."
    yield from _at(life, life.end_ns, text)


def _silences(life: Life) -> Iterator[str]:
    """What these logs cannot say."""
    notes = []
    if life.plans_end_ns is None:
        notes.append(
            "the run has no plan.jsonl (setting 'plans' of observer 'jsonl'), so reasons for waiting and "
            "the plans behind preemptions are not known"
        )
    elif life.run_status is None and life.plans_end_ns < life.end_ns:
        notes.append(f"the plan log ends {duration(life.end_ns - life.plans_end_ns)} before the events do")
    if life.run_status is None:
        notes.append("the log has no end of the run: it was killed, or goes on")
    elif life.run_status != "ok":
        reason = f" ({life.run_reason})" if life.run_reason else ""
        notes.append(f"the run itself ended as {life.run_status!r}{reason}")
    if notes:
        yield ""
    for note in notes:
        yield from wrapped(f"note: {note}", "      ")


# ---------------------------------------------------------------- phrases


def _since(life: Life, t_ns: int) -> str:
    ns = t_ns - life.arrived.t_ns
    return f"+{duration(ns)}" if ns < 60 * NS_PER_S else f"+{ns / NS_PER_S:,.1f} s"  # fits the margin


def _at(life: Life, t_ns: int, text: str) -> list[str]:
    return wrapped(f"{_since(life, t_ns):<{MARGIN}}{text}", " " * MARGIN)


def _below(text: str) -> list[str]:
    return wrapped(" " * MARGIN + text, " " * MARGIN)


def _pool(life: Life, index: int) -> str:
    if index >= len(life.pools):
        return "KV pages"
    pool = life.pools[index]
    name = f" of pool {pool.get('id')}" if len(life.pools) > 1 else ""
    pages = pool.get("pages")
    return f"of {pages:,} KV pages{name}" if isinstance(pages, int) else f"KV pages{name}"


def _free(life: Life, free: Sequence[int]) -> str:
    shown = [
        f"{number(pages)} {_pool(life, index)} {'was' if pages == 1 else 'were'} free"
        for index, pages in enumerate(free)
    ]
    return joined(shown)


def _moved(life: Life, direction: str, until_ns: int) -> str:
    for move in life.moves:
        if move.direction != direction or move.end_ns != until_ns:
            continue
        return f"Its KV, {count(move.pages, 'page')}, is, after {duration(until_ns - move.start_ns)},"
    return "Its KV is"


def _people(names: Sequence[str], one: str, many: str) -> str:
    verb = one if len(names) == 1 else many
    return f"{count(len(names), 'other')} {verb} ({listed(names)})"

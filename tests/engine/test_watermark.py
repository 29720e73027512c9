"""The watermark of ``paged``: pages that admissions leave free for requests that already run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from servelab.core.context import Context
from servelab.core.records import RequestAdmitted, RequestPreempted
from servelab.core.testing.fakes import TOY_MODEL, Fcfs, Rig, make_engine, toy_limits
from servelab.plugins.kvcache.paged import Paged, PagedConfig


def rig(watermark: float, *, pages: int = 20, policy: Any = None, **more: Any) -> Rig:
    context = Context(
        kind="kvcache",
        name="paged",
        rng=random.Random(0),
        model=TOY_MODEL,
        hardware=None,
        limits=toy_limits(),
    )
    cache = Paged(PagedConfig(page_tokens=4, watermark=watermark), context)
    return Rig(make_engine(policy or Fcfs(), kvcache=cache, pages=pages, **more))


def admitted(r: Rig) -> list[str]:
    return [x.request for x in r.records if isinstance(x, RequestAdmitted)]


@pytest.mark.parametrize(("watermark", "pages"), [(0.0, 0), (0.01, 0), (0.05, 1), (0.5, 10), (0.99, 19)])
def test_it_is_a_share_of_the_pool_rounded_down(watermark: float, pages: int) -> None:
    assert rig(watermark).engine._view.kv.watermark_pages == (pages,)


def test_an_admission_leaves_so_many_pages_free() -> None:
    for watermark, both in ((0.0, True), (0.2, True), (0.25, False)):
        r = rig(watermark)  # 20 pages: 0, 4, 5 to leave free
        r.arrive("a", 37, 30)  # 10 pages, with room for its next token
        r.arrive("b", 24, 3)  # 6 pages
        r.finish()
        assert admitted(r) == (["a", "b"] if both else ["a"])


def test_requests_that_run_may_use_what_is_left_free() -> None:
    r = rig(0.5)
    r.arrive("a", 30, 45)
    r.drain()
    assert r.ends("a")[0].outcome == "completed"
    assert not any(isinstance(x, RequestPreempted) for x in r.records)


def test_a_request_that_would_run_alone_is_let_in() -> None:
    r = rig(0.5)
    r.arrive("a", 64, 5)  # 16 of 20 pages
    assert admitted(r) == ["a"]
    r.arrive("b", 8, 2)
    r.drain()
    assert admitted(r) == ["a", "b"]


def test_within_one_plan_the_second_admission_leaves_them_free() -> None:
    r = rig(0.5)
    r.auto = False
    r.arrive("a", 24, 5)
    r.arrive("b", 24, 5)
    r.schedule()
    assert admitted(r) == ["a"]


def test_a_swapped_request_comes_back_under_it_too() -> None:
    r = rig(0.5, host_pages=20)
    r.arrive("a", 24, 5)
    engine = r.engine
    budget = engine._view.kv.budget()
    b = r.arrive("b", 24, 5)
    assert not budget.take(b.view, 24)
    from servelab.core.request import Phase

    b.phase = Phase.SWAPPED
    assert not engine._view.kv.budget().take(b.view, 24)
    b.phase = Phase.RUNNING
    assert engine._view.kv.budget().take(b.view, 24)
    b.phase = Phase.WAITING

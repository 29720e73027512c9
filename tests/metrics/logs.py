"""Small logs whose figures are worked out by hand. Times in the comments are milliseconds."""

from __future__ import annotations

from typing import Any

from servelab.core.records import (
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RunFinished,
    RunStarted,
    StepDone,
)

MS = 1_000_000

POOL = {"id": "full", "pages": 100, "page_tokens": 16, "bytes_per_page": 4096}
INFO: dict[str, Any] = {"model": "tiny", "clock": "virtual", "seed": 7, "kv": {"pools": [POOL]}}


def started(**info: Any) -> RunStarted:
    return RunStarted(t_ns=0, info={**INFO, **info})


def ended(t: float, status: Any = "ok", reason: str = "") -> RunFinished:
    return RunFinished(t_ns=int(t * MS), status=status, reason=reason)


def arrived(
    t: float,
    request: str,
    prompt: int = 10,
    *,
    ttft: float | None = None,
    tpot: float | None = None,
    e2el: float | None = None,
) -> RequestArrived:
    """Bounds in ms."""
    return RequestArrived(
        t_ns=int(t * MS),
        request=request,
        prompt_tokens=prompt,
        max_new_tokens=64,
        slo_ttft_ns=None if ttft is None else int(ttft * MS),
        slo_tpot_ns=None if tpot is None else int(tpot * MS),
        slo_e2el_ns=None if e2el is None else int(e2el * MS),
    )


def admitted(t: float, request: str, *, resumed: bool = False, cached: int = 0) -> RequestAdmitted:
    return RequestAdmitted(t_ns=int(t * MS), request=request, resumed=resumed, cached_tokens=cached)


def preempted(t: float, request: str, lost: int) -> RequestPreempted:
    return RequestPreempted(
        t_ns=int(t * MS), request=request, mode="recompute", reason="full", lost_tokens=lost
    )


def finished(
    t: float, request: str, n: int, outcome: Any = "completed", reason: str = "stop", **more: int
) -> RequestFinished:
    return RequestFinished(
        t_ns=int(t * MS), request=request, outcome=outcome, reason=reason, output_tokens=n, **more
    )


def step(
    start: float,
    ends: list[float],
    batch: dict[str, tuple[int, int]],
    free: tuple[int, ...] = (100,),
    number: int = 0,
    **more: Any,
) -> StepDone:
    """``batch``: request -> (tokens of the first step, output tokens over all steps)."""
    return StepDone(
        t_ns=int(ends[-1] * MS),
        lane=0,
        step=number,
        start_ns=int(start * MS),
        ends_ns=[int(end * MS) for end in ends],
        requests=list(batch),
        tokens=[tokens for tokens, _ in batch.values()],
        emitted=[out for _, out in batch.values()],
        waiting=0,
        running=len(batch),
        free_pages=free,
        **more,
    )


def three_requests() -> list[Record]:
    """Three requests; ``b`` is preempted after its first token; ``a`` and ``c`` decode in a hold.

    Output of a: 110, 120, 130, 140, 160. Of b: 120, 200, 210. Of c: 160 only.

    ======= ====== ===== ====== ==== ===== ========== ================
    request t0     t1    tn     N    TTFT  E2EL       TPOT
    ======= ====== ===== ====== ==== ===== ========== ================
    a       0      110   160    5    110   160        50 / 4 = 12.5
    b       10     120   210    3    110   200        90 / 2 = 45
    c       100    160   160    1    60    60         left out (0)
    ======= ====== ===== ====== ==== ===== ========== ================

    ITL: a 10, 10, 10, 20; b 80, 10. Duration 0 to 210 = 0.21 s.
    """
    return [
        started(),
        arrived(0, "a", 10, ttft=150, tpot=15),
        arrived(10, "b", 20, ttft=150, tpot=15),
        admitted(50, "a"),
        step(50, [110], {"a": (10, 1)}, free=(90,), number=0),
        arrived(100, "c", 30, ttft=60, tpot=15),
        admitted(110, "b"),
        step(110, [120], {"a": (1, 1), "b": (20, 1)}, free=(60,), number=1),
        preempted(120, "b", 20),
        step(120, [130, 140], {"a": (1, 2)}, free=(80,), number=2),
        admitted(140, "c"),
        step(140, [160], {"a": (1, 1), "c": (30, 1)}, free=(100,), number=4),
        finished(160, "a", 5, reason="length"),
        finished(160, "c", 1),
        admitted(160, "b", resumed=True),
        step(160, [200], {"b": (21, 1)}, free=(70,), number=5),
        step(200, [210], {"b": (1, 1)}, free=(100,), number=6),
        finished(210, "b", 3, preemptions=1, cached_tokens=4),
        ended(210),
    ]

"""What this machine reaches: matrix products, copies, the start of an operation. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter  # noqa: TID251 - it measures, and decides nothing
from typing import Any

import torch

from servelab.core.api import ServeLabError
from servelab.core.environment import environment

Figures = dict[str, tuple[float, str]]
"""Name of a figure -> value, and how it was measured."""

BLOCK_S = 0.005
"""Calls timed together take at least this long: thousands of times what the clock resolves."""


def profile(device: str, dtype: str, seconds: float) -> dict[str, Any]:
    """Figures and sources as in ``configs/hardware``.

    Args:
        device: ``cuda``, ``cpu``, or ``auto``: cuda where it is.
        dtype: of the matrix products, a name of torch.
        seconds: how long each figure is measured.

    Raises:
        ServeLabError: there is no CUDA device, and one is asked for.
    """
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ServeLabError(
            "there is no CUDA device here",
            where="servelab devices measure --device cuda",
            why="torch finds none",
            do="leave --device out to measure the CPU, or install a build of torch for the GPU",
        )
    on = "cuda" if there and device != "cpu" else "cpu"
    machine = environment()["machine"]
    if on == "cuda":
        where = torch.cuda.get_device_name(0)
    else:
        where = f"{machine['cpu'] or 'unknown CPU'}, {machine['usable_cores'] or machine['cores']:g} cores"
    about = f"measured with torch {torch.__version__} on {where}"
    found = measure(on, dtype, seconds)
    stated: dict[str, Any] = {
        figure: float(f"{value:.4g}") if isinstance(value, float) else value
        for figure, (value, _) in found.items()
    }
    return {**stated, "sources": {figure: f"{about}; {how}" for figure, (_, how) in found.items()}}


def measure(device: str, dtype: str, seconds: float) -> Figures:
    """Figures of ``HardwareConfig`` for the machine this runs on.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: of the matrix products, a name of torch.
        seconds: how long each figure is measured.
    """
    kind = getattr(torch, dtype)
    gpu = device == "cuda"
    size, copied, short = (8192, 2**30, 256) if gpu else (1024, 2**27, 16)
    torch.manual_seed(0)

    def best(call: Callable[[], object]) -> float:
        return fastest(call, seconds, torch.cuda.synchronize if gpu else None)

    def operand(n: int) -> torch.Tensor:
        return torch.randn(n, n).to(device=device, dtype=kind)

    a, b, c, d = operand(size), operand(size), operand(short), operand(short)
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    product, small = best(lambda: a @ b), best(lambda: c @ d)
    copy = best(lambda: target.copy_(source))
    named = dtype if gpu else f"{dtype} on {torch.get_num_threads()} threads"
    found: Figures = {
        "flops": (2 * size**3 / product, f"{size} x {size} products in {named}, fastest"),
        "memory_bytes": _memory(gpu),
        "memory_bytes_per_s": (2 * copied / copy, f"copies of {copied >> 20} MiB, read and written, fastest"),
    }
    if gpu:
        pinned = torch.empty(copied // 4, pin_memory=True)
        moved = best(lambda: target.copy_(pinned, non_blocking=True))
        found["host_link_bytes_per_s"] = (copied / moved, f"{copied >> 20} MiB from pinned memory, fastest")
    measured = "the figure that it multiplies is measured"
    found |= {"mfu": (1.0, measured), "mbu": (1.0, measured)}
    found["op_ns"] = (round(small * 1e9), f"one product of {short} x {short}, with its start, fastest")
    return found


def fastest(call: Callable[[], object], seconds: float, wait: Callable[[], object] | None = None) -> float:
    """Seconds of one call among the fastest: what the device does when it is left alone.

    Calls are timed in blocks long enough for the clock (torch.utils.benchmark does the same, but imports
    its compiler of C++ and with it setuptools, which fails where distutils was imported first).

    Args:
        call: what is timed.
        seconds: how long blocks are repeated; at least one is run.
        wait: ends when the device has done what was asked of it, if calls return before.
    """

    def block(calls: int) -> float:
        began = perf_counter()
        for _ in range(calls):
            call()
        if wait is not None:
            wait()
        return perf_counter() - began

    block(1)  # the first call also loads and plans
    calls = 1
    while (took := block(calls)) < BLOCK_S:
        calls *= 2
    best, spent = took, took
    while spent < seconds:
        took = block(calls)
        best, spent = min(best, took), spent + took
    return best / calls


def _memory(gpu: bool) -> tuple[int, str]:
    if gpu:
        return int(torch.cuda.get_device_properties(0).total_memory), "what torch reports"
    machine = environment()["machine"]
    limit, total = machine["memory_limit_bytes"], machine["memory_bytes"]
    return (limit, "the limit of the control group") if limit else (total, "what the system reports")

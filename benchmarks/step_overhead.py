"""What one step costs in the core: engine + scheduler + ledger, by number of running requests.

    python benchmarks/step_overhead.py [--requests 1,16,64,256,1024] [--json FILE]

Set-up: scheduler ``vllm_v1``, kvcache ``paged`` (16 tokens per page), the scripted executor and cost model
as a stand-in device, on the virtual clock; one lane, every request decoding, nothing arriving. Timed: all of
``Engine.handle`` (plan, validation, ledger, launch; commit, records), with the plan log on. Not timed: the
driver, the executor and the cost model, whose share is printed beside it. Prompts are staggered so that
1/16 of the requests cross a page boundary in each step.

Printed per row: microseconds per step when every step is planned; when the plan is held and the executor
runs the held steps in one launch (amortised over the hold); and when it is held but the executor runs
one step per launch, as a real engine does. The last column compares the full step with a peer in the
same run: a bare Python loop that appends one token and one time stamp to each request, which any engine
written in Python has to pay.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from servelab.core.api import Context, Limits, ModelFacts, RequestSpec, Truth
from servelab.core.engine.engine import Engine
from servelab.core.events import Arrive, Event, Launch, LaunchDone, Schedule
from servelab.plugins.costmodels.scripted import ScriptedCost, ScriptedCostConfig
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig
from servelab.plugins.kvcache.paged import Paged, PagedConfig
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

OUTPUT = 1 << 30  # nobody finishes while we measure


class Bench:
    """One engine with ``n`` decoding requests, driven by hand so that each part is timed apart."""

    def __init__(self, n: int, hold_steps: int, foresight: bool) -> None:
        model = ModelFacts(
            name="toy",
            layers=4,
            hidden=256,
            heads=4,
            kv_heads=2,
            head_dim=64,
            ffn=688,
            vocab=32000,
            max_position=1 << 20,
        )
        limits = Limits(max_batch_tokens=1 << 20, max_batch_requests=4096, max_model_len=1 << 20)
        truths: dict[str, Truth] = {}

        def ctx(kind: str, name: str) -> Context:
            return Context(
                kind=kind,
                name=name,
                rng=random.Random(0),
                model=model,
                hardware=None,
                limits=limits,
                oracle=truths.__getitem__,
            )

        cache = Paged(PagedConfig(), ctx("kvcache", "paged"))
        pages = n * 256
        self.executor = ScriptedExecutor(
            ScriptedExecutorConfig(num_kv_pages=pages, foresight=foresight), ctx("executor", "scripted")
        )
        self.cost = ScriptedCost(ScriptedCostConfig(), ctx("cost", "scripted"))
        layout = cache.layout(model)
        config = VllmV1Config(max_num_seqs=4096, max_num_batched_tokens=1 << 20, hold_steps=hold_steps)
        self.engine = Engine(
            scheduler=VllmV1(config, ctx("scheduler", "vllm_v1")),
            scheduler_name="vllm_v1",
            kvcache=cache,
            kvcache_name="paged",
            layout=layout,
            capacity=self.executor.capacity(layout),
            limits=limits,
            model=model,
            cost=self.cost,
            horizon=self.executor.horizon,
        )
        self.now = 0
        self.engine_ns = 0
        self.outside_ns = 0
        for i in range(n):
            truths[f"r{i}"] = Truth(OUTPUT)
            spec = RequestSpec(id=f"r{i}", prompt_tokens=17 + i % 16, max_new_tokens=OUTPUT)
            self._handle(Arrive(spec))
        self._pending = self._handle(Schedule())
        self.launch()  # the prefill

    def _handle(self, event: Event) -> Launch | None:
        start = perf_counter_ns()
        commands = self.engine.handle(event, self.now)
        self.engine_ns += perf_counter_ns() - start
        return next((c for c in commands if isinstance(c, Launch)), None)

    def launch(self) -> int:
        """Run the pending launch and ask for the next; returns the steps it ran."""
        assert self._pending is not None
        batch = self._pending.batch
        start = perf_counter_ns()
        ends, time = [], self.now
        for price in self.cost.price(batch, batch.steps):
            time += price
            ends.append(time)
        outcomes = self.executor.launch(batch, batch.steps)
        self.outside_ns += perf_counter_ns() - start
        self.now = time
        self._handle(LaunchDone(batch.lane, batch.launch, ends, outcomes))
        self._pending = self._handle(Schedule())
        return len(ends)


def measure(n: int, hold_steps: int, foresight: bool, repeats: int, seconds: float) -> dict[str, float]:
    """Microseconds per step: the median over repeats of mean engine time, and of the world outside it."""
    inside, outside = [], []
    for _ in range(repeats):
        bench = Bench(n, hold_steps, foresight)
        steps, bench.engine_ns, bench.outside_ns = 0, 0, 0
        stop = perf_counter_ns() + int(seconds * 1e9 / repeats)
        while perf_counter_ns() < stop and steps < 2000:
            steps += bench.launch()
        inside.append(bench.engine_ns / steps / 1e3)
        outside.append(bench.outside_ns / steps / 1e3)
    return {"engine_us": statistics.median(inside), "outside_us": statistics.median(outside)}


def peer(n: int) -> float:
    """Microseconds per step of the barest loop: one token and one time stamp per request."""

    class Bare:
        __slots__ = ("computed", "generated", "output", "times")

        def __init__(self) -> None:
            self.computed = self.generated = 0
            self.output: list[int] = []
            self.times: list[int] = []

    requests = [Bare() for _ in range(n)]
    best = float("inf")
    for _ in range(7):
        start = perf_counter_ns()
        for now in range(200):
            for r in requests:
                r.computed += 1
                r.generated += 1
                r.output.append(0)
                r.times.append(now)
        best = min(best, (perf_counter_ns() - start) / 200 / 1e3)
        for r in requests:
            r.output.clear()
            r.times.clear()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", default="1,16,64,256,1024", help="running requests, comma separated")
    parser.add_argument("--hold", type=int, default=64, help="steps of a hold (default 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent per cell")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}, one core")
    print(
        f"{'running':>8} {'planned us/step':>16} {f'held x{args.hold} us/step':>18} "
        f"{'held, 1 step/launch':>20} {'device stand-in':>16} {'bare loop':>10} {'planned/bare':>13}"
    )
    rows: list[dict[str, Any]] = []
    for n in map(int, args.requests.split(",")):
        planned = measure(n, 1, True, args.repeats, args.seconds)
        held = measure(n, args.hold, True, args.repeats, args.seconds)
        single = measure(n, args.hold, False, args.repeats, args.seconds)
        bare = peer(n)
        rows.append({"running": n, "planned": planned, "held": held, "held_single": single, "bare_us": bare})
        print(
            f"{n:>8} {planned['engine_us']:>16.1f} {held['engine_us']:>18.2f} {single['engine_us']:>20.1f} "
            f"{planned['outside_us']:>16.1f} {bare:>10.1f} {planned['engine_us'] / bare:>13.1f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

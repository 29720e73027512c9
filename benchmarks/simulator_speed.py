"""How fast the simulator is: CPU time, memory, and where they go, for Llama-2-7B on an A100.

    python benchmarks/simulator_speed.py [--requests 10000] [--curve 1000,10000,100000] [--profile]
    python benchmarks/simulator_speed.py --schedulers vllm_v1,pastfuture -- workload.request_rate=3.0

Set-up: the very command a user types, in a process of its own, with all default artefacts (``events.jsonl``,
``plan.jsonl``, report, page and plots; plans are validated): 10,000 conversations drawn from BurstGPT's
published statistics, whose outputs are scaled to about 3 million tokens in all, at a rate that fills about
0.8 of the KV pages. What follows ``--`` is added to the command.

CPU seconds are those of the process, user and system, start-up and imports included (of compiled modules: a
short run comes first, and ``PYTHONDONTWRITEBYTECODE`` is not passed on), as the operating system counts them:
other programs on the machine change them far less than wall time, but they do, through shared
caches and hyper-threads. So each row is the least of ``--repeats`` runs, and parts are told as ratios of the
same call: the same run without observers, without the report's plots, with every step planned (no hold), and
one step per launch. The peer is a bare loop that appends one token and one time stamp per output token, as
any simulator in Python that keeps them has to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (
    "executor=sim",
    "model=llama2_7b",
    "hardware=a100_80g",
    "workload=burstgpt",
    "workload.log_type=conversation",
    "workload.output_scale=1.15",
    "workload.request_rate=3.8",
)
VARIANTS = {
    "all artefacts": (),
    "no plots, no page": ("observers=[jsonl,progress,{name: report, plots: false, page: false}]",),
    "jsonl only": ("observers=[jsonl]",),
    "no observer": ("observers=[]",),
    "no observer, no hold": ("observers=[]", "scheduler.hold_steps=1"),
    "no observer, one step per launch": ("observers=[]", "executor.foresight=false"),
}
CHILD = """
import json, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]), file=sys.stderr)
"""


@dataclass
class Row:
    """One command, measured."""

    requests: int
    cpu_s: float
    wall_s: float
    peak_mib: float
    log_mib: float = 0.0
    output_tokens: int = 0
    steps: int = 0
    launches: int = 0
    records: int = 0
    kv_used: float | None = None

    def __str__(self) -> str:
        each = f"{1e6 * self.cpu_s / self.steps:8.1f} us/step" if self.steps else ""
        used = "" if self.kv_used is None else f"  KV {100 * self.kv_used:.0f} %"
        return (
            f"{self.requests:>9,} requests {self.cpu_s:8.2f} CPU s {self.wall_s:8.2f} s wall "
            f"{self.peak_mib:7.0f} MiB {self.log_mib:7.1f} MiB log {self.output_tokens:>12,} tokens "
            f"{self.steps:>9,} steps {self.launches:>9,} launches {self.records:>9,} records {each}{used}"
        )


def once(requests: int, scheduler: str, extra: list[str], profile: Path | None = None) -> Row:
    """Run the command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *(str(ROOT / "run.py"), "-q", *COMMAND, f"+scheduler={scheduler}"),
            *(f"workload.num_requests={requests}", f"hydra.run.dir={folder}/run", *extra),
        ]
        python = [sys.executable, *(("-m", "cProfile", "-o", str(profile)) if profile else ("-c", CHILD))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        start = perf_counter()
        done = subprocess.run([*python, *arguments], env=environment, capture_output=True, text=True)
        wall = perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        cpu, peak = (0.0, 0) if profile else json.loads(done.stderr.splitlines()[-1])
        row = Row(requests, cpu, wall, peak / (2**20 if sys.platform == "darwin" else 2**10))
        _read(Path(folder) / "run", row)
        return row


def _read(folder: Path, row: Row) -> None:
    """What the run says of itself, as far as it has written it."""
    for name in ("events.jsonl", "plan.jsonl"):
        path = folder / name
        if path.exists():
            row.log_mib += path.stat().st_size / 2**20
            with path.open("rb") as lines:
                row.records += sum(1 for _ in lines) - 1
    path = folder / "results.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        row.output_tokens = result["total_output_tokens"]
        row.steps, row.launches = (result["servelab"]["batch"][key] for key in ("steps", "launches"))
        pool = result["servelab"]["kv_pages"][0]
        row.kv_used = pool["mean_use"]


def least(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.cpu_s)


def peer(tokens: int) -> float:
    """CPU seconds to append a token and a time per output token to lists of 100 requests."""
    requests: list[tuple[list[int], list[int]]] = [([], []) for _ in range(100)]
    start = process_time()
    for now in range(tokens // 100):
        for output, times in requests:
            output.append(0)
            times.append(now)
    return process_time() - start


def by_part(profile: Path) -> list[tuple[str, float]]:
    """Share of each part of the package in cProfile's own time; calls into C count for who called them."""
    import pstats

    own: dict[str, float] = {}
    stats: Any = pstats.Stats(str(profile))
    for (file, _, _), (_, _, time, _, callers) in stats.stats.items():
        if file == "~" and callers:
            for (caller, _, _), told in callers.items():
                own[_part(caller)] = own.get(_part(caller), 0.0) + told[2]
        else:
            own[_part(file)] = own.get(_part(file), 0.0) + time
    total = sum(own.values())
    return sorted(((part, time / total) for part, time in own.items()), key=lambda each: -each[1])


def _part(file: str) -> str:
    path = file.replace("\\", "/")
    for kind in ("core", "plugins"):
        for root in (f"{ROOT}/{kind}/", f"servelab/{kind}/"):
            if root in path:
                rest = path.split(root)[-1].split("/")
                return "/".join([kind, *rest[: 2 if len(rest) > 2 else 1]]).removesuffix(".py")
    if "matplotlib" in path or "PIL" in path or "numpy" in path:
        return "matplotlib"
    return "Python and other libraries"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs per row, of which the least is told")
    parser.add_argument("--schedulers", default="vllm_v1", help="comma separated")
    parser.add_argument("--curve", default="", help="also these numbers of requests, one run each")
    parser.add_argument("--profile", action="store_true", help="share of each part, by cProfile")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("extra", nargs="*", help="added to the command, after --")
    args = parser.parse_args()
    print(f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}, one core")
    print("python run.py", *COMMAND, *args.extra)
    rows: dict[str, Any] = {}
    for scheduler in args.schedulers.split(","):  # so that all modules are compiled, as after a first run
        once(10, scheduler, args.extra)
    for scheduler in args.schedulers.split(","):
        print(f"\n{scheduler}, least of {args.repeats}:")
        whole = None
        for name, variant in VARIANTS.items():
            if scheduler != "vllm_v1" and "hold" in name:
                continue  # the setting has another name there, or none
            row = least(
                [once(args.requests, scheduler, [*args.extra, *variant]) for _ in range(args.repeats)]
            )
            whole = whole or row
            if not row.steps:
                row.steps, row.launches, row.output_tokens = whole.steps, 0, whole.output_tokens
            print(f"{name:>34} {row.cpu_s / whole.cpu_s:5.2f}x {row}")
            rows[f"{scheduler}: {name}"] = asdict(row)
        assert whole is not None
        bare = min(peer(whole.output_tokens) for _ in range(3))
        print(f"{'bare loop over the tokens':>34} {bare / whole.cpu_s:5.2f}x {bare:.2f} CPU s")
    for requests in map(int, filter(None, args.curve.split(","))):
        row = once(requests, args.schedulers.split(",")[0], args.extra)
        print(f"{'curve':>34}       {row}")
        rows[f"curve: {requests}"] = asdict(row)
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "profile"
            once(args.requests, args.schedulers.split(",")[0], args.extra, profile)
            for part, share in by_part(profile)[:20]:
                print(f"{100 * share:6.1f} %  {part}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the ``torch`` executor needs of this machine, for ``servelab doctor``. Imports no torch itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from servelab.core.api import Finding
from servelab.core.config import DTYPE_BYTES, ModelConfig
from servelab.core.errors import INSTALL, ServeLabError
from servelab.core.findings import shown
from servelab.core.user_cache import cache_root
from servelab.plugins.executors.checkpoint import folder as hf
from servelab.plugins.executors.checkpoint import wheel
from servelab.plugins.executors.checkpoint.convert import PROVENANCE

SECONDS = 120
"""Longest time for ``import torch``, which reads a gigabyte from a cold disk."""
KV_BYTES = 192 << 20
"""``executor.kv_memory_mib`` unless stated."""
DOWNLOAD_BYTES = 93_000_000
"""Of the default model's wheel."""
_HUB_SECONDS = 10.0

_LOOK = """
import json, torch
found = {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda}
found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(found))
"""


def diagnose(model: ModelConfig, online: bool) -> Iterable[Finding]:
    """Torch, the default model's files, memory and disk."""
    yield from _torch()
    cached = yield from _cache(model)
    yield _memory(model)
    if not cached:
        yield _disk(model)
    if online:
        yield _hub(model)


# ------------------------------------------------------------------ torch


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "warn", "not installed: no model can be run", f"in the checkout: {INSTALL}")
        return
    try:  # in a process of its own: a build that does not fit this machine may not only raise, but crash
        done = subprocess.run(
            [sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "torch", "fail", f"import torch took longer than {SECONDS} s", "try again on a quiet machine"
        )
        return
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        yield Finding("torch", "fail", f"import torch failed: {said}", f"reinstall it: {INSTALL}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    build = f"CUDA {found['cuda']} build" if found["cuda"] else "CPU build"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = found["threads"]
    about = f"{found['version']}, {build}, threads {threads}, cores {cores}"
    if threads > cores:
        yield Finding(
            "torch",
            "warn",
            about,
            f"more threads than cores are slow: executor.threads={cores}, or unset OMP_NUM_THREADS",
        )
    else:
        yield Finding("torch", "ok", about)
    yield _gpu(found)


def _gpu(found: dict[str, Any]) -> Finding:
    triton = "Triton is installed" if importlib.util.find_spec("triton") else "Triton is not installed"
    if not found["gpus"]:
        return Finding("GPU", "ok", f"none that torch can use; {triton}; models run on the CPU")
    return Finding("GPU", "ok", f"{', '.join(found['gpus'])}; {triton}; executor torch uses the CPU as yet")


# ------------------------------------------------------------- the model


def _cache(model: ModelConfig) -> Generator[Finding, None, bool]:
    """Whether the default model's files are here, from the wheel that its digest names; returns that."""
    check = f"model {model.name}"
    folder = wheel.cached(model) if model.source == "wheel" else None
    if folder is None:
        yield Finding(
            check,
            "warn",
            f"not in the cache {shown(cache_root())} yet",
            "the first run fetches and converts it; without network: model=local model.path=...",
        )
        return False
    try:
        made = hf.read_json(folder / PROVENANCE)
        hf.read_config(folder)
        tensors = hf.weights(folder)
    except ServeLabError as exc:
        yield Finding(
            check,
            "fail",
            f"damaged: {exc.what}, {exc.why}",
            f"delete {shown(folder)}; the next run makes it again",
        )
        return True
    if made.get("wheel_sha256") != (model.wheel_sha256 or "").lower():
        yield Finding(
            check,
            "fail",
            f"made from another wheel: SHA-256 {str(made.get('wheel_sha256'))[:12]}..., not "
            f"{(model.wheel_sha256 or '')[:12]}...",
            f"delete {shown(folder)}; the next run makes it again",
        )
        return True
    size = sum(path.stat().st_size for path in folder.iterdir())
    yield Finding(
        check, "ok", f"{len(tensors)} tensors, {size / 1e6:,.0f} MB in {shown(folder)}, wheel as pinned"
    )
    return True


def weight_bytes(model: ModelConfig, item: float) -> int:
    """Of a dense decoder of this shape with tied embeddings, norms apart; 0 if the shape is not stated."""
    if model.unstated():
        return 0
    assert model.layers and model.hidden and model.heads and model.kv_heads and model.head_dim
    assert model.ffn and model.vocab
    attention = 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)
    return int(
        (model.layers * (attention + 3 * model.hidden * model.ffn) + model.vocab * model.hidden) * item
    )


def _memory(model: ModelConfig) -> Finding:
    """Weights twice, as they are read and as they are packed for the CPU, and KV."""
    need = 2 * weight_bytes(model, DTYPE_BYTES[model.dtype]) + KV_BYTES + (600 << 20)
    about = f"the default run needs about {need / 2**30:.1f} GiB"
    free = available_memory()
    if free is None:
        return Finding("memory", "ok", f"{about}; this system does not say how much is free")
    about = f"{free / 2**30:.1f} GiB free; {about}"
    if free < need:
        return Finding(
            "memory",
            "warn",
            about,
            "end other programs, or lower executor.kv_memory_mib; or run without a "
            "model: +experiment=scripted",
        )
    return Finding("memory", "ok", about)


def available_memory() -> int | None:
    """Bytes that a new program may use, within the limit of a container; None: not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return free if limit == "max" else min(free, int(limit) - used)
    except (OSError, ValueError):  # no container, or of another sort
        return free


def _disk(model: ModelConfig) -> Finding:
    """Room for the wheel, what is unpacked of it, and the float32 weights that are made from it."""
    where = cache_root()
    existing = next(path for path in (where, *where.parents) if path.exists())
    need, free = weight_bytes(model, 4) + 2 * DOWNLOAD_BYTES, shutil.disk_usage(existing).free
    about = f"{free / 1e9:,.1f} GB free for {shown(where)}, the default model needs {need / 1e9:.1f} GB"
    if not os.access(existing, os.W_OK):
        return Finding(
            "disk", "fail", f"{shown(existing)} cannot be written", "name another folder in SERVELAB_CACHE"
        )
    if free < need:
        return Finding("disk", "fail", about, "make room, or name a folder on another disk in SERVELAB_CACHE")
    return Finding("disk", "ok", about)


def _hub(model: ModelConfig) -> Finding:
    check, repo = "Hugging Face hub", model.repo or "HuggingFaceTB/SmolLM2-135M-Instruct"
    try:
        from huggingface_hub import HfApi

        HfApi().repo_info(repo, timeout=_HUB_SECONDS)
    except Exception as exc:  # of huggingface_hub, or of its HTTP library, whichever that is
        first = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        return Finding(
            check,
            "warn",
            f"{repo} cannot be asked for: {first:.120}",
            "model=hub needs it, nothing else: check the network or HF_ENDPOINT, or use model=local",
        )
    return Finding(check, "ok", f"{repo} is there")

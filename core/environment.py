"""What a run ran on: software with versions, and the machine. Names of hosts and users are left out."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from servelab.core import __version__

LIBRARIES = (
    "hydra-core",
    "omegaconf",
    "pluggy",
    "pydantic",
    "tqdm",
    "hydra-joblib-launcher",
    "joblib",
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "gguf",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
)
"""Libraries whose versions are recorded where they are installed."""
GIT_TIMEOUT_S = 10
NVIDIA = Path("/proc/driver/nvidia")
CGROUP = Path("/sys/fs/cgroup")


@cache
def environment() -> dict[str, Any]:
    """Software and machine, in JSON types; what cannot be found out is None. Looked up once per process."""
    commit, dirty = checkout(Path(__file__).resolve().parents[1])
    return {
        "servelab": __version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "libraries": _versions(),
        "machine": {
            "os": f"{platform.system()} {platform.release()}",
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "memory_bytes": _memory_bytes(),
            "memory_limit_bytes": _memory_limit_bytes(),
            "gpus": _gpus(),
            "gpu_driver": _gpu_driver(),
        },
    }


def checkout(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at ``root``, and whether files differ from it; Nones where there is none.

    A wheel's folder is no checkout, also where it lies inside somebody's repository.
    """
    if not (root / ".git").exists():
        return None, None
    commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    return commit or None, None if status is None else bool(status)


def _git(root: Path, *command: str) -> str | None:
    """What git prints; None if there is no git, or it fails."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # as hooks set
    line = ["git", "--no-optional-locks", "-C", str(root), *command]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(line, env=clean, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _read(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return ""


def _cpu() -> str | None:
    """The model's name, as the system gives it."""
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            line = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(line, capture_output=True, text=True, timeout=GIT_TIMEOUT_S).stdout.strip()
    pattern = r"^(?:model name|Model|cpu model)\s*:\s*(.+)$"
    found = re.search(pattern, _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None


def _usable_cores() -> float | None:
    """Cores this process may use: its affinity, or less where a control group gives it a share of time."""
    cores = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if cores and quota.isdigit() and period.isdigit():
        return min(cores, int(quota) / int(period))
    return cores


def _memory_bytes() -> int | None:
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _memory_limit_bytes() -> int | None:
    """Of the control group; None: no limit of its own."""
    limit = _read(CGROUP / "memory.max")
    return int(limit) if limit.isdigit() else None


def _gpus() -> list[str]:
    """Names of NVIDIA devices, as their driver gives them: no library is loaded to ask."""
    return [
        found[1].strip()
        for path in sorted(NVIDIA.glob("gpus/*/information"))
        if (found := re.search(r"^Model:\s*(.+)$", _read(path), re.MULTILINE))
    ]


def _gpu_driver() -> str | None:
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _read(NVIDIA / "version"))
    return found[1] if found else None

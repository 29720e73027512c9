"""Where and how the command runs: the folder, the environment, plots without a display."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from servelab.core.errors import nearest
from servelab.core.findings import Finding, shown
from servelab.core.registry import BLOCK_ENV, CONFIG_GROUP, GROUP

VARIABLES = {
    BLOCK_ENV: "packages left out of every run",
    "SERVELAB_TRACEBACK": "errors of ours come with a traceback",
    "SERVELAB_CACHE": "where models and data sets are kept",
    "SERVELAB_DATA": "where tests find real traces",
}
"""What we read of the environment, and what it does."""
OTHERS = {
    "HYDRA_FULL_ERROR": "errors come with a traceback",
    "HF_HUB_OFFLINE": "the model hub is never asked",
    "HF_ENDPOINT": "another model hub is asked",
}
SECONDS = 120
_DRAW = (
    "import io; from matplotlib.figure import Figure; "
    "Figure().add_subplot().plot([0, 1]); Figure().savefig(io.BytesIO())"
)


def folder_findings(folder: Path | None = None) -> Iterator[Finding]:
    """Whether a run can write its results where it would be started."""
    folder = folder or Path.cwd()
    outputs = folder / "outputs"
    where = outputs if outputs.exists() else folder
    try:
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as exc:
        yield Finding(
            "outputs",
            "fail",
            f"{shown(where)} cannot be written: {exc.strerror}",
            "start runs in another folder, or name one: hydra.run.dir=...",
        )
        return
    yield Finding("outputs", "ok", f"runs started here write below {shown(outputs)}")


def environment_findings(environ: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Variables that change what servelab does, and misspelt ones."""
    environ = os.environ if environ is None else environ  # noqa: TID251 - it is what is examined
    quiet = True
    for name, about in {**VARIABLES, **OTHERS}.items():
        if (value := environ.get(name, "")) not in ("", "0"):
            quiet = False
            yield from _in_effect(name, value, about)
    for name in sorted(environ):
        if name.startswith("SERVELAB_") and name not in VARIABLES:
            quiet = False
            yield Finding(
                name, "warn", "nothing reads this variable", f"unset it; {nearest(name, VARIABLES)}"
            )
    if quiet:
        yield Finding("environment", "ok", "no variable changes what servelab does")


def _in_effect(name: str, value: str, about: str) -> Iterator[Finding]:
    if name != BLOCK_ENV:
        yield Finding(name, "ok", f"set to {value}: {about}")
        return
    from importlib.metadata import entry_points

    installed = {entry.name for group in (GROUP, CONFIG_GROUP) for entry in entry_points(group=group)}
    for one in filter(None, value.split(",")):
        if one in installed or one.startswith("servelab."):
            yield Finding(name, "warn", f"{one} is left out of every run", f"unset {name} to have it back")
        else:
            yield Finding(name, "warn", f"no package is called {one!r}", f"{nearest(one, installed)}")


def plot_findings() -> Iterator[Finding]:
    """Whether plots can be drawn; none is shown, so no display is needed."""
    if importlib.util.find_spec("matplotlib") is None:
        return  # said where extras are looked at
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        said, failed = f"it took longer than {SECONDS} s", True
    if failed:
        yield Finding(
            "plots",
            "fail",
            f"matplotlib cannot draw: {said:.160}",
            "reinstall it; unset MPLBACKEND if that is set",
        )
    else:
        yield Finding("plots", "ok", "matplotlib draws without a display")

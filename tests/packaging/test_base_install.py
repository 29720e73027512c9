"""Without what runs a model: only the base dependencies are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from servelab.core.errors import INSTALL, PluginLoadError
from servelab.core.registry import WITHOUT_MODEL, Registry
from servelab.core.spec import PluginSpec

EXTRAS = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub", "transformers")
BASE = """
import runpy, sys
sys.modules.update(dict.fromkeys({extras!r}))  # None: there is no such module
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""

Base = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def base(repository: Path, tmp_path: Path) -> Base:
    """``python run.py ARGS`` where nothing is installed that runs a model."""
    code = BASE.format(extras=EXTRAS, script=str(repository / "run.py"))

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return call


def test_the_default_run_says_what_is_missing_and_what_to_do(base: Base) -> None:
    done = base()
    assert (done.returncode, done.stdout) == (1, "")
    for part in (
        "executor 'torch' is disabled",
        "needs torch, numpy, safetensors, tokenizers, jinja2, not installed",
        'pip install -c constraints.txt -e ".[run]"',
        "python run.py +experiment=scripted",
        "choose another executor: scripted",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("disabled") == 1


def test_the_run_it_names_works(base: Base, tmp_path: Path) -> None:
    name = WITHOUT_MODEL.removeprefix("python run.py ")
    done = base(name, "workload.num_requests=3", "hydra.run.dir=out")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ServeLab run\n")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["completed"] == 3
    (left_out,) = (line for line in done.stdout.splitlines() if line.startswith("plots: left out"))
    assert left_out.endswith("(pip install matplotlib)")
    assert "Left out: matplotlib" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_plugins_shows_why(base: Base) -> None:
    listed = json.loads(base("plugins", "--json").stdout)["plugins"]
    disabled = {(p["kind"], p["name"]): p["disabled"] for p in listed if p["disabled"]}
    assert disabled == {
        ("executor", "torch"): "needs torch, numpy, safetensors, tokenizers, jinja2, not installed"
    }
    (row,) = (line for line in base("plugins", "executor").stdout.splitlines() if "  torch " in line)
    assert "disabled: needs torch" in row


def test_halves_without_torch_import(base: Base, repository: Path) -> None:
    """The kernel's description and everything that reads checkpoints."""
    code = (
        f"import sys; sys.path.insert(0, {str(repository / 'src')!r})\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
        "import pkgutil, importlib\n"
        "import servelab.plugins.executors.checkpoint as c, servelab.plugins.kernels.sdpa.backend\n"
        "names = [m.name for m in pkgutil.iter_modules(c.__path__)]\n"
        "for name in names: importlib.import_module(f'{c.__name__}.{name}')\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize(
    ("kind", "provider", "imports", "probe", "do"),
    [
        ("executor", "servelab", ("no_lib",), None, f"in the checkout: {INSTALL}; or run without a model: "),
        ("executor", "python", ("no_lib",), None, "run without a model: "),
        ("executor", "servelab", (), "nowhere:probe", "choose another executor: "),
        ("scheduler", "servelab", ("no_lib",), None, f"in the checkout: {INSTALL}; or choose another "),
        ("scheduler", "python", ("no_lib",), None, "choose another scheduler: "),
        ("grammar", "python", ("no_lib",), None, "choose no grammar"),
    ],
)
def test_only_what_can_help_is_advised(
    kind: str, provider: str, imports: tuple[str, ...], probe: str | None, do: str
) -> None:
    registry = Registry.load()
    registry.add(kind, PluginSpec(name="x", factory="a:b", imports=imports, probe=probe), provider=provider)
    with pytest.raises(PluginLoadError, match="is disabled") as error:
        registry.resolve(kind, "x", "factory")
    assert error.value.do.startswith(do)
    assert " x" not in error.value.do.partition("choose another")[2]

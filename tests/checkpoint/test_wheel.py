"""source: wheel, from an index on this machine: download, check, convert, and what can go wrong."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from servelab.core.config import ModelConfig
from servelab.core.errors import ConfigError
from servelab.core.user_cache import cache_root
from servelab.plugins.executors.checkpoint import convert as convert_module
from servelab.plugins.executors.checkpoint import pip_download
from servelab.plugins.executors.checkpoint.cache import made_once
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.find import find
from servelab.plugins.executors.checkpoint.gguf_tensors import dequantized
from servelab.plugins.executors.torch.weights import tensors

SRC = Path(__file__).resolve().parents[2] / "src"


def _changed(model: ModelConfig, **fields: Any) -> ModelConfig:
    return model.model_copy(update=fields)


def _left() -> list[str]:
    """What is in the cache beside locks."""
    models = cache_root() / "models"
    return sorted(p.name for p in models.iterdir() if p.suffix != ".lock") if models.is_dir() else []


def test_a_wheel_becomes_a_complete_folder(
    index: ModelConfig, tiny_gguf: Path, local: Callable[..., ModelConfig]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = find(index)
    expected = dict(tensors(find(local(tiny_gguf))))
    found = dict(tensors(checkpoint))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    folder = Path(checkpoint.provenance["path"])
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(folder).encode("a fox, 12") == checkpoint.tokenizer().encode(
        "a fox, 12"
    )
    assert _left() == [folder.name]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_provenance_says_where_it_is_from(index: ModelConfig) -> None:
    provenance = find(index).provenance
    assert provenance["source"] == "wheel"
    assert provenance["wheel"] == "tiny-model==1.0"
    assert provenance["wheel_sha256"] == index.wheel_sha256
    assert provenance["wheel_member"] == "tiny_model/model.gguf"
    assert provenance["quantization"] == "Q4_1 (dequantized)"
    stored = json.loads((Path(provenance["path"]) / "provenance.json").read_text())
    assert stored["quantization"] == "Q4_1"


def test_the_second_time_nothing_is_downloaded(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(index)
    monkeypatch.setattr(pip_download, "subprocess", None)
    assert find(index).files == first.files


def test_the_only_gguf_of_a_wheel_needs_no_name(index: ModelConfig) -> None:
    assert find(_changed(index, wheel_member=None)).provenance["wheel_member"] == "model.gguf"


def test_a_wrong_hash_is_refused_and_nothing_stays(index: ModelConfig) -> None:
    with pytest.raises(ModelError, match="it is deleted") as caught:
        find(_changed(index, wheel_sha256="0" * 64))
    assert index.wheel_sha256 in caught.value.why
    assert "0" * 64 in caught.value.why
    assert _left() == []


def test_a_hash_may_be_in_capitals(index: ModelConfig) -> None:
    assert index.wheel_sha256
    first = find(_changed(index, wheel_sha256=index.wheel_sha256.upper()))
    assert find(index).files == first.files


def test_a_missing_member_lists_those_there_are(index: ModelConfig) -> None:
    find(index)  # what is cached of one member is not taken for another
    cached = _left()
    with pytest.raises(ConfigError, match=r"GGUF files it holds: tiny_model/model.gguf"):
        find(_changed(index, wheel_member="tiny_model/other.gguf"))
    assert _left() == cached


@pytest.mark.parametrize(
    "wheel", ["tiny-model", "tiny-model>=1.0", "--index-url=http://x", "a==1 b==2", "./a==1"]
)
def test_only_a_pinned_wheel_is_downloaded(index: ModelConfig, wheel: str) -> None:
    with pytest.raises(ConfigError, match="must pin one version"):
        find(_changed(index, wheel=wheel))


@pytest.mark.parametrize("sha256", [None, "", "abc", "g" * 64])
def test_an_unchecked_wheel_is_not_downloaded(index: ModelConfig, sha256: str | None) -> None:
    with pytest.raises(ConfigError, match="must be 64 hexadecimal digits"):
        find(_changed(index, wheel_sha256=sha256))


def _three_remedies(error: ModelError) -> bool:
    return (
        "model.source=hub" in error.do
        and "model=local model.path=" in error.do
        and len(error.do.split(";")) >= 3
    )


def test_an_index_without_the_wheel(index: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"could not be downloaded(.|\n)*No matching distribution") as caught:
        find(_changed(index, wheel="tiny-model==2.0"))
    assert _three_remedies(caught.value)
    assert _left() == []


def test_no_network_ends_within_bounds(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        find(index)
    assert time.monotonic() - start < 60
    assert _three_remedies(caught.value)
    assert _left() == []


def test_a_download_that_never_ends_is_given_up(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_download, "SECONDS", 0.01)
    with pytest.raises(ModelError, match=r"longer than 0.01 seconds") as caught:
        find(index)
    assert _three_remedies(caught.value)
    assert _left() == []


def test_a_python_without_pip_is_told_so(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(ModelError, match="pip is not installed") as caught:
        find(index)
    assert "ensurepip" in caught.value.do
    assert _three_remedies(caught.value)


def test_a_full_disk_while_converting_says_how_much_is_needed(
    index: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filling(*args: Any) -> Any:
        for count, item in enumerate(dequantized(*args)):
            if count == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "dequantized", filling)
        with pytest.raises(ModelError, match="disk is full; nothing was left behind") as caught:
            find(index)
    assert _left() == []
    assert "SERVELAB_CACHE" in caught.value.do
    needed = int(caught.value.why.split(" bytes")[0].replace(",", ""))
    folder = Path(find(index).provenance["path"])
    actual = sum((folder / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    assert needed == actual


def test_a_full_disk_while_pip_downloads(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 2, stderr="ERROR: [Errno 28] No space left on device\n")

    monkeypatch.setattr(subprocess, "run", full)
    with pytest.raises(ModelError, match="disk is full") as caught:
        find(index)
    assert "bytes are free" in caught.value.why
    assert _left() == []


def test_an_interrupt_leaves_nothing(index: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> Any:
        yield next(dequantized(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "dequantized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find(index)
    assert _left() == []


def test_a_cache_that_cannot_be_written(
    index: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be written to the cache") as caught:
        find(index)
    assert "SERVELAB_CACHE" in caught.value.do


def test_what_a_killed_process_left_is_cleared(index: ModelConfig) -> None:
    name = Path(find(index).provenance["path"]).name
    stale = cache_root() / "models" / f".{name}.dead.tmp"
    (stale / "model").mkdir(parents=True)
    for path in (cache_root() / "models" / name).iterdir():
        path.unlink()
    (cache_root() / "models" / name).rmdir()
    find(index)
    assert _left() == [name]


def test_a_damaged_folder_says_how_to_make_it_again(index: ModelConfig) -> None:
    folder = Path(find(index).provenance["path"])
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not a whole safetensors file") as caught:
        find(index)
    assert f"delete {folder}" in caught.value.do


def _make_slowly(name: str, log: Path) -> None:
    def make(scratch: Path, folder: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        (folder / "content").write_text("whole")

    assert (made_once(name, make) / "content").read_text() == "whole"


def test_processes_at_once_make_one_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = Path(importlib.util.find_spec("servelab").origin).parents[1]  # type: ignore[union-attr, arg-type]
    command = [sys.executable, "-c", MAKE_SLOWLY, str(source), str(log)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert log.read_text() == "made\n"
    assert _left() == ["shared"]


MAKE_SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv[1])
from servelab.plugins.executors.checkpoint.cache import made_once

def make(scratch, folder):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    (folder / "content").write_text("whole")

assert (made_once("shared", make) / "content").read_text() == "whole"
"""


def test_without_locks_the_loser_takes_the_winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from servelab.plugins.executors.checkpoint import cache

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)

    def make(scratch: Path, folder: Path) -> None:
        winner = cache_root() / "models" / "shared"
        winner.mkdir()
        (winner / "content").write_text("the winner's")
        (folder / "content").write_text("the loser's")

    assert (made_once("shared", make) / "content").read_text() == "the winner's"
    assert _left() == ["shared"]


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from servelab.plugins.executors.checkpoint.cache import made_once\n"
        "def make(scratch, folder):\n"
        "    print('in', flush=True)\n"
        "    time.sleep(100)\n"
        "made_once('shared', make)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"in\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    _make_slowly("shared", tmp_path / "log")
    assert _left() == ["shared"]


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/a/b", "/c", "/a/b"),
        ("", "/c", "/c/servelab"),
        ("", "relative", "/home/u/.cache/servelab"),
        ("", "", "/home/u/.cache/servelab"),
        ("~/x", "", "/home/u/x"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, xdg: str, expected: str) -> None:
    monkeypatch.setenv("SERVELAB_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/u")
    assert cache_root() == Path(expected)

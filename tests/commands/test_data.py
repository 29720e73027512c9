"""``servelab data`` against a real server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from servelab.core.api import Context, Limits, ModelFacts, ServeLabError
from servelab.core.context import seeded
from servelab.core.registry import Registry
from servelab.plugins.commands.data.catalog import CATALOG
from servelab.plugins.commands.data.command import main
from servelab.plugins.commands.data.download import DataError, blob_name, download
from servelab.plugins.workloads.azure import Azure, AzureConfig

TRACE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:00:00.0,5,6\n"
LONG = b"x" * 3_000_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"

BODIES = {
    "/trace.csv": TRACE,
    "/pointer.csv": POINTER,
    "/page.csv": b"\n<!doctype html><title>moved</title>",
    "/empty.csv": b"",
    "/cut.csv": LONG,
    "/slow.csv": LONG,
}


class Handler(BaseHTTPRequestHandler):
    """Files, and the ways in which they go wrong."""

    halt = threading.Event()
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].rpartition("publisher.test")[2]
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if path == "/there.csv":
            self.send_response(302)
            self.send_header("Location", "/trace.csv")
            self.end_headers()
            return
        if path not in BODIES:
            self.send_error(404, "Not Found")
            return
        body = BODIES[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if path == "/cut.csv":
            self.wfile.write(body[:1_000_000])
        elif path == "/slow.csv":
            self.wfile.write(body[:200_000])
            self.wfile.flush()
            self.halt.wait()
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    Handler.halt.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        Handler.halt.set()
        made.shutdown()


@pytest.fixture
def url(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return lambda name: f"http://127.0.0.1:{server.server_address[1]}/{name}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


Url = Callable[[str], str]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- one file ----------------------------------------------------------------------------------------------


def test_a_whole_file(url: Url, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(TRACE).hexdigest()
    target = tmp_path / "to" / "trace.csv"
    assert download(url("trace.csv"), target) == sha256
    assert target.read_bytes() == TRACE
    assert download(url("there.csv"), target, sha256=sha256) == sha256  # redirected
    # as `git hash-object` says it
    blob = hashlib.sha1(b"blob 66\0" + TRACE).hexdigest()
    assert len(TRACE) == 66 and blob_name(target) == blob
    download(url("trace.csv"), target, git_blob=blob)
    assert left(tmp_path / "to") == ["trace.csv"]


BROKEN = {
    "missing.csv": ("does not give the file", "404 Not Found"),
    "cut.csv": ("broke off", "bytes"),
    "pointer.csv": ("Git LFS pointer", "git-lfs"),
    "page.csv": ("has no trace", "web page"),
    "empty.csv": ("has no trace", "empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_goes_wrong_leaves_nothing(url: Url, tmp_path: Path, name: str) -> None:
    what, why = BROKEN[name]
    target = tmp_path / "to" / name
    with pytest.raises(DataError, match=what) as raised:
        download(url(name), target)
    assert why in raised.value.why and raised.value.where == url(name) and raised.value.do
    assert left(tmp_path / "to") == []
    target.write_bytes(b"older")
    with pytest.raises(DataError):
        download(url(name), target)
    assert target.read_bytes() == b"older" and left(tmp_path / "to") == [name]


@pytest.mark.parametrize("hashes", [{"sha256": "0" * 64}, {"git_blob": "0" * 40}])
def test_another_file_than_the_published_one_is_not_kept(
    url: Url, tmp_path: Path, hashes: dict[str, str]
) -> None:
    with pytest.raises(DataError, match="not the file that was asked for") as raised:
        download(url("trace.csv"), tmp_path / "to" / "trace.csv", **hashes)
    assert "000000" in raised.value.why
    assert left(tmp_path / "to") == []


def test_nobody_there(tmp_path: Path, url: Url) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_address[1]
    with pytest.raises(DataError, match="cannot be reached") as raised:
        download(f"http://127.0.0.1:{port}/trace.csv", tmp_path / "trace.csv")
    assert "refused" in raised.value.why and "HTTPS_PROXY" in raised.value.do
    with pytest.raises(DataError, match="not one of the web"):
        download("file:///etc/passwd", tmp_path / "trace.csv")


def test_the_proxy_of_the_environment_is_asked(
    server: ThreadingHTTPServer, tmp_path: Path, url: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", url("").rstrip("/"))
    monkeypatch.delenv("no_proxy", raising=False)
    download("http://publisher.test/trace.csv", tmp_path / "trace.csv")
    assert server.asked == ["http://publisher.test/trace.csv"]  # type: ignore[attr-defined]


def test_a_folder_that_cannot_be_made(url: Url, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as raised:
        download(url("trace.csv"), tmp_path / "file" / "trace.csv")
    assert "--to DIR" in raised.value.do


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130)])
def test_ctrl_c_leaves_nothing_half(url: Url, cache: Path, sent: signal.Signals, status: int) -> None:
    program = "import sys; from servelab.core.cli import main; main()"
    command = [sys.executable, "-c", program, "data", "fetch", "azure_conv", "--url", url("slow.csv")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not any(p.stat().st_size for p in (cache / "data").glob(".*")):
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.01)
        child.send_signal(sent)
        _, said = child.communicate()
    assert child.returncode == status, said
    assert b"interrupted" in said
    assert left(cache / "data") == []


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, url: Url) -> None:
    """Our short trace in the place of the real one."""
    from dataclasses import replace

    one = replace(CATALOG["azure_conv"], url=url("trace.csv"), sha256=hashlib.sha256(TRACE).hexdigest())
    monkeypatch.setitem(CATALOG, "azure_conv", one)


@pytest.mark.usefixtures("published")
def test_fetch_then_replay_by_name(
    cache: Path, server: ThreadingHTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fetch", "azure_conv"])
    said = capsys.readouterr().out
    assert "its hash is the one we know" in said and "workload.path=azure_conv" in said
    assert left(cache / "data") == ["azure_conv.csv", "azure_conv.csv.json"]
    about = json.loads((cache / "data" / "azure_conv.csv.json").read_text())
    assert about["licence"] == "CC-BY-4.0" and about["bytes"] == len(TRACE)
    model = ModelFacts(
        name="t",
        layers=1,
        hidden=8,
        heads=1,
        kv_heads=1,
        head_dim=8,
        ffn=8,
        vocab=99,
        max_position=64,
    )
    limits = Limits(max_batch_tokens=64, max_batch_requests=8, max_model_len=64)
    context = Context(
        kind="workload",
        name="azure",
        rng=seeded(0, "workload", "azure"),
        model=model,
        hardware=None,
        limits=limits,
    )
    assert Azure(AzureConfig(path="azure_conv"), context).describe()["requests"] == 1

    main(["fetch", "azure_conv"])
    assert "here already" in capsys.readouterr().out
    assert len(server.asked) == 1  # type: ignore[attr-defined]
    main(["fetch", "azure_conv", "--again"])
    assert len(server.asked) == 2  # type: ignore[attr-defined]


def test_what_has_no_known_hash_is_noted(
    url: Url, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fetch", "burstgpt_2", "--url", url("trace.csv"), "--to", str(tmp_path / "mine")])
    said = capsys.readouterr().out
    sha256 = hashlib.sha256(TRACE).hexdigest()
    assert sha256 in said and f"workload.path={tmp_path / 'mine' / 'burstgpt_2.csv'}" in said
    assert json.loads((tmp_path / "mine" / "burstgpt_2.csv.json").read_text())["sha256"] == sha256


@pytest.mark.usefixtures("published")
def test_list(capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    main(["list"])
    said = capsys.readouterr().out
    assert all(name in said for name in CATALOG)
    assert "CC-BY-4.0" in said and "fetched" not in said
    main(["fetch", "azure_conv"])
    capsys.readouterr()
    main(["list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("fetched")] == [
        "azure_conv"
    ]
    main(["list", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["data"]["azure_conv"]["path"] == str(cache / "data" / "azure_conv.csv")
    assert told["data"]["burstgpt_1"]["path"] is None


def test_an_unknown_name() -> None:
    with pytest.raises(ServeLabError, match="did you mean 'azure_conv'"):
        main(["fetch", "azure_con"])


def test_every_data_set_names_a_workload_and_a_secure_address() -> None:
    names = set(Registry.load().names("workload"))
    for name, one in CATALOG.items():
        assert name == one.name and one.workload in names
        assert one.url.startswith("https://") and one.licence and one.publisher


def test_our_copies_are_the_published_files(data: Path) -> None:
    for name, path in {
        "azure_conv": "azure_llm_2023/AzureLLMInferenceTrace_conv.csv",
        "mooncake_synthetic": "mooncake/synthetic_trace.jsonl",
    }.items():
        assert hashlib.sha256((data / path).read_bytes()).hexdigest() == CATALOG[name].sha256

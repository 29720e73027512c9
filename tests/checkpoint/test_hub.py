"""source: hub, from a server on this machine that speaks what a download needs of its protocol."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub", reason="model.source=hub downloads with it")

SRC = Path(__file__).resolve().parents[2] / "src"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import json, sys
from servelab.core.config import ModelConfig
from servelab.core.errors import ServeLabError
from servelab.plugins.executors.checkpoint import find
model = ModelConfig(name="m", source="hub", **json.loads(sys.argv[2]))
try:
    if sys.argv[1] == "describe":
        print(json.dumps(find.describe(model)))
    else:
        checkpoint = find.find(model)
        folder = checkpoint.files[0].parent
        print(json.dumps([dict(checkpoint.provenance), sorted(p.name for p in folder.iterdir())]))
except ServeLabError as exc:
    print(json.dumps({"type": type(exc).__name__, "text": str(exc), "do": exc.do}))
"""


class _Hub(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(("/api/models/gated/", "/gated/")):
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif "/tiny/" not in path + "/":
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        elif "/no-such-branch" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "No revision"})
        elif "/resolve/" in path:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            self.asked.append(name)
            body = self.files[name]
            self._answer(200, body, {"ETag": f'"{sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
            self._answer(200, json.dumps(tree).encode(), {})
        else:
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            self._answer(200, body, {})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_folder: Path) -> Iterator[Any]:
    """Call it with ``find`` or ``describe`` and fields of the model section."""

    class Handler(_Hub):
        files: ClassVar[dict[str, bytes]] = {p.name: p.read_bytes() for p in tiny_folder.iterdir()}
        asked: ClassVar[list[str]] = []

    Handler.files |= {
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"code",
        "consolidated.safetensors": b"the same weights again",
        "model-old/model.safetensors": b"and again",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    base = {
        k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")
    }

    def call(what: str, *, code: str = CODE, **fields: str) -> Any:
        environ = {
            **base,
            "PYTHONPATH": str(SRC),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, what, json.dumps(fields)],
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    call.asked = Handler.asked  # type: ignore[attr-defined]
    call.stop = lambda: (server.shutdown(), server.server_close())  # type: ignore[attr-defined]
    yield call
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repository_is_downloaded_without_pickles_code_or_copies(hub: Any) -> None:
    provenance, names = hub("find", repo="me/tiny")
    assert provenance == {"source": "hub", "repo": "me/tiny", "commit": COMMIT, "quantization": "none"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert set(hub.asked) == set(names)
    assert not {"pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "model-old"} & set(names)


def test_describing_downloads_the_configuration_only(hub: Any) -> None:
    assert hub("describe", repo="me/tiny")["layers"] == 2
    assert set(hub.asked) == {"config.json"}


def test_what_was_downloaded_is_found_offline(hub: Any) -> None:
    first = hub("find", repo="me/tiny")
    hub.stop()
    assert hub("find", repo="me/tiny") == first
    assert hub("describe", repo="me/tiny")["layers"] == 2


FULL_DISK = """
import errno, huggingface_hub
def full(*args, local_files_only=False, real=huggingface_hub.snapshot_download, **kwargs):
    if local_files_only:
        return real(*args, local_files_only=True, **kwargs)
    raise OSError(errno.ENOSPC, "No space left on device")
huggingface_hub.snapshot_download = full
"""


def test_a_full_disk_is_told_whatever_is_cached(hub: Any) -> None:
    hub("find", repo="me/tiny")
    error = hub("find", repo="me/tiny", code=FULL_DISK + CODE)
    assert "the disk is too full for me/tiny" in error["text"]


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors", None])
def test_a_part_of_a_snapshot_is_not_taken_for_it(hub: Any, tmp_path: Path, lost: str | None) -> None:
    hub("find" if lost else "describe", repo="me/tiny")
    repository = tmp_path / "hf/hub/models--me--tiny"
    if lost:
        (repository / "snapshots" / COMMIT / lost).unlink()
    for listing in repository.glob("trees"):  # older huggingface_hub keeps none
        shutil.rmtree(listing)
    hub.stop()
    error = hub("find", repo="me/tiny")
    assert "me/tiny could not be downloaded" in error["text"]
    assert hub("describe", repo="me/tiny")["layers"] == 2


def test_a_cache_that_cannot_be_written_does_not_stop_a_download(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert hub("find", repo="me/tiny")[0]["commit"] == COMMIT


@pytest.mark.parametrize(
    ("fields", "message", "remedy"),
    [
        ({"repo": "me/absent"}, "no repository 'me/absent'", "correct model.repo"),
        ({"repo": "gated/tiny"}, "gated/tiny is gated", "accept its licence"),
        (
            {"repo": "me/tiny", "revision": "no-such-branch"},
            "has no revision 'no-such-branch'",
            "model.revision",
        ),
        ({"repo": "a/b/c"}, "no repository 'a/b/c'", "OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses_is_told(hub: Any, fields: dict[str, str], message: str, remedy: str) -> None:
    error = hub("find", **fields)
    assert error["type"] == "ModelError"
    assert message in error["text"]
    assert remedy in error["do"]
    assert len(error["do"].split("; ")) >= 3


def test_without_network_three_ways_out(hub: Any) -> None:
    hub.stop()
    error = hub("find", repo="me/tiny")
    assert "could not be downloaded" in error["text"]
    assert "model=local" in error["do"]
    assert len(error["do"].split("; ")) >= 3


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    code = CODE.replace("import find\n", "import find, hub\nhub._CONNECT_SECONDS = 1.0\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = subprocess.run(
            [sys.executable, "-c", code, "find", json.dumps({"repo": "me/tiny"})],
            env={
                **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
                "PYTHONPATH": str(SRC),
                "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "HF_HOME": str(tmp_path / "hf"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "could not be downloaded" in json.loads(done.stdout)["text"]

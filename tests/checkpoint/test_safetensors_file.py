"""Headers of safetensors files: what is whole passes, what is cut or bent is refused before loading."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.safetensors_file import Entry, header_bytes, read_header

Header = dict[str, dict[str, object]]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones((4,), np.float16)}, path, {"format": "pt"})
    return path


def test_header_is_that_of_the_library(whole: Path) -> None:
    assert read_header(whole) == {"a": Entry("F32", (2, 3)), "b": Entry("F16", (4,))}


def test_every_cut_is_refused(whole: Path) -> None:
    data = whole.read_bytes()
    for length in range(len(data)):
        whole.write_bytes(data[:length])
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            read_header(whole)
    whole.write_bytes(data + b"\0")
    with pytest.raises(ModelError, match="the file has"):
        read_header(whole)


def _shift(header: Header) -> None:
    header["b"]["data_offsets"] = [25, 33]


def _overlap(header: Header) -> None:
    header["b"]["data_offsets"] = [16, 24]


def _gap(header: Header) -> None:
    header["a"].update(shape=[1, 3], data_offsets=[0, 12])


def _reshape(header: Header) -> None:
    header["a"]["shape"] = [2, 2]


def _negative(header: Header) -> None:
    header["a"]["shape"] = [-2, -3]


def _no_dtype(header: Header) -> None:
    del header["a"]["dtype"]


@pytest.mark.parametrize("bend", [_shift, _overlap, _gap, _reshape, _negative, _no_dtype])
def test_headers_that_do_not_fit_are_refused(whole: Path, bend: Callable[[Header], None]) -> None:
    data = whole.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    bend(header)
    text = json.dumps(header).encode()
    whole.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_header(whole)


@pytest.mark.parametrize("text", [b"not json", b"[1, 2]", b"\xff\xfe"])
def test_headers_that_are_no_json_object_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelError, match="JSON"):
        read_header(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        read_header(path)


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.float32)
    header = header_bytes([("a", (2, 3)), ("b", (3,))], {"format": "pt"})
    assert len(header) % 8 == 0  # readers map the data
    path.write_bytes(header + a.tobytes() + b.tobytes())
    assert read_header(path) == {"a": Entry("F32", (2, 3)), "b": Entry("F32", (3,))}
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("a"), a)
        assert np.array_equal(file.get_tensor("b"), b)

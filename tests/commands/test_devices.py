"""``servelab devices``: the list, and a profile of the machine the test runs on."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep

import pytest
import yaml

from servelab.core.config import HardwareConfig
from servelab.core.errors import ConfigError, ServeLabError
from servelab.plugins.commands.devices import command

Out = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def test_the_list_names_every_device(capsys: Out) -> None:
    command.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    files = sorted(path.stem for path in (ROOT / "configs" / "hardware").glob("*.yaml"))
    assert [line.split()[0] for line in lines[1:]] == files
    a100 = next(line.split() for line in lines if line.startswith("a100_80g"))
    assert a100[1:] == ["312", "2,039", "79.15", "ServeLab"]


@needs_torch
def test_this_machine_is_a_profile_with_sources(capsys: Out) -> None:
    command.main(["measure", "--name", "mine", "--device", "cpu", "--seconds", "0.05", "--dtype", "float32"])
    stated = yaml.safe_load(capsys.readouterr().out)
    one = HardwareConfig.model_validate(stated)
    assert one.name == "mine"
    assert set(stated) - {"name", "sources"} == set(one.sources)
    assert one.flops is not None
    assert one.memory_bytes_per_s is not None
    assert one.memory_bytes is not None
    assert 1e8 < one.flops < 1e15
    assert 1e8 < one.memory_bytes_per_s < 1e13
    assert one.memory_bytes > 2**28
    assert one.mfu == one.mbu == 1
    assert one.op_ns
    assert "float32 on" in one.sources["flops"]
    assert all("measured with torch" in text for text in one.sources.values())


@needs_torch
def test_a_call_is_timed_and_the_device_awaited() -> None:
    from servelab.plugins.executors.torch.measure import fastest

    assert 0 < fastest(lambda: None, 0.01) < 1e-4  # the time of one call, not of a block
    waits: list[float] = []
    assert fastest(lambda: None, 0.01, lambda: sleep(0.01) or waits.append(0.01)) > 0.005  # one call a block
    assert len(waits) > 1
    began = monotonic()
    assert fastest(lambda: sleep(0.002), 0.05) >= 0.002
    assert monotonic() - began > 0.05


@needs_torch
def test_what_cannot_be_measured_is_told() -> None:
    import torch

    with pytest.raises(ConfigError, match="above zero"):
        command.profile("x", "cpu", "float32", 0.0)
    if not torch.cuda.is_available():
        with pytest.raises(ServeLabError, match="no CUDA device"):
            command.profile("x", "cuda", "float32", 1.0)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ServeLabError, match="needs torch") as caught:
        command.profile("x", "auto", "float32", 1.0)
    assert "add_a_device" in str(caught.value.do)


def test_the_list_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from servelab.plugins.commands.devices import command\n"
        "command.main(['list'])\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"

"""``servelab devices list`` and ``servelab devices measure``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import yaml

from servelab.core.api import ConfigError, ServeLabError
from servelab.core.errors import INSTALL
from servelab.core.registry import Registry
from servelab.plugins.commands.doctor.configs import OURS, yaml_files

MEASURES = "servelab.plugins.executors.torch.measure"
"""Where torch is known; imported only to measure."""
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ServeLabError: torch is not installed, or the device asked for is not there.
    """
    parser = argparse.ArgumentParser(prog="servelab devices", description="Profiles of devices.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the devices that hardware=NAME can choose")
    one = commands.add_parser("measure", help="a profile of this machine, as YAML")
    one.add_argument("--name", default="this_machine", help="its name (this_machine)")
    one.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there")
    one.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of matrix products (bfloat16)")
    one.add_argument("--seconds", type=float, default=2.0, help="for each of the figures (2)")
    chosen = parser.parse_args(argv)
    if chosen.command == "list":
        sys.stdout.write("\n".join(_table(_listed(Registry.load()))) + "\n")
    else:
        sys.stdout.write(profile(chosen.name, chosen.device, chosen.dtype, chosen.seconds))


def profile(name: str, device: str, dtype: str, seconds: float) -> str:
    """YAML of ``configs/hardware`` for this machine.

    Raises:
        ServeLabError: torch is not installed, or the device asked for is not there.
        ConfigError: the time to measure is not above zero.
    """
    if not seconds > 0:
        raise ConfigError(
            "--seconds must be above zero", where="servelab devices measure", do="leave it out: 2"
        )
    if find_spec("torch") is None:
        raise ServeLabError(
            "measuring needs torch",
            where="servelab devices measure",
            do=f"{INSTALL}   (in the checkout), or write the profile by hand: docs/howto/add_a_device.md",
        )
    stated = {"name": name, **import_module(MEASURES).profile(device, dtype, seconds)}
    return yaml.safe_dump(stated, sort_keys=False, width=110, allow_unicode=True)


def _listed(registry: Registry) -> Iterator[tuple[str, dict[str, Any]]]:
    """Profiles of ServeLab and of installed packages, with who brings them."""
    packages = [("ServeLab", OURS)]
    packages += [(one.name, one.package) for one in registry.config_packages if one.problem is None]
    for who, package in packages:
        for path, file in yaml_files(files(package)).items():
            if path.startswith("hardware/"):
                yield who, yaml.safe_load(file.read_text(encoding="utf-8"))


def _table(devices: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield f"{'hardware=':<16}{'TFLOP/s':>9}{'GB/s':>9}{'GiB':>9}  from"
    for who, one in devices:
        figures = (("flops", 1e12), ("memory_bytes_per_s", 1e9), ("memory_bytes", 2**30))
        cells = [f"{one[key] / unit:,.4g}" if one.get(key) else "-" for key, unit in figures]
        yield f"{one.get('name', '?'):<16}" + "".join(f"{cell:>9}" for cell in cells) + f"  {who}"

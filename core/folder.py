"""The folder of a run explains itself: what it was told and what it ran on, before anything runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from servelab.core.config import RunConfig
from servelab.core.environment import environment
from servelab.core.errors import ServeLabError
from servelab.core.run_folder import BASES, check_unused, write_file

CONFIG_FILE = "resolved_config.yaml"
ENV_FILE = "env.json"
ENV_SCHEMA = 1
"""Version of ``env.json``; raised when a key changes meaning or goes away."""

HEADER = """\
# Every effective setting of this run, defaults included. Again, in a new folder:
#   python run.py --config-dir FOLDER_OF_THIS_FILE --config-name resolved_config
# and with other values: ... seed=1 scheduler.max_num_seqs=8
"""
DEFAULTS = ["config", "_self_"]
"""Hydra's own settings come from ``configs/config.yaml``; the sections below stand over it."""


def check_place(argv: Sequence[str]) -> None:
    """Refuse a place for the run's folder where none can be made, before Hydra tries and shows a traceback.

    Args:
        argv: Hydra's arguments.

    Raises:
        ServeLabError: a file is in the way, or the folder may not be written.
    """
    sweep = bool({"-m", "--multirun"} & set(argv))
    key, stated = ("hydra.sweep.dir", BASES[1]) if sweep else ("hydra.run.dir", BASES[0])
    for arg in argv:
        name, _, value = arg.partition("=")
        stated = value.strip("'\"") if name.lstrip("+") == key else stated
    known, reference, _ = stated.partition("${")
    folder = Path(known)
    if reference and not known.endswith("/"):
        folder = folder.parent  # the last name goes on with what Hydra fills in
    there = next((place for place in (folder, *folder.parents) if os.path.exists(place)), Path())
    try:
        with TemporaryDirectory(dir=there):
            return
    except OSError as error:
        raise ServeLabError(
            "the run's folder cannot be made",
            where=f"{key}={stated}",
            why=f"{there.absolute()}: {error.strerror or error}",
            do=f"start in a folder that can be written, or name another: {key}=FOLDER",
        ) from error


def begin(folder: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Write ``resolved_config.yaml`` and ``env.json``, so that a run that is killed leaves them too.

    Args:
        folder: of the run; made if it is not there.
        config: as composed: with what was read from the model's files and from memory.
        overrides: what the command line stated, for ``env.json``.

    Raises:
        ConfigError: the folder holds a run already.
        ServeLabError: a file cannot be written.
    """
    texts = {CONFIG_FILE: config_text(config), ENV_FILE: env_text(overrides)}
    check_unused(folder, "a run", texts)
    for name, text in texts.items():
        write_file(folder / name, text)


def config_text(config: RunConfig) -> str:
    """The settings as a primary configuration of Hydra."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = _escaped(config.settings())
    return HEADER + OmegaConf.to_yaml(OmegaConf.create({"defaults": DEFAULTS, **settings}))


def _escaped(value: Any) -> Any:
    """Text with ``${`` is text, not a reference to another setting."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def env_text(overrides: Sequence[str]) -> str:
    """What the run ran on and what it was told, as JSON."""
    facts = {"schema_version": ENV_SCHEMA, **environment(), "overrides": list(overrides)}
    return json.dumps(facts, indent=2) + "\n"

"""The command line, shared by ``servelab`` and ``run.py``.

Anything that is not one of our few commands is Hydra's. Imports stay inside functions, so that ``--help``,
tab completion and the listing load neither plugins nor each other's libraries.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

TRACEBACK_ENV = "SERVELAB_TRACEBACK"
DEPENDENCIES = frozenset({"hydra", "omegaconf", "pluggy", "pydantic"})

log = logging.getLogger("servelab")


def main() -> None:
    """Entry point; ends the process with 0, 1 (an error) or 130 (Ctrl-C)."""
    from servelab.core.errors import ServeLabError

    try:
        args = _take_blocks(sys.argv[1:])
        if args[:1] == ["--version"]:
            from servelab.core import __version__

            print(f"servelab {__version__}")
        elif args[:1] not in (["plugins"], ["show"]) and {"--help", "-h"} & set(args):
            from servelab.core.help import show_help

            show_help()
        elif args[:1] in (["plugins"], ["show"]):
            from servelab.core.listing import command

            command(args)
        else:
            _hydra(args)
    except KeyboardInterrupt:
        sys.stderr.write("servelab: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `servelab plugins | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as exc:
        if exc.name not in DEPENDENCIES or _wants_traceback():
            raise
        sys.stderr.write(
            f"servelab: {exc.name} is not installed for {sys.executable}\n"
            '  do:    pip install -c constraints.txt -e ".[run]"   (in the checkout)\n'
        )
        sys.exit(1)
    except ServeLabError as exc:
        if _wants_traceback():
            raise
        sys.stderr.write(f"servelab: {exc}\n")
        sys.exit(1)


def _hydra(args: Sequence[str]) -> None:
    import hydra
    from hydra.errors import CompactHydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from servelab.core.errors import ServeLabError
    from servelab.core.overrides import check_choices, normalize
    from servelab.core.searchpath import install

    sys.argv[1:] = check_choices(normalize(args))
    install()
    if _wants_traceback():
        os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path="pkg://servelab.configs", config_name="config")
    def task(cfg: DictConfig) -> float | None:
        try:
            raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            return run(raw)  # type: ignore[arg-type]
        except (ServeLabError, OmegaConfBaseException) as exc:
            # of this class Hydra prints the message alone and exits with 1, and in a sweep the other jobs
            # still run; SystemExit would end the sweep at the first bad job
            raise CompactHydraException(f"servelab: {_with_notes(exc)}") from (
                exc if _wants_traceback() else None
            )

    task()


def run(raw: dict[str, Any]) -> float | None:
    """One job: check, compose, and do the task.

    Raises:
        ServeLabError: whatever the user should read.
    """
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from servelab.core.compose import compose
    from servelab.core.config import validate
    from servelab.core.registry import Registry

    registry = Registry.load()
    for broken in registry.broken:
        log.warning("plugin package not loaded: %s", broken)
    config = validate(raw, registry)
    composed = compose(config, registry, run_dir=Path(HydraConfig.get().runtime.output_dir))
    return composed.task.run(composed)


def _take_blocks(args: Sequence[str]) -> list[str]:
    """Take ``-p no:NAME`` out, into the environment; Hydra's own ``-p PACKAGE`` stays."""
    from servelab.core.registry import BLOCK_ENV, blocked_names

    rest: list[str] = []
    names = set(blocked_names())
    pending = iter(args)
    for arg in pending:
        if arg.startswith("-pno:"):
            names.add(arg.removeprefix("-pno:"))
            continue
        value = next(pending, None) if arg == "-p" else None
        if value is not None and value.startswith("no:"):
            names.add(value.removeprefix("no:"))
            continue
        rest += [arg] if value is None else [arg, value]
    if names:
        os.environ[BLOCK_ENV] = ",".join(sorted(names))
    return rest


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_ENV, "") not in ("", "0")


def _with_notes(exc: BaseException) -> str:
    return "\n".join([str(exc), *(f"  note:  {note}" for note in getattr(exc, "__notes__", ()))])

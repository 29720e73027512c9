"""The command line, shared by ``servelab`` and ``run.py``.

Anything that does not begin with the name of a command is Hydra's. Imports stay inside functions, so that
``--help``, tab completion and the listing load neither plugins nor each other's libraries.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from servelab.core.interrupt import Interruptions, Terminated, taking
from servelab.core.stdout import flush

if TYPE_CHECKING:
    from omegaconf import DictConfig

TRACEBACK_ENV = "SERVELAB_TRACEBACK"
DEPENDENCIES = frozenset({"hydra", "omegaconf", "pluggy", "pydantic"})
PRINTS = frozenset({"-c", "--cfg", "-i", "--info", "--hydra-help"})
"""Flags with which Hydra prints something and runs nothing."""

log = logging.getLogger("servelab")


def main() -> None:
    """Entry point; ends the process with 0, 1 (an error), 130 (Ctrl-C) or 143 (SIGTERM).

    A reader of stdout that goes away, as in ``servelab plugins | head``, ends the printing and nothing else.
    """
    from servelab.core.errors import INSTALL, ServeLabError

    atexit.register(gc.freeze)  # all memory goes back then: looking for garbage in it would be for nothing
    try:
        _command(sys.argv[1:])
    except KeyboardInterrupt as exc:
        terminated = isinstance(exc, Terminated)
        sys.stderr.write(f"servelab: {'terminated' if terminated else 'interrupted'}\n")
        sys.exit(143 if terminated else 130)
    except BrokenPipeError:
        pass
    except ModuleNotFoundError as exc:
        if exc.name not in DEPENDENCIES or _wants_traceback():
            raise
        sys.stderr.write(
            f"servelab: {exc.name} is not installed for {sys.executable}\n"
            f"  do:    {INSTALL}   (in the checkout)\n"
        )
        sys.exit(1)
    except ServeLabError as exc:
        if _wants_traceback():
            raise
        sys.stderr.write(f"servelab: {exc}\n")
        sys.exit(1)
    finally:
        flush()


def _command(argv: Sequence[str]) -> None:
    from servelab.core.commands import is_command, run_command

    args = _take_blocks(argv)
    if args[:1] == ["--version"]:
        from servelab.core import __version__

        print(f"servelab {__version__}")
    elif is_command(args):
        run_command(args)
    elif {"--help", "-h"} & set(args):
        from servelab.core.help import show_help

        show_help()
    else:
        _hydra(args)


def _hydra(args: Sequence[str]) -> None:
    import hydra

    from servelab.core import sweeper
    from servelab.core.overrides import check_choices, normalize
    from servelab.core.searchpath import install
    from servelab.core.verbosity import take_level

    sys.argv[1:] = check_choices(normalize(take_level(args)))
    if PRINTS & {arg.partition("=")[0] for arg in args}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Hydra would print a traceback
    else:
        from servelab.core.run_folder import check_place

        check_place(sys.argv[1:])
    install()
    sweeper.install()
    if _wants_traceback():
        os.environ["HYDRA_FULL_ERROR"] = "1"
    hydra.main(version_base="1.3", config_path="pkg://servelab.configs", config_name="config")(job)()


def job(cfg: DictConfig) -> float | None:
    """One job of Hydra's, a run of its own or one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from servelab.core.errors import ServeLabError

    try:
        raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        with taking(Interruptions()):
            return run(raw)  # type: ignore[arg-type]
    except (ServeLabError, OmegaConfBaseException, MemoryError) as exc:
        message = f"servelab: {_with_notes(_explained(exc))}"
        if HydraConfig.get().mode is RunMode.RUN and not _wants_traceback():
            sys.exit(message)  # Hydra would put lines of its own around it
        # of this class it prints no traceback, and a sweep goes on
        raise CompactHydraException(message) from (exc if _wants_traceback() else None)


def run(raw: dict[str, Any]) -> float | None:
    """One job: check, compose, and do the task.

    Raises:
        ServeLabError: whatever the user should read.
    """
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from servelab.core.compose import compose
    from servelab.core.config import validate
    from servelab.core.registry import Registry
    from servelab.core.run_folder import begin

    registry = Registry.load()
    for broken in registry.broken:
        log.warning("plugin package not loaded: %s", broken)
    config = validate(raw, registry)
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    composed = compose(config, registry, run_dir=folder, sweep=hydra.mode == RunMode.MULTIRUN)
    try:
        begin(folder, composed.config, hydra.overrides.task)
    except BaseException:
        composed.executor.close()
        raise
    return composed.task.run(composed)


def _take_blocks(args: Sequence[str]) -> list[str]:
    """Take ``-p no:NAME`` out, into the environment; Hydra's own option is ``--package``.

    Raises:
        ConfigError: ``-p`` without ``no:``, or a name that no plugin package has.
    """
    from servelab.core.registry import BLOCK_ENV, blocked_names, check_blocks

    rest: list[str] = []
    names: set[str] = set()
    pending = iter(args)
    for arg in pending:
        if arg.startswith("-p"):
            names.add(_blocked(arg.removeprefix("-p") or next(pending, "")))
        else:
            rest.append(arg)
    if names:
        check_blocks(names)
        os.environ[BLOCK_ENV] = ",".join(sorted(names | blocked_names()))
    return rest


def _blocked(value: str) -> str:
    if value.startswith("no:") and value != "no:":
        return value.removeprefix("no:")
    from servelab.core.errors import ConfigError

    name = value.removeprefix("no:") or "NAME"
    raise ConfigError(
        "-p takes no:NAME, the plugin package to leave out",
        where=f"command line: -p {value}".rstrip(),
        do=f"write -p no:{name} to leave {name} out; Hydra's own option is written --package",
    )


def _explained(exc: Exception) -> Exception:
    """A value that a file leaves to the user, and used-up memory whoever met it, in our words; other errors
    as they are.
    """
    from omegaconf.errors import MissingMandatoryValue

    from servelab.core.errors import ConfigError, ServeLabError

    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, MemoryError):
            return ServeLabError(
                "the process may take no more memory",
                where=str(exc).partition("\n")[0],
                do="ask for fewer requests (workload.num_requests), leave logs out "
                "('observers=[progress,report]'), or free memory (ulimit -v shows a limit)",
            )
        cause = cause.__cause__
    if not isinstance(exc, MissingMandatoryValue):
        return exc
    return ConfigError(f"{exc.full_key} must be stated", do=f"add {exc.full_key}=... to the command line")


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_ENV, "") not in ("", "0")


def _with_notes(exc: BaseException) -> str:
    return "\n".join([str(exc), *(f"  note:  {note}" for note in getattr(exc, "__notes__", ()))])

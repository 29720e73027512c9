"""``-v``, ``-vv`` and ``-q``: how much is logged, in Hydra's own settings."""

from __future__ import annotations

from collections.abc import Sequence

from servelab.core.errors import ConfigError

LEVELS: dict[str, tuple[str, ...]] = {
    "-v": ("hydra.verbose=[servelab]",),
    "-vv": ("hydra.verbose=true",),
    "-q": (
        "hydra.job_logging.root.level=WARNING",
        "hydra.hydra_logging.root.level=WARNING",
        "++hydra.job_logging.loggers.servelab.level=WARNING",  # stated, so that observers know
    ),
}
LONG = {"--verbose": "-v", "--quiet": "-q"}


def take_level(args: Sequence[str]) -> list[str]:
    """Replace the flag of a level by what it means to Hydra; without one, the arguments as they are.

    Raises:
        ConfigError: two levels are asked for.
    """
    asked = [LONG.get(arg, arg) for arg in args if LONG.get(arg, arg) in LEVELS]
    level = "-vv" if asked == ["-v", "-v"] else asked[0] if asked else ""
    if len(set(asked)) > 1:
        raise ConfigError(
            f"{asked[0]} and {asked[1]} ask for different levels of logging",
            where="command line",
            do="give one: -q warnings only, -v debugging of ServeLab and its plugins, -vv of all libraries",
        )
    rest = [arg for arg in args if LONG.get(arg, arg) not in LEVELS]
    at = next((i for i, arg in enumerate(rest) if "=" in arg and arg[0] != "-"), len(rest))
    return [*rest[:at], *LEVELS.get(level, ()), *rest[at:]]  # among overrides: Hydra takes one run of them

"""Settings of a scheduler against what the device takes."""

from __future__ import annotations

from collections.abc import Mapping

from servelab.core.api import ConfigError, Context


def check_device(ctx: Context, *, tokens: Mapping[str, int], requests: Mapping[str, int]) -> None:
    """Refuse settings that no launch could follow.

    Args:
        tokens: by name, settings that count tokens of one step.
        requests: those that count requests of one step, of which each runs at least one token.

    Raises:
        ConfigError: one is more than the engine accepts per launch.
    """
    limits, where = ctx.limits, f"scheduler {ctx.name!r}"
    most = min(limits.max_batch_requests, limits.max_batch_tokens)
    for settings, device in ((tokens, limits.max_batch_tokens), (requests, most)):
        for name, ours in settings.items():
            if ours > device:
                raise ConfigError(
                    f"scheduler.{name} is {ours}",
                    where=where,
                    why=f"the engine accepts {device} per launch",
                    do=f"lower scheduler.{name}, or raise engine.max_batch_tokens or _requests",
                )

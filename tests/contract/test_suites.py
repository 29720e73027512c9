"""Every registered plugin of a kind that has a suite passes it: one class per plugin, none is forgotten."""

from __future__ import annotations

from typing import Any

from servelab.core.registry import Registry
from servelab.core.testing import SUITES, suite_of

SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
CONFIG: dict[tuple[str, str], dict[str, Any]] = {
    ("scheduler", "aggressive"): SMALL,
    ("scheduler", "conservative"): SMALL,
    ("scheduler", "pastfuture"): SMALL,
    ("scheduler", "pf_oracle"): SMALL,
    ("scheduler", "vllm_v1"): SMALL,
}
"""Settings where a toy world needs others than the defaults."""
EXEMPT: dict[tuple[str, str], dict[str, str]] = {}
"""Checks that a plugin may fail, with the reason."""

for _kind, _suite in SUITES.items():
    for _name in Registry.load().names(_kind):
        _of = suite_of(
            _suite, _name, config=CONFIG.get((_kind, _name), {}), exempt=EXEMPT.get((_kind, _name), {})
        )
        _of.__module__ = __name__
        globals()[_of.__name__] = _of

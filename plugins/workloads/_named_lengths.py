"""Laws of lengths that have a name, each figure with its source.

[code]: read in a published artifact. [data]: computed by us from a published file. [ours]: our choice. No
data is shipped: these are laws that resemble it, and results are results on something like the named set.
"""

from __future__ import annotations

from typing import Any

from servelab.core.errors import nearest


def _uniform(low: int, high: int) -> dict[str, Any]:
    return {"law": "uniform", "min": low, "max": high}


# Past-Future (Gong et al., ASPLOS 2025), sets D1 to D3 [code: WuSiYu/lightllm-ae]. Caps are their longest
# outputs [ours].
NAMED: dict[str, dict[str, Any]] = {
    "pastfuture_d1": {
        "prompt_length": _uniform(32, 4096),
        "output_length": _uniform(2048, 4096),
        "max_new_tokens": 4096,
    },
    "pastfuture_d2": {
        "prompt_length": _uniform(3000, 5000),
        "output_length": _uniform(3000, 5000),
        "max_new_tokens": 5000,
    },
    "pastfuture_d3": {
        "prompt_length": _uniform(2048, 4096),
        "output_length": _uniform(32, 4096),
        "max_new_tokens": 4096,
    },
}
"""Settings by name."""


def named(name: str) -> dict[str, Any]:
    """The settings of a name: ``prompt_length``, ``output_length``, ``max_new_tokens``, maybe ``classes``.

    Raises:
        ValueError: no laws have this name.
    """
    if name not in NAMED:
        raise ValueError(f"no lengths are called {name!r}; {nearest(name, NAMED)}")
    return NAMED[name]

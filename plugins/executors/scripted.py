"""Scripted executor: placeholder tokens, hidden lengths from the workload, no model. A baseline.

Mechanism: every sampled token is ``placeholder``; a request ends with ``stop`` when its true output length is
reached. Nothing is timed here: the cost model prices launches on either clock. For tests, examples and
repeatable runs.

Deviations: none. Faithful when: output lengths equal the workload's truths unless the cap is lower.
Tier: stable.
"""

from __future__ import annotations

from pydantic import Field

from servelab.core.api import Capacity, Context, KVLayout
from servelab.plugins.executors._pages import BoundedPages, HostPages, stated_pages
from servelab.plugins.executors._placeholder import PlaceholderConfig, PlaceholderExecutor


class ScriptedExecutorConfig(PlaceholderConfig):
    """Settings of ``executor=scripted``."""

    num_kv_pages: BoundedPages = Field(
        512,
        description="device pages of every KV pool, or of each by its id; from 1 to 50 million, because the "
        "engine keeps a few bytes for each",
    )
    num_host_pages: HostPages = Field(0, description="host pages, likewise; 0: no swapping")


class ScriptedExecutor(PlaceholderExecutor):
    """As many pages as its settings say."""

    def __init__(self, config: ScriptedExecutorConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config

    def capacity(self, layout: KVLayout) -> Capacity:
        c = self.config
        host = stated_pages(c.num_host_pages, layout, "executor.num_host_pages") if c.num_host_pages else ()
        return Capacity(
            device_pages=stated_pages(c.num_kv_pages, layout, "executor.num_kv_pages"), host_pages=host
        )

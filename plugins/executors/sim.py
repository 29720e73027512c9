"""Simulator: placeholder tokens on a device that is only described. From no paper.

Mechanism: tokens and ends are those of the workload's hidden lengths; the cost model prices every launch and
transfer on the virtual clock. What is its own is memory: of ``memory_utilization`` of the devices' memory the
weights (in the quantizer's formats), the activations of the largest step and the runtime are taken off, and
the rest is KV pages, as serving engines size their pool. ``num_kv_pages`` states them instead.

Symbols: tp devices of M bytes; U = memory_utilization; W weight bytes; A activation bytes and R runtime bytes
of a device:
pages = (U * tp * M - W - tp * (A + R)) / (bytes of a page * copies); copies of each KV head: tp * ceil(KV
heads / tp) / KV heads, 1 where tp divides the heads.

Deviations: none. Faithful when: pages by hand for Llama-2-7B on an A100; pools of real engines within 3 %;
output lengths equal the workload's truths unless the cap is lower; a model larger than its devices is
refused. Tier: stable.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from servelab.core.api import Capacity, ConfigError, Context, HardwareFacts, KVLayout, ModelFacts
from servelab.core.sites import kv_share, weight_bytes
from servelab.plugins.executors._pages import BoundedPages, HostPages, pages_in, stated_pages
from servelab.plugins.executors._placeholder import PlaceholderConfig, PlaceholderExecutor

_GIB = 2**30
_LOGIT_ROWS = 256
"""Rows of logits a device has room for (vLLM's profile run samples max_num_seqs rows)."""
_LOGIT_COPIES = 3
"""Logits gathered on each device, their sorted copy and their probabilities."""


class SimExecutorConfig(PlaceholderConfig):
    """Settings of ``executor=sim``."""

    num_kv_pages: BoundedPages | None = Field(
        None, description="device pages of every KV pool, or of each by its id; None: what memory holds"
    )
    num_host_pages: HostPages = Field(0, description="host pages, likewise; 0: no swapping")
    memory_utilization: float = Field(
        0.9, gt=0, le=1, description="U, share of device memory used in all (vLLM's default: 0.9)"
    )
    runtime_bytes: int = Field(
        512 * 2**20,
        ge=0,
        description="bytes per device that context, libraries and captured graphs take; see the page",
    )
    activation_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of activations per device; None: those of the largest step, see the page",
    )


class SimExecutor(PlaceholderExecutor):
    """Stateless but for what it counted once, at composition."""

    def __init__(self, config: SimExecutorConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        self.config = config
        self._limits = ctx.limits
        self._hardware = ctx.hardware
        self._model: ModelFacts = ctx.model
        self._weights = weight_bytes(ctx.model, ctx.quant)
        self._memory: dict[str, Any] = {}

    def capacity(self, layout: KVLayout) -> Capacity:
        """Pages stated, or as many as memory holds.

        Raises:
            ConfigError: no device is chosen or its memory is not stated; the model leaves no room for KV.
        """
        c = self.config
        host = stated_pages(c.num_host_pages, layout, "executor.num_host_pages") if c.num_host_pages else ()
        if c.num_kv_pages is not None:
            pages = stated_pages(c.num_kv_pages, layout, "executor.num_kv_pages")
        else:
            pages = pages_in(self._kv_memory(layout), layout, self._limits)
        return Capacity(device_pages=pages, host_pages=host)

    def describe(self) -> dict[str, Any]:
        """What memory is used for, in bytes over all devices of the instance."""
        return {
            "source": "none",
            "quantization": "none (a shape only)",
            "bytes": self._weights,
            **self._memory,
        }

    def _kv_memory(self, layout: KVLayout) -> int:
        c, device = self.config, self._hardware
        if device is None or device.memory_bytes is None:
            named = "no hardware is chosen" if device is None else f"{device.name} states no memory_bytes"
            raise ConfigError(
                "the KV memory of the simulated device is unknown",
                where="executor 'sim', num_kv_pages",
                why=named,
                do="choose a device (hardware=a100_80g), state hardware.memory_bytes, or set "
                "executor.num_kv_pages",
            )
        left = self._kv_room(device.tp, device.memory_bytes)
        self._memory = {
            "device_memory_bytes": device.tp * device.memory_bytes,
            "memory_utilization": c.memory_utilization,
            "activation_bytes": device.tp * self._activation_bytes(device.tp),
            "runtime_bytes": device.tp * c.runtime_bytes,
            "kv_memory_bytes": max(0, left),
            "kv_copies": self._copies(device.tp),
        }
        left = int(left / self._copies(device.tp))
        if left < sum(pool.bytes_per_page for pool in layout.pools):
            raise self._does_not_fit(layout, device, device.memory_bytes)
        return left

    def _kv_room(self, tp: int, memory: int) -> int:
        """Bytes left for KV on ``tp`` devices of ``memory`` bytes."""
        taken = tp * (self._activation_bytes(tp) + self.config.runtime_bytes)
        return int(self.config.memory_utilization * tp * memory) - self._weights - taken

    def _copies(self, tp: int) -> float:
        """How often the same KV is kept, over all devices."""
        return tp * kv_share(self._model, tp)

    def _does_not_fit(self, layout: KVLayout, device: HardwareFacts, memory: int) -> ConfigError:
        """What takes how much, and the least devices that hold the model and one request of full length."""
        limits, tp, used = self._limits, device.tp, self._memory
        one = sum(
            -(-pool.most_tokens(limits.max_model_len, limits.max_batch_tokens) // pool.page_tokens)
            * pool.bytes_per_page
            for pool in layout.pools
        )
        shards = (t for t in range(tp + 1, self._model.heads + 1) if self._model.heads % t == 0)
        enough = next((t for t in shards if self._kv_room(t, memory) / self._copies(t) >= one), None)
        more = f"more devices (hardware.tp={enough}), " if enough else ""
        share = self.config.memory_utilization
        if share < 0.9:
            more = f"more of the memory (executor.memory_utilization), {more}"
        return ConfigError(
            f"model {self._model.name!r} does not fit on {tp} x {device.name}",
            where="executor 'sim'",
            why=f"weights take {self._weights / _GIB:.1f} GiB, activations "
            f"{used['activation_bytes'] / _GIB:.1f} GiB and the runtime "
            f"{used['runtime_bytes'] / _GIB:.1f} GiB; {share:g} of the memory is "
            f"{share * tp * memory / _GIB:.1f} GiB, which leaves no room for KV",
            do=f"use {more}a smaller model, a quantizer such as +quant=w4a16, or a device with more memory",
        )

    def _activation_bytes(self, tp: int) -> int:
        """Of one device, for the largest step: as stated; or of the widest point of a layer, gate, up and
        their product beside the residual stream; or of the logits in float32 with a sorted copy and the
        probabilities, if they are more.
        """
        if self.config.activation_bytes is not None:
            return self.config.activation_bytes
        model, tokens = self._model, self._limits.max_batch_tokens
        per_token = model.experts_per_token + model.shared_experts if model.experts else 1
        wide = max(model.ffn * per_token, model.dense_ffn) * (3 if model.gated else 2)
        layer = tokens * (3 * model.hidden + wide / tp) * model.dtype_bytes
        rows = min(_LOGIT_ROWS, self._limits.max_batch_requests)
        return int(max(layer, _LOGIT_COPIES * rows * model.vocab * 4))

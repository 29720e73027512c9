"""Prices of batches that nobody has: what a router asks of an instance's cost model."""

from __future__ import annotations

from collections.abc import Sequence

from servelab.core.engine.state import Lease, Request
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.events import Batch
from servelab.core.families.cost import CostModel
from servelab.core.request import RequestSpec


class Prices:
    """What-if prices of one instance, in nanoseconds.

    Args:
        cost: its cost model.
        who: the instance, for messages.
        max_batch_tokens: tokens one step may run; longer prompts are cut into such chunks.
    """

    def __init__(self, cost: CostModel, who: str, max_batch_tokens: int) -> None:
        self._cost = cost
        self._who = who
        self._most = max_batch_tokens
        lease = Lease("what-if", 0)
        self._nobody = Request(RequestSpec(id="what-if", prompt_tokens=1, max_new_tokens=1), 0, 1, lease)

    def step_ns(self, tokens: Sequence[int], starts: Sequence[int]) -> int:
        """One step of requests that run so many tokens after so many others."""
        n = len(tokens)
        if not n:
            return 0
        requests, samples = [self._nobody] * n, [True] * n
        leases = [self._nobody.lease] * n
        batch = Batch(0, -1, 0, 1, requests, leases, list(tokens), list(starts), samples, {})
        try:
            return self._cost.price(batch, 1)[0]
        except ServeLabError:
            raise
        except Exception as exc:
            raise PluginCallError(
                f"the cost model of {self._who} raised {type(exc).__name__}: {exc}",
                where="price(), asked by the router's view",
                why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                do="mend the cost model",
            ) from exc

    def prompt_ns(self, tokens: int, start: int = 0) -> int:
        """A prompt with the device to itself, after so many tokens that are there already."""
        total = 0
        while tokens > 0:
            n = min(tokens, self._most)
            total += self.step_ns([n], [start])
            tokens, start = tokens - n, start + n
        return total

    def decode_ns(self, requests: int, context_tokens: int) -> int:
        """One step of so many requests that decode, whose contexts add up to so many tokens."""
        if requests < 1:
            return 0
        each, rest = divmod(max(context_tokens, 0), requests)
        return self.step_ns([1] * requests, [each + (i < rest) for i in range(requests)])

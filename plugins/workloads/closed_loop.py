"""Closed loop: so many clients, each of which asks again when it has been answered.

Technique: baseline. The load generator of throughput studies, among them the artifact of Past-Future (Gong et
al., ASPLOS 2025; WuSiYu/lightllm-ae): concurrency is given, the rate follows from the system.

Mechanism: requests form one list, numbered from 0, whose lengths, caps and classes are drawn by the laws of
the ``synthetic`` workload. Client ``c`` of ``N`` starts at ``c * ramp_s / N`` with request ``c``. When its
request has ended, however it ended, it thinks and sends the next one: of the common list (``deal: queue``),
or of its own share, the numbers ``c``, ``c + N``, ``c + 2N`` ... (``deal: own``). In neither case do lengths
depend on the order of completions, so two schedulers are asked the same: with ``queue`` the ``j``-th request
sent, with ``own`` the ``k``-th of each client. Outputs are enforced and hidden: they are in ``Arrival.truth``
only.

A request that did not complete (rejected, aborted, failed) is sent again under ``retry``, by the same client,
with the same prompt and the same true length, as ``r7.1``, ``r7.2`` ...

Symbols:
    N   ``clients``
    n   ``num_requests``

Faithful when: never more than N requests are alive, and exactly N while the list lasts, thinking takes no
time and all have started; by Little's law N = throughput * (mean latency + mean think time).

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from servelab.core.api import Arrival, Cancel, Context
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._arrivals import NS
from servelab.plugins.workloads._describe import json_settings
from servelab.plugins.workloads._ids import DrawnIds, uniform_ids
from servelab.plugins.workloads._labels import NS_PER_MS
from servelab.plugins.workloads._laws import Constant, LengthLaw
from servelab.plugins.workloads._population import Population
from servelab.plugins.workloads._requests import Requests

DEFAULT_REQUESTS = 64
"""Where neither a number nor a time is stated. Ours, as of ``synthetic``."""
CHUNK = 1024
"""Requests drawn at once where the list has no end; ``describe`` is about the first of them."""


class ClosedLoopConfig(Requests):
    """Settings of the ``closed_loop`` workload. Defaults are ours, sized for a small model on a CPU."""

    clients: int = Field(default=8, ge=1, le=1_000_000, description="How many clients, N.")
    num_requests: int | None = Field(
        default=DEFAULT_REQUESTS,
        ge=1,
        le=10_000_000,
        description="Requests of all clients together, n, retries not counted; null, and by default if "
        "duration_s is stated: as many as come.",
    )
    duration_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="No request is sent from then on, seconds into the run; null: until num_requests.",
    )
    deal: Literal["queue", "own"] = Field(
        default="queue",
        description="queue: whoever is free takes the next request of the list. own: each client has a share "
        "of its own, so that slow answers to one leave the others' traffic as it is; shares end one by one.",
    )
    ramp_s: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Clients start evenly spread over so many seconds; 0: all at once.",
    )
    think_ms: LengthLaw | None = Field(
        default=None,
        description="Law of the pause between an end and the client's next request, ms; null: none.",
    )
    retry: bool = Field(
        default=False, description="Send a request that did not complete again, instead of the next one."
    )
    retry_pause_ms: LengthLaw = Field(
        default=Constant(value=1),
        description="Law of the pause before that, ms; at least 1, so that time goes on.",
    )
    max_attempts: int = Field(
        default=100, ge=1, description="A request that did not complete so many times is given up. Ours."
    )
    samples: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Outputs drawn from each prompt, the client's n; it goes on when all have ended.",
    )

    @model_validator(mode="before")
    @classmethod
    def _until(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("duration_s") is not None and "num_requests" not in data:
            return {**data, "num_requests": None}
        return data

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("the run would never end: state num_requests or duration_s")
        if self.num_requests is not None and self.num_requests < self.clients:
            raise ValueError(
                f"{self.num_requests} requests do not occupy {self.clients} clients: raise num_requests to "
                "at least clients, or lower clients"
            )
        if self.duration_s is not None and self.ramp_s >= self.duration_s:
            raise ValueError(
                f"clients start over ramp_s={self.ramp_s:g}, and nothing is sent after "
                f"duration_s={self.duration_s:g}: lower the first or raise the second"
            )
        if self.deal == "own" and any(phase.after_s is not None for phase in self.phases):
            raise ValueError(
                "phases that begin at a time (after_s) need one order of requests: set deal to 'queue', or "
                "let phases begin after a number of requests (after)"
            )
        return self


@dataclass(slots=True)
class Asked:
    """A request that has been sent and has not ended."""

    number: int
    attempt: int
    open: int
    """Samples that have not ended."""
    failed: bool = False


class ClosedLoop:
    """Clients that wait for their answers.

    State: the requests drawn so far as columns, and what each client waits for. ``arrivals()`` begins a run
    anew. A request costs a few microseconds; token ids are made when they are read.

    Raises:
        WorkloadError: a request would be longer than the model allows.
    """

    def __init__(self, config: ClosedLoopConfig, ctx: Context) -> None:
        self._config, self._vocab = config, ctx.model.vocab
        self._root = ctx.rng.getrandbits(64)
        self._end_ns = None if config.duration_s is None else round(config.duration_s * NS)
        self._think = _pauses(config.think_ms, self._stream("think"))
        self._prefix = tuple(uniform_ids(config.prefix_tokens, self._vocab, self._stream("prefix")))
        self._requests = Population(config, config.samples, self._stream, ctx)
        self._asked: dict[str, Asked] = {}
        self._next = config.clients
        """The next number of the list."""
        self._described = self._draw_ahead()

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """The first request of each client; what follows comes from ``react``."""
        self._asked.clear()
        self._next = self._config.clients
        return (self._send(client, self._start_ns(client)) for client in range(self._config.clients))

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """The client's next request, or the same again."""
        id = finished.request.partition("#")[0]
        asked = self._asked.get(id)
        if asked is None:
            return ()  # another workload's
        asked.open -= 1
        asked.failed |= finished.outcome != "completed"
        if asked.open:
            return ()
        del self._asked[id]
        if finished.outcome == "unfinished":
            return ()
        if asked.failed and self._config.retry and asked.attempt + 1 < self._config.max_attempts:
            return self._again(asked, finished.t_ns)
        return self._go_on(asked.number, finished.t_ns)

    def describe(self) -> dict[str, Any]:
        """Sample statistics and every setting, ready for JSON. See the workload's page for the keys."""
        return {**self._described, "settings": json_settings(self._config)}

    # ------------------------------------------------------------------ clients

    def _go_on(self, number: int, now_ns: int) -> Iterable[Arrival]:
        """What a client does after the end of a request."""
        config = self._config
        following = number + config.clients if config.deal == "own" else self._next
        if config.num_requests is not None and following >= config.num_requests:
            return ()
        at = now_ns + self._pause_ns(following)
        if self._end_ns is not None and at >= self._end_ns:
            return ()
        self._next += 1
        return (self._send(following, at),)

    def _again(self, asked: Asked, now_ns: int) -> Iterable[Arrival]:
        chance = Random(f"{self._root}/retry/{asked.number}/{asked.attempt}").random()
        at = now_ns + self._config.retry_pause_ms.sampler()(chance) * NS_PER_MS
        if self._end_ns is not None and at >= self._end_ns:
            return ()
        return (self._send(asked.number, at, asked.attempt + 1),)

    def _send(self, number: int, at_ns: int, attempt: int = 0) -> Arrival:
        requests = self._requests
        if number >= len(requests):
            requests.extend(number + (1 if requests.by_time else CHUNK), lambda _: at_ns)
        id = f"r{number}.{attempt}" if attempt else f"r{number}"
        self._asked[id] = Asked(number, attempt, self._config.samples)
        return Arrival(at_ns, requests.spec(number, id, self._ids(number)), requests.truth(number))

    def _start_ns(self, client: int) -> int:
        return round(client * self._config.ramp_s * NS / self._config.clients)

    def _pause_ns(self, number: int) -> int:
        """How long the client thinks before it sends a request."""
        return self._think(number) * NS_PER_MS

    def _ids(self, number: int) -> Sequence[int] | None:
        if not self._config.with_prompt_ids:
            return None
        key, own = f"{self._root}/tokens/{number}", self._requests.prompts[number] - len(self._prefix)
        ids = DrawnIds(key, own, self._vocab)
        return (*self._prefix, *ids) if self._prefix else ids

    # ------------------------------------------------------------------ drawing

    def _stream(self, quantity: str) -> Random:
        """The generator of one quantity, at its start; independent of every other quantity's."""
        return Random(f"{self._root}/{quantity}")

    def _draw_ahead(self) -> dict[str, Any]:
        """Draw what is known before the run, and describe it."""
        config, requests = self._config, self._requests
        about = {
            "requests": config.num_requests if config.duration_s is None else None,
            "clients": config.clients,
            "turns": 1,
            "cancellations": 0,
        }
        if requests.by_time:
            requests.refuse_laws()
            requests.extend(config.clients, self._start_ns)
            return about
        if config.num_requests is None:
            requests.refuse_laws()
        requests.extend(config.num_requests or max(CHUNK, config.clients))
        if about["requests"] is None:
            return {**about, "list": {"requests": len(requests), **requests.describe()}}
        return {**about, **requests.describe()}


def _pauses(law: LengthLaw | None, rng: Random) -> Callable[[int], int]:
    """The pause before each request by its number, drawn in the order of numbers."""
    if law is None:
        return lambda number: 0
    sample, drawn = law.sampler(), list[int]()

    def pause(number: int) -> int:
        while number >= len(drawn):
            drawn.append(sample(rng.random()))
        return drawn[number]

    return pause

"""App: graphs of model calls and tools.

Intent: let the serving side see what belongs together. An app turns a graph into requests as its nodes
become ready, says what each call is for, and may propose where calls run. Values flow between nodes without
returning to the client. A failed node always ends: with a value, or with an error its readers see.

What must be expressible: chains cut from prompts with variables; annotations deduced backwards from what
the client waits for; groups that finish together; identical calls done once; plans over many graphs with
epochs, shards and models; nodes discovered while a planner is still streaming; tools with latencies;
bounded replanning; several calls that read each other's growing output.

Capabilities: ``app.graphs``, ``app.dynamic`` (nodes appear while others stream), ``app.tools`` (calls
tools), ``app.annotates`` (criterion, group, depth), ``app.dedup`` (merges equal calls), ``app.plans``
(proposes placements; with ``router.places`` it also decides them), ``app.shared_context`` (calls see each
other's output as it grows).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from servelab.core.families.router import ClusterView
    from servelab.core.request import RequestSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a prompt: constant text, the value of a variable, or the place where output is generated."""

    kind: Literal["constant", "input", "output"]
    variable: str = ""
    text: str = ""
    tokens: int = 0
    """Length where it is known without text."""

    def __post_init__(self) -> None:
        if (self.kind == "constant") == bool(self.variable):
            raise ValueError("inputs and outputs name a variable, constants do not")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One model call or tool call."""

    id: str
    kind: Literal["model", "tool"] = "model"
    pieces: tuple[Piece, ...] = ()
    after: tuple[str, ...] = ()
    """Nodes that must have ended, beside the producers of its inputs."""
    tool: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 0
    model: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == "tool") != (self.tool is not None):
            raise ValueError(f"node {self.id!r} is a {self.kind} call with tool {self.tool!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """What a client submits."""

    id: str
    nodes: tuple[Node, ...]
    wants: tuple[tuple[str, Literal["latency", "throughput"]], ...] = ()
    """(variable, criterion) the client waits for."""
    deadline_ns: int | None = None

    def __post_init__(self) -> None:
        ids = [node.id for node in self.nodes]
        if len(set(ids)) != len(ids):
            raise ValueError(f"graph {self.id!r} names a node twice")
        producers = {p.variable: n.id for n in self.nodes for p in n.pieces if p.kind == "output"}
        waits = {
            n.id: {a for a in n.after if a in ids}
            | {producers[p.variable] for p in n.pieces if p.kind == "input" and p.variable in producers}
            for n in self.nodes
        }
        while waits:
            ready = {n for n, before in waits.items() if not before & waits.keys()}
            if not ready:
                raise ValueError(f"graph {self.id!r} has a cycle through {sorted(waits)}")
            waits = {n: before for n, before in waits.items() if n not in ready}


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """What schedulers and routers may know about a call; travels in ``RequestSpec.features["app"]``."""

    criterion: Literal["latency", "throughput"] = "throughput"
    group: str | None = None
    """Calls that are useful only together."""
    depth: int = 0
    """0 for calls whose inputs come from outside, 1 more than the deepest producer otherwise."""
    signature: str = ""
    """Equal for calls that must give equal results."""
    expected_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Begin a node now: a request for a model call, nothing more for a tool."""

    node: str
    request: RequestSpec | None = None
    annotation: Annotation = Annotation()
    barrier_group: str | None = None
    """Calls of one group advance in the same launches."""


@dataclass(frozen=True, slots=True)
class AddNodes:
    """The graph has grown."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Insert:
    """Put tokens into the running output of a call, as if it had generated them."""

    node: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """End a running call; what it has so far is its value."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The graph has ended; ``error`` if it failed."""

    values: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


Step = Start | AddNodes | Insert | Stop | Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where and when a call, or a shard of many equal ones, should run."""

    graph: str
    node: str
    instance: int
    epoch: int = 0
    shard: tuple[int, int] = (0, 1)
    """(index, of how many)."""
    model: str | None = None


class Tool(Protocol):
    """What tool nodes call. In the simulator only ``latency_ns`` is used."""

    name: str

    def latency_ns(self, arguments: Mapping[str, Any], rng: random.Random) -> int: ...

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Raises whatever it likes: the node ends with the error's text."""
        ...


class App(Protocol):
    """Called on the cluster's clock, one event at a time. Every method answers with the steps to take now.

    The protocols below add methods; the core calls them where the plugin's spec names the capability.
    """

    def submit(self, graph: Graph, now_ns: int) -> Sequence[Step]:
        """A client has come."""
        ...

    def node_ready(self, graph: str, node: str, values: Mapping[str, str], now_ns: int) -> Sequence[Step]:
        """All it waits for has ended; ``values`` are its inputs. Usually answers ``Start``."""
        ...

    def node_done(
        self, graph: str, node: str, value: str | None, error: str | None, now_ns: int
    ) -> Sequence[Step]:
        """A call has ended, with a value or an error, exactly once per started node."""
        ...


class StreamingApp(App, Protocol):
    """With ``app.dynamic`` or ``app.shared_context``."""

    def watches(self, graph: str, node: str) -> bool:
        """Whether ``on_token`` is wanted for a call; asked once, when it starts."""
        ...

    def on_token(
        self, graph: str, node: str, tokens: Sequence[int], text: str, now_ns: int
    ) -> Sequence[Step]:
        """A watched call has produced more."""
        ...


class PlanningApp(App, Protocol):
    """With ``app.plans``."""

    def plan(self, graphs: Sequence[Graph], view: ClusterView) -> Sequence[Placement]:
        """Proposals for calls not yet started; empty: the router decides."""
        ...


class ToolApp(App, Protocol):
    """With ``app.tools``."""

    def tools(self) -> Mapping[str, Tool]:
        """By name. A node that names another tool is a ``ConfigError``."""
        ...

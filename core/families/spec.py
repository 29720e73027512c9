"""Speculator: drafts and their length.

Intent: guess tokens so that the target model checks several at once. Two halves: this description, free of
torch, decides lengths and prices drafting wherever it runs; ``load`` imports the half that drafts real
tokens.

What must be expressible: lengths chosen per step from load and acceptance, before pages are reserved (the
scheduler caps them), and cut again after drafting; drafts found in the context, by a model with its own KV
pool, or as trees; exact acceptance by rejection sampling, for drafts with and without probabilities;
training on rejected positions of live traffic within a budget of FLOPs, new weights taken over between
launches.

Capabilities: ``spec.drafts``, ``spec.tree`` (drafts are trees), ``spec.draft_model`` (needs a pool of its
own), ``spec.adaptive`` (lengths depend on load or acceptance), ``spec.trains`` (asks for background work).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from servelab.core.facts import ModelFacts
    from servelab.core.families.kernel import OpCost
    from servelab.core.families.scheduler import StepView
    from servelab.core.layout import Pool
    from servelab.core.request import RequestView


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens of one request, a chain or a tree."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...] = ()
    """Per token, index of its parent, -1 for the last real token; empty: a chain."""
    probs: Any = None
    """float ``[len(tokens), vocab]`` after the request's own temperature and cuts; None: one-hot."""

    def __post_init__(self) -> None:
        if self.parents and len(self.parents) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} draft tokens have {len(self.parents)} parents")
        for i, parent in enumerate(self.parents):
            if not -1 <= parent < i:
                raise ValueError(f"draft token {i} has parent {parent}; parents come before their children")

    @property
    def is_chain(self) -> bool:
        return all(parent == i - 1 for i, parent in enumerate(self.parents))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What became of one draft."""

    request_id: str
    drafted: int
    """Tokens proposed."""
    verified: int
    """Tokens the target model checked, after ``clip``."""
    accepted: int
    target_probs: Any = None
    """float ``[k, vocab]`` at ``positions``, if ``wants_probs``."""
    positions: tuple[int, ...] = ()
    """Where verification ended a round: the rejected or the bonus token."""

    def __post_init__(self) -> None:
        if not 0 <= self.accepted <= self.verified <= self.drafted:
            raise ValueError(
                f"accepted {self.accepted} of verified {self.verified} of drafted {self.drafted} tokens"
            )


class Drafter(Protocol):
    """The half with real tokens. Lives in the executor; may import torch."""

    def propose(
        self, contexts: Sequence[Sequence[int]], lengths: Sequence[int], sampling: Sequence[Any]
    ) -> Sequence[Draft]:
        """One draft per request, of at most its length; shorter or empty where there is nothing to guess."""
        ...

    def commit(self, request_ids: Sequence[str], lengths: Sequence[int]) -> None:
        """Roll the draft model's KV back to these committed lengths."""
        ...


class TrainableDrafter(Drafter, Protocol):
    def train(self, flops: int) -> int:
        """Spend at most this on training; returns what was spent. New weights show in the next launch."""
        ...


class Speculator(Protocol):
    """The torch-free half; the same object decides in the engine and in the simulator.

    The protocols below add methods; the core calls them where the plugin's spec names the capability.
    """

    max_length: int
    """Longest draft it ever asks for."""
    wants_probs: bool
    """Whether ``observe`` needs the target's probabilities."""

    def lengths(self, requests: Sequence[RequestView], view: StepView) -> Sequence[int]:
        """Draft length for each decoding request, 0 to ``max_length``. Pure in the view and its own state."""
        ...

    def observe(self, outcomes: Sequence[Verified], now_ns: int) -> None:
        """After each launch, in batch order."""
        ...

    def acceptance(self, request: RequestView) -> float:
        """Chance that a drafted token is accepted given those before it; the simulator draws with it."""
        ...

    def draft_cost(self, requests: int, length: int, context_tokens: int) -> OpCost:
        """Price of drafting ``length`` tokens for each of ``requests`` requests."""
        ...

    def load(self, device: str) -> Drafter:
        """Import and build the other half."""
        ...


class AdaptiveSpeculator(Speculator, Protocol):
    """With ``spec.adaptive``."""

    def clip(self, drafted: Sequence[int], view: StepView) -> Sequence[int]:
        """Lengths to verify, once it is known how much was drafted; never above ``drafted``."""
        ...


class DraftModelSpeculator(Speculator, Protocol):
    """With ``spec.draft_model``."""

    def pools(self, target: ModelFacts) -> Sequence[Pool]:
        """Pools of its own model, added to the layout."""
        ...


class TrainingSpeculator(Speculator, Protocol):
    """With ``spec.trains``; its ``Drafter`` has ``train``."""

    def background_flops(self, view: StepView) -> int:
        """Training it would like in this step; the scheduler may grant less or nothing."""
        ...

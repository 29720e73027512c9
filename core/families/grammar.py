"""Grammar: which tokens may come next.

Intent: constrain output to a grammar at almost no cost: compile beside queueing and prefill, fill masks on
the CPU while the device computes, undo what speculation took back, and skip tokens that leave no choice.

What must be expressible: asynchronous compilation (the request is in phase ``compiling``); masks for some
rows of a batch, others untouched; acceptance and rollback by token; one mask per node of a draft tree;
jump-forward text, which the engine tokenizes again from the last certain boundary; a padded vocabulary,
wider than the tokenizer's.

Masks need the token before them. A scheduler that plans one step ahead therefore meets a grammar only if
masks may be filled late and sampling waits for them (``grammar.late_mask``).

Capabilities: ``grammar.constrains`` (masks tokens), ``grammar.rollback`` (undoes accepted tokens),
``grammar.tree`` (masks draft trees), ``grammar.jump_forward``, ``grammar.late_mask`` (sampling waits for
masks).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from servelab.core.families.spec import Draft


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSource:
    """What a client asks for, under ``RequestSpec.features["grammar"]``."""

    kind: Literal["json_schema", "json", "ebnf", "regex", "structural_tag"]
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Token bytes by id."""

    tokens: Sequence[bytes]
    padded_size: int
    """Width of the logits; ids from ``len(tokens)`` on are never allowed."""
    stop_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.padded_size < len(self.tokens):
            raise ValueError(
                f"logits of width {self.padded_size} cannot hold {len(self.tokens)} tokens; "
                "take the model's vocabulary size, not the tokenizer's"
            )

    @property
    def mask_words(self) -> int:
        """32-bit words of one row's mask."""
        return (self.padded_size + 31) // 32


class Matcher(Protocol):
    """Where one request is in its grammar."""

    @property
    def terminated(self) -> bool:
        """The grammar is complete and only a stop token may follow."""
        ...

    def fill(self, mask: Any, row: int) -> bool:
        """Write row ``row`` of ``mask``: int32 ``[rows, mask_words]``, bit set: allowed. False: all are
        allowed.
        """
        ...

    def accept(self, token: int) -> bool:
        """Move on by one token; False (and no change) if the grammar forbids it."""
        ...

    def rollback(self, n: int) -> None:
        """Undo the last ``n`` accepted tokens, with ``grammar.rollback``; masks are then as before them."""
        ...

    def jump_forward(self) -> bytes:
        """Bytes that must follow whatever is sampled; empty if there is a choice. Changes nothing."""
        ...

    def fork(self) -> Matcher:
        """An independent copy, for branches."""
        ...


class Grammar(Protocol):
    """One per run; matchers are one per request."""

    def bind(self, vocabulary: Vocabulary) -> None:
        """Called once, before any compilation."""
        ...

    def compile(self, source: GrammarSource) -> Future[Any]:
        """Start compiling; the result goes to ``begin``. Equal sources share the work.

        The future's exception is a ``ConfigError`` that ends the request, not the run.
        """
        ...

    def begin(self, compiled: Any) -> Matcher:
        """A matcher at the start of the grammar."""
        ...

    def fill(self, matchers: Sequence[Matcher], rows: Sequence[int], mask: Any) -> Sequence[bool]:
        """``Matcher.fill`` for many rows, in parallel where the plugin can."""
        ...

    def compile_ns(self, source: GrammarSource) -> int:
        """What compiling is charged on the virtual clock."""
        ...

    def fill_ns(self, rows: int) -> int:
        """What filling is charged on the virtual clock; a step costs ``max(device, fill)``, not the sum."""
        ...


class TreeGrammar(Grammar, Protocol):
    """With ``grammar.tree``."""

    def fill_tree(self, matcher: Matcher, draft: Draft, mask: Any, row: int) -> None:
        """Masks of the root and every node of a draft in rows ``row, row + 1, ...``; the matcher ends
        unmoved.
        """
        ...

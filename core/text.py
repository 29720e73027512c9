"""Text in and out of a model, as workloads, tasks and clients see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What an executor with ``executor.tokenizer`` offers as its attribute ``tokenizer``."""

    vocab_size: int
    """Ids are in ``[0, vocab_size)``, special ones included."""
    stop_ids: frozenset[int]
    """Ids that end a text: end of sequence, end of turn."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model was trained to read it, with the special tokens its checkpoint
        puts around every text (such as a beginning-of-sequence id). Special tokens written in the text are
        recognised.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out; an unfinished character shows as U+FFFD."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation through the model's chat template, the assistant's turn opened.

        Args:
            messages: mappings with ``role`` (``system``, ``user``, ``assistant``) and ``content``.

        Raises:
            ConfigError: the checkpoint has no chat template, or the template refuses the messages.
        """
        ...

"""Printing, when the reader may have gone: as in ``... | head``, or where stdout was closed (``>&-``)."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print lines. Whoever reads no more ends nothing: the run goes on, its files are written."""
    if sys.stdout is None:  # closed before we began
        return
    with suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def flush() -> None:
    """Now rather than at exit, where Python would complain about a reader that has gone."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

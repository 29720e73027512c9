"""Ctrl-C and SIGTERM: the first ends the run, whose files are written; a second does not cut that off."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

PATIENCE = b"servelab: ending, files are being written; once more to leave without them\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken the way of Ctrl-C: the run ends as interrupted and its files are written."""


def interrupted_by(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    return Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt()


class Interruptions:
    """Counts signals: the first interrupts, the second is answered, any further one interrupts again.

    Args:
        raises: whether the first one raises in the main thread; otherwise it is only noted.
    """

    def __init__(self, raises: bool = True) -> None:
        self.first: int | None = None
        """Number of the first signal."""
        self._raises, self._count = raises, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self.first is None:
            self.first = number
        if self._count == 2:
            with suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, PATIENCE)
        elif self._raises or self._count > 2:
            raise interrupted_by(number)


@contextmanager
def taking(interruptions: Interruptions) -> Iterator[None]:
    """In the main thread, hand it SIGINT and SIGTERM; those that others handle or ignore are left to them."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    taken = {number: usual for number, usual in ours.items() if signal.getsignal(number) == usual}
    for number in taken:
        signal.signal(number, interruptions)
    try:
        yield
    finally:
        for number, usual in taken.items():
            signal.signal(number, usual)

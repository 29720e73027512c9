"""Python's cyclic garbage collector while a run goes on: it looks at less, and less often."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 200_000
"""Objects made, less those freed, from one look at the young ones to the next; Python's own: 700. What a run
makes by the thousand (records, plans, lists of a batch, requests that have ended) is freed without the
collector.
"""


@contextmanager
def seldom() -> Iterator[None]:
    """What was made before is not looked at in here, and what is made is looked at seldom. All is as before
    afterwards.
    """
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    if gc.isenabled() and before[0]:
        gc.set_threshold(max(YOUNG, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:  # whoever embeds us may have had its own reasons
            gc.unfreeze()

"""Observer: nothing is decided, everything may be watched.

Intent: logs, traces, progress, reports, dashboards. An observer is an object whose methods implement
event hooks (``core/hookspecs.py``), marked with ``hookimpl``; results are ignored. Only selected observers
run, so installing a package never changes a run.

It writes only below the run's folder, not before the first record, and never over what another run left
there: it refuses such a folder when it is made. Without a folder it writes nothing, or refuses.

Capabilities: none. An observer that raises ends the run: a log that silently lost records is worse than none.
"""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Any object with at least one event hook."""

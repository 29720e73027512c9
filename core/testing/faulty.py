"""A plugin that raises when told to, and is otherwise the plugin inside."""

from __future__ import annotations

from typing import Any


class Faulty:
    """Has exactly the methods of the plugin inside, so that optional ones stay optional."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.armed = False
        """The next call of a method raises ``ZeroDivisionError("planted")``."""
        self.raised = ""
        """The method that did."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **more: Any) -> Any:
            if self.armed:
                self.armed, self.raised = False, name
                raise ZeroDivisionError("planted")
            return found(*args, **more)

        call.__name__ = name
        return call

"""The bus: brings each record to the observers that watch it.

pluggy checks names and arguments once, when the bus is built; after that a record costs one dictionary
look-up and one plain method call per watching observer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pluggy
from pluggy import HookImpl, HookimplOpts

from servelab.core.errors import PluginCallError, PluginError, ServeLabError, nearest
from servelab.core.hookspecs import EVENT_OF_RECORD, PROJECT, Events
from servelab.core.records import Record, RunFinished

Listener = Callable[[Any], object]

EVERY_RECORD = "servelab_on_record"
HOOKS = frozenset({EVERY_RECORD, *EVENT_OF_RECORD.values()})


class Bus:
    """Calls observers in the order they are given: ``servelab_on_record`` of all, then the typed hook of all.

    Args:
        observers: objects whose methods, marked with ``hookimpl``, implement hooks of ``Events``.

    Raises:
        PluginError: an observer is a class, has no event hook, is given twice, or one of its hooks is
            unknown, unmarked, asks for arguments that do not exist, or asks to be ordered or to wrap.
    """

    def __init__(self, observers: Iterable[object] = ()) -> None:
        self._names: dict[Listener, str] = {}
        by_hook: dict[str, list[Listener]] = {hook: [] for hook in HOOKS}
        seen: set[int] = set()
        for observer in observers:
            name = _name(observer)
            if id(observer) in seen:
                raise PluginError(
                    f"observer {name} is given twice",
                    why="it would count every record twice",
                    do="name it once in 'observers'",
                )
            seen.add(id(observer))
            for hook, listener in _listeners(observer, name):
                by_hook[hook].append(listener)
                self._names[listener] = name
        self._asked = frozenset(ev for ev, hook in EVENT_OF_RECORD.items() if by_hook[hook])
        self._calls: dict[str, tuple[Listener, ...]] = {
            ev: (*by_hook[EVERY_RECORD], *by_hook[hook]) for ev, hook in EVENT_OF_RECORD.items()
        }

    def emit(self, record: Record) -> None:
        """Show a record to every observer that watches it.

        The first observer that raises ends the call, except on ``RunFinished``: that record reaches every
        observer, so that each can flush and close, and the first failure is raised afterwards.

        Raises:
            PluginCallError: an observer raised; the original exception is chained.
        """
        if isinstance(record, RunFinished):
            self._emit_last(record)
            return
        for call in self._calls[record.ev]:
            try:
                call(record)
            except Exception as error:
                raise self._failure(call, record, error) from error

    def listens(self, ev: str) -> bool:
        """Whether any observer watches records of this type."""
        return bool(self._calls[ev])

    def asks(self, ev: str) -> bool:
        """Whether any observer has the hook of this very type of record."""
        return ev in self._asked

    def _emit_last(self, record: RunFinished) -> None:
        first: tuple[PluginCallError, Exception] | None = None
        for call in self._calls[record.ev]:
            try:
                call(record)
            except Exception as error:
                failure = self._failure(call, record, error)
                if first is None:
                    first = failure, error
                else:
                    first[0].add_note(f"afterwards also: {failure}")
        if first is not None:
            raise first[0] from first[1]

    def _failure(self, call: Listener, record: Record, error: Exception) -> PluginCallError:
        where = f"hook {getattr(call, '__name__', call)}, record {record.ev!r}"
        request = getattr(record, "request", None)
        if request is not None:
            where += f" of request {request}"
        where += f" at {record.t_ns} ns, engine {record.engine}"
        why, do = f"{type(error).__name__}: {error}", ""
        if isinstance(error, ServeLabError):
            why, do = error.in_short, error.do
        return PluginCallError(
            f"observer {self._names[call]} raised while it was shown a record",
            where=where,
            why=why,
            do=do or "mend the observer, or leave it out of 'observers'",
        )


def _name(observer: object) -> str:
    kind = observer if isinstance(observer, type) else type(observer)
    if inspect.ismodule(observer):
        return observer.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def _listeners(observer: object, name: str) -> Iterator[tuple[str, Listener]]:
    """The event hooks of one observer as (hook, callable of one record)."""
    if isinstance(observer, type):
        raise PluginError(
            f"observer {name} is a class passed instead of an instance",
            why="its hooks would be called without 'self'",
            do=f"pass {observer.__qualname__}(...)",
        )
    impls = _implementations(observer, name)
    if not impls:
        raise PluginError(
            f"observer {name} is an object with no event hook at all",
            why="it would watch nothing",
            do=f"implement one of these and mark it with @hookimpl: {', '.join(sorted(HOOKS))}",
        )
    for hook, impl in impls:
        if impl.hookwrapper or impl.wrapper or impl.tryfirst or impl.trylast:
            raise PluginError(
                f"observer {name} marks {impl.function.__name__} with an option that observers cannot have",
                why="observers neither wrap one another nor choose their order: it is the configured one",
                do="use @hookimpl without wrapper, hookwrapper, tryfirst and trylast",
            )
        yield hook, impl.function if impl.argnames else _without_argument(impl.function)


def _implementations(observer: object, name: str) -> list[tuple[str, HookImpl]]:
    """What pluggy finds in the observer, after its checks of names and arguments."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Events)
    for attribute in dir(observer):
        if attribute.startswith("servelab_"):
            _check_marked(manager.parse_hookimpl_opts(observer, attribute), attribute, name)
    try:
        manager.register(observer, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        unknown = sorted(h.name for h in manager.get_hookcallers(observer) or () if h.name not in HOOKS)
        raise PluginError(
            f"observer {name} has a hook that does not fit",
            why=" ".join(str(error).split()),
            do=nearest(unknown[0], HOOKS) if unknown else "take exactly (self, record), or (self)",
        ) from error
    return [
        (caller.name, impl)
        for caller in manager.get_hookcallers(observer) or ()
        for impl in caller.get_hookimpls()
    ]


def _check_marked(options: HookimplOpts | None, attribute: str, name: str) -> None:
    if options is None:
        raise PluginError(
            f"observer {name} has {attribute}, which is not marked as a hook",
            why="names that begin with 'servelab_' are hooks; unmarked, it would never be called",
            do="put @hookimpl (from servelab.core.api) on it, or rename it",
        )


def _without_argument(function: Callable[..., object]) -> Listener:
    def listener(_: Record) -> object:
        return function()

    listener.__name__ = getattr(function, "__name__", "listener")
    return listener

"""What every conformance suite shares: how a plugin is named, built and checked.

A suite is a class of checks for one kind of plugin. To hold a plugin to its contract, derive from it::

    from servelab.core.testing import SchedulerSuite


    class TestMine(SchedulerSuite):
        plugin = "mine"

Checks are methods ``test_*`` without arguments, so they run under pytest and, by ``failures``, without it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, ClassVar, NoReturn

import pytest

from servelab.core.capabilities import Selected, select
from servelab.core.config import Choice, choice_of
from servelab.core.context import Context, seeded
from servelab.core.errors import PluginCallError, PluginError, ServeLabError, nearest
from servelab.core.facts import Limits, ModelFacts
from servelab.core.families import KINDS
from servelab.core.given import is_factory, spec_of
from servelab.core.registry import Registry, blocked_names
from servelab.core.request import Truth
from servelab.core.spec import PluginSpec
from servelab.core.testing.parts import parts_like
from servelab.core.testing.traps import forbidden_calls

SUITE_API = "1"
"""Version of the suites. Within one version, checks are added only for rules that contracts already state."""


class ConformanceError(AssertionError):
    """A plugin breaks its contract.

    Args:
        what: what is wrong: plugin, request, step, value and limit.
        rule: the contract's sentence that it breaks.
        where: where the contract is written.
        do: what to mend.
    """

    def __init__(self, what: str, *, rule: str, where: str, do: str) -> None:
        self.what, self.rule, self.where, self.do = what, rule, where, do
        parts = [("rule", rule), ("where", where), ("do", do)]
        super().__init__("\n".join([what, *(f"  {name + ':':<6} {text}" for name, text in parts)]))


class PluginSuite:
    """Base of the suites. Class attributes say what is checked."""

    kind: ClassVar[str] = ""
    """Kind of plugin, a name in ``KINDS``; each suite sets it."""
    contract: ClassVar[str] = ""
    """Where the contract of the kind is written; each suite sets it."""

    advice: ClassVar[str] = (
        "mend the factory; or give settings that a toy model can serve in 'config' of the suite"
    )
    """What to do about a factory that raises."""

    plugin: ClassVar[Any] = None
    """A registered name; or a ``PluginSpec``, a class, a factory ``(config, context)`` or an object.

    A class or factory without an attribute ``spec`` takes no settings and declares no capability. An
    object is copied for each check.
    """
    config: ClassVar[Mapping[str, Any]] = {}
    """Settings, as in YAML; what is left out has its default."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Check -> why the plugin may fail it. Strict: a plugin that passes has to lose the exemption."""
    seed: ClassVar[int] = 0
    """The run's seed in the contexts of ``make``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "exempt" not in vars(cls):
            return
        for name, reason in cls.exempt.items():
            if name not in cls.checks():
                known = nearest(name, cls.checks())
                raise TypeError(f"{cls.__name__}.exempt names no check: {name!r}; {known}")
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.exempt[{name!r}] gives no reason: say why it may fail")
            setattr(cls, name, _exempted(getattr(cls, name), reason))

    # ---------------------------------------------------------- the plugin

    @classmethod
    def checks(cls) -> list[str]:
        """Names of the checks, those of the base first, in the order they are written."""
        return list(dict.fromkeys(n for c in reversed(cls.__mro__) for n in vars(c) if n.startswith("test_")))

    @functools.cached_property
    def _selected(self) -> tuple[Registry, PluginSpec, Choice]:
        registry, name = _registered(self.kind, inspect.getattr_static(type(self), "plugin"))
        try:
            spec = registry.spec(self.kind, name)
            if reason := registry.unavailable(spec):
                pytest.skip(f"{self.kind} {name!r} is disabled here: {reason}")
            value = {"name": name, **self.config}
            return registry, spec, choice_of(self.kind, value, registry, f"{type(self).__name__}.config")
        except ServeLabError as exc:
            raise ConformanceError(
                f"{self.kind} {name!r} cannot be loaded: {exc.what}" + (f"; {exc.why}" if exc.why else ""),
                rule="a plugin is found by its name, and its settings are those its config model allows",
                where="docs/howto/add_a_scheduler.md",
                do=exc.do or "mend the plugin's declaration, or 'plugin' and 'config' of the suite",
            ) from exc

    @property
    def spec(self) -> PluginSpec:
        """What the plugin declares about itself."""
        return self._selected[1]

    @property
    def name(self) -> str:
        """How messages call the plugin: ``scheduler 'mine'``."""
        return f"{self.kind} {self.spec.name!r}"

    @functools.cached_property
    def _composed(self) -> Selected:
        """The plugin, with those within its settings."""
        registry, _, choice = self._selected
        return select([(self.kind, choice)], registry)[0]

    def provides(self, capability: str) -> bool:
        """Whether the plugin declares a capability; of one made of others of its kind, whether all do."""
        return capability in self._composed.provides

    def may(self, capability: str) -> bool:
        """Whether the plugin or one within it declares a capability."""
        return capability in self._composed.may

    def needs(self, capability: str) -> None:
        """Skip the check unless the plugin declares a capability."""
        if not self.provides(capability):
            pytest.skip(f"{self.name} does not declare {capability!r}")

    def make(self, **context: Any) -> Any:
        """A fresh plugin with its validated settings and a freshly seeded context.

        Args:
            context: fields of ``Context`` that the check needs otherwise than toy-sized.

        Raises:
            ConformanceError: the factory raised, or what it returned lacks what the protocol asks for.
        """
        registry, spec, choice = self._selected
        known: dict[str, Any] = {
            "kind": self.kind,
            "name": spec.name,
            "rng": seeded(self.seed, self.kind, spec.name),
            "model": TOY_SHAPE,
            "hardware": None,
            "limits": TOY_LIMITS,
            "seed": self.seed,
        }
        if spec.oracle or self.kind == "executor":
            known["oracle"] = {}.__getitem__
        try:
            factory = registry.resolve(self.kind, spec.name, "factory")
            alone = Context(**known | context)
            nobody: dict[str, Truth] = {}
            parts = parts_like(alone, registry, alone.oracle or nobody.__getitem__)
            made = factory(choice.config, replace(alone, part=parts))
        except ConformanceError:
            raise
        except Exception as exc:
            self.fail(
                f"{self.name} could not be built: its factory raised {type(exc).__name__}: {exc}",
                rule="a factory takes (config, context) and builds the plugin from these alone",
                do=self.advice,
                cause=exc,
            )
        lacking = [n for n in KINDS[self.kind].members if not hasattr(made, n)]
        if lacking:
            self.fail(
                f"{self.name} has no {', '.join(lacking)}",
                rule=f"a {self.kind} has what the protocol {KINDS[self.kind].protocol} asks for",
                do=f"write {', '.join(lacking)}, or return another object from the factory",
            )
        return made

    def fail(
        self, what: str, *, rule: str, do: str, where: str = "", cause: BaseException | None = None
    ) -> NoReturn:
        """Raise the ``ConformanceError``; ``where`` is the kind's contract unless given."""
        raise ConformanceError(what, rule=rule, where=where or self.contract, do=do) from cause

    def calls_nothing_forbidden(self, calls: Callable[[], object]) -> None:
        """A check for policies: what they do reads no clock, no chance but their own, no environment."""
        found: list[str] = []
        with forbidden_calls(found.append):
            calls()
        self.called_nothing_forbidden(found)

    def called_nothing_forbidden(
        self, found: Sequence[str], place: str = "", time: str = "the time it is given"
    ) -> None:
        """Likewise, of what was noticed: names of calls."""
        if found:
            self.fail(
                f"{self.name} calls {found[0]}{place}",
                rule="a policy reads no clock, draws no chance but its own and no environment: one seed "
                "gives one run",
                where="CONTRIBUTING.md, five rules",
                do=f"use {time}, context.rng for chance, and a setting for the rest",
            )

    def declares(self, did: Mapping[str, str]) -> None:
        """A check: what it was seen to do, by capability, is among the capabilities of its spec."""
        for capability, what in did.items():
            if not self.provides(capability):
                self.fail(
                    f"{self.name} {what}, and does not declare {capability!r}",
                    rule="a spec names what a plugin brings, so that others can refuse or need it",
                    where="docs/explanation/families.md",
                    do=f"put {capability!r} into provides= of its PluginSpec, or do not do it",
                )

    # ------------------------------------------------------ of every kind

    def test_builds(self) -> None:
        """The factory builds two plugins with what the protocol asks for."""
        first, second = self.make(), self.make()
        if first is second:
            self.fail(
                f"{self.name}: the factory returned the same object twice",
                rule="every run has a plugin of its own, so that nothing of one run reaches the next",
                do="make a new object in the factory",
            )


class PolicySuite(PluginSuite):
    """Base of the suites of policies: they compute with the standard library alone."""

    def test_imports_no_tensor_library(self) -> None:
        """Policies run where no tensor library is installed."""
        module = self.spec.factory.partition(":")[0]
        if not isinstance(type(self).plugin, str):
            pytest.skip("only a plugin that is registered by name is imported in a process of its own")
        code = (
            f"import sys, importlib; importlib.import_module({module!r}); "
            f"print(*sorted({TENSOR_LIBRARIES} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if done.returncode or done.stdout.strip():
            self.fail(
                f"{self.name}: importing {module} brings in "
                f"{done.stdout.strip() or done.stderr.strip()[-300:]}",
                rule="policy code imports no tensor library: simulations run without one",
                where="docs/explanation/families.md",
                do="move the import to where it is needed, or compute with the standard library",
            )


class Endless(ServeLabError):
    """The world does not come to its end."""


class Changed(ServeLabError):
    """A view showed something else after the call than before it."""


def root_of(error: Any) -> Any:
    """The error that a plugin made by writing to frozen data, behind the core's; others as they are."""
    if isinstance(error, PluginCallError) and isinstance(error.__cause__, FrozenInstanceError):
        return error.__cause__
    return error


TENSOR_LIBRARIES = {"jax", "tensorflow", "torch", "transformers", "triton"}
TOY_SHAPE = ModelFacts(
    name="toy", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256, max_position=4096
)
"""The model of ``PluginSuite.make``, as ``fakes.TOY_MODEL``."""
TOY_LIMITS = Limits(max_batch_tokens=64, max_batch_requests=16, max_model_len=256)
"""The limits of ``PluginSuite.make``, as ``fakes.toy_limits()``."""


# ------------------------------------------------------------- without pytest


@dataclass(frozen=True, slots=True)
class Result:
    """What one check of a suite came to."""

    check: str
    error: AssertionError | None = None
    """Why it failed; None: it passed, was skipped, or failed as exempted."""
    skipped: str = ""
    """Why it does not apply here."""
    exempted: str = ""
    """Why it may fail, as it did."""


def results(suite: type[PluginSuite], checks: Iterable[str] | None = None) -> Iterator[Result]:
    """Run the checks of a suite one after the other, without pytest, each on a fresh instance.

    Args:
        suite: a suite with its ``plugin``.
        checks: which of them; None: all.
    """
    for check in suite.checks() if checks is None else checks:
        exempted = suite.exempt.get(check, "")
        try:
            getattr(suite(), check)()
        except pytest.skip.Exception as exc:
            yield Result(check, skipped=str(exc))
        except AssertionError as exc:
            yield Result(check, exempted=exempted) if exempted else Result(check, exc)
        except Exception as exc:
            yield Result(check, _unforeseen(suite, check, exc))
        else:
            yield Result(check, _stale(suite, check, exempted) if exempted else None)


def failures(suite: type[PluginSuite], checks: Iterable[str] | None = None) -> dict[str, AssertionError]:
    """The checks that fail, with their errors; empty: the plugin conforms. See ``results``."""
    return {result.check: result.error for result in results(suite, checks) if result.error is not None}


def suite_of(base: type[PluginSuite], plugin: Any, **attributes: Any) -> type[PluginSuite]:
    """A suite for one plugin, made by a program: what ``class TestMine(base)`` is in a test module."""
    shown = plugin if isinstance(plugin, str) else getattr(plugin, "__name__", type(plugin).__name__)
    if inspect.isfunction(plugin):
        plugin = staticmethod(plugin)
    return type(f"Test_{base.kind}_{shown}", (base,), {"plugin": plugin, **attributes})


def _unforeseen(suite: type[PluginSuite], check: str, exc: Exception) -> ConformanceError:
    error = ConformanceError(
        f"{suite.__name__}.{check} raised {type(exc).__name__}: {exc}",
        rule="a plugin raises nothing while it is called as its contract says",
        where=suite.contract,
        do="mend the plugin; the traceback of the cause shows where",
    )
    error.__cause__ = exc
    return error


def _stale(suite: type[PluginSuite], check: str, reason: str) -> ConformanceError:
    return ConformanceError(
        f"{suite.__name__} passes {check}, from which it is exempt: {reason}",
        rule="exemptions are strict: only a check that fails is exempt",
        where="docs/reference/suites.md",
        do=f"take {check!r} out of 'exempt'",
    )


def _exempted(check: Callable[[PluginSuite], None], reason: str) -> Callable[[PluginSuite], None]:
    """The check of one suite marked as expected to fail; the inherited one stays as it is."""

    @functools.wraps(check)
    def exempted(self: PluginSuite) -> None:
        check(self)

    marked: Callable[[PluginSuite], None] = pytest.mark.xfail(
        strict=True, reason=reason, raises=ConformanceError
    )(exempted)
    return marked


# ------------------------------------------------------------ naming a plugin


def registry_with(suite: type[PluginSuite]) -> tuple[Registry, str]:
    """A registry of its own, to which more may be added, with the plugin of a suite, and its name there."""
    registry, name = _registered(suite.kind, inspect.getattr_static(suite, "plugin"))
    return copy.deepcopy(registry), name


@functools.cache
def _loaded(blocked: frozenset[str]) -> Registry:
    return Registry.load()


def _registered(kind: str, plugin: Any) -> tuple[Registry, str]:
    """A registry with the plugin, and its name there."""
    registry = _loaded(blocked_names())
    if isinstance(plugin, str):
        return registry, plugin
    if isinstance(plugin, staticmethod):
        plugin = plugin.__func__
    if plugin is None:
        raise TypeError("the suite names no plugin: set the class attribute 'plugin'")
    own = copy.deepcopy(registry)
    if isinstance(plugin, PluginSpec):
        spec, factory = plugin, None
    else:
        spec = spec_of(plugin, "given to a suite")
        factory = plugin if is_factory(kind, plugin) else lambda config, context: copy.deepcopy(plugin)
    while (kind, spec.name) in own.specs:
        spec = replace(spec, name=f"{spec.name}.suite")
    try:
        own.add(kind, spec, provider="suite", factory=factory)
    except PluginError as exc:
        raise ConformanceError(
            f"the spec of {kind} {spec.name!r} is not well formed: {exc.why or exc.what}",
            rule="a PluginSpec is strings and data with known capabilities",
            where="docs/explanation/families.md",
            do=exc.do or "correct its PluginSpec",
        ) from exc
    return own, spec.name

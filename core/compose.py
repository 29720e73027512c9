"""From a checked configuration to a run: facts, layout, capacity, parts, engine, in that order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from servelab.core.bus import Bus
from servelab.core.capabilities import Selected, check_capabilities, select
from servelab.core.cluster.cluster import Cluster
from servelab.core.config import DTYPE_BYTES, Choice, Part, RunConfig, across, refusal
from servelab.core.context import Context, seeded
from servelab.core.engine.engine import Engine
from servelab.core.errors import CapabilityError, ConfigError, PluginError, ServeLabError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.families import KINDS
from servelab.core.families.quant import WeightFormat
from servelab.core.fitting import (
    check_accepted,
    check_capacity,
    check_cluster,
    check_layout,
    check_pools,
    check_shareable,
)
from servelab.core.layout import Capacity, KVLayout
from servelab.core.registry import Registry
from servelab.core.request import SLO, Arrival, Cancel, Truth
from servelab.core.run_info import run_info
from servelab.core.sites import linear_sites

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from servelab.core.families.cost import CostModel
    from servelab.core.families.executor import Executor
    from servelab.core.families.kernel import AttentionBackend
    from servelab.core.families.kvcache import KVCache
    from servelab.core.families.quant import Quantizer
    from servelab.core.families.task import Task
    from servelab.core.families.workload import Workload
    from servelab.core.records import RequestFinished
    from servelab.core.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine, and the parts that are its own."""

    engine: Engine
    executor: Executor
    cost: CostModel


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything a task needs, built and checked."""

    config: RunConfig
    registry: Registry
    task: Task
    instances: list[Instance]
    """In order of their index; a router may add to them."""
    cluster: Cluster | None
    """The router's side of them; None: there is no router."""
    quantizer: Quantizer | None
    tokenizer: Tokenizer | None
    """The executor's."""
    workload: Workload
    truths: dict[str, Truth]
    """True outcomes of live requests by id, filled by the driver; executors and declared oracles read it."""
    observers: tuple[object, ...]
    info: dict[str, Any]
    """What identifies the run, in JSON types: settings, plugins, versions, seed, stamps, KV layout."""
    run_dir: Path | None

    @property
    def engine(self) -> Engine:
        """Of the first instance."""
        return self.instances[0].engine

    @property
    def executor(self) -> Executor:
        """Of the first instance."""
        return self.instances[0].executor

    @property
    def cost(self) -> CostModel:
        """Of the first instance."""
        return self.instances[0].cost

    def for_driver(self, bus: Bus) -> dict[str, Any]:
        """Arguments of a driver that serves the run's workload; sets which records its engines make."""
        for one in self.instances:
            one.engine.plan_log = bus.listens("planned")
            one.engine.token_log = bus.asks("tokens")
        return {
            "engines": [one.engine for one in self.instances],
            "executors": [one.executor for one in self.instances],
            "costs": [one.cost for one in self.instances],
            "workload": self.workload,
            "truths": self.truths,
            "emit": bus.emit,
            "cluster": self.cluster,
        }

    def close(self) -> None:
        """Close the executors of all instances; the first failure is raised when all have been asked."""
        failed: Exception | None = None
        for one in self.instances:
            try:
                one.executor.close()
            except Exception as exc:
                if failed is None:
                    failed = exc
                else:
                    failed.add_note(f"also, of another instance: {type(exc).__name__}: {exc}")
        if failed is not None:
            raise failed


def compose(
    config: RunConfig,
    registry: Registry,
    *,
    run_dir: Path | None = None,
    fit_length: bool = False,
    sweep: bool = False,
) -> Run:
    """Build a run.

    Args:
        config: checked settings.
        registry: where its plugins are.
        run_dir: where observers and tasks may write; None: nowhere.
        fit_length: where ``engine.max_model_len`` is not stated and KV memory holds less than the model's
            context, serve the longest request that it holds, instead of refusing.
        sweep: it is a job of a sweep (``Context.sweep``).

    Raises:
        CapabilityError: parts that cannot work together, all problems at once, or too small a KV pool.
        PluginError: a factory failed or returned something else than its family asks for.
    """
    selected = _checked_selection(config, registry)
    config = _with_shape(config, registry)
    build = _Builder(config, registry, run_dir, sweep)

    for kind, choice in config.choices():
        provider = registry.provider(kind, choice.name)
        log.debug("%s %s of %s: %s", kind, choice.name, provider, choice.settings() or "no settings")
    log.debug("model %s: %s", config.model.name, build.model)

    build.shares = any("kvcache.fork" in one.provides for one in selected)
    kvcache, layout = build.memory()
    if config.kernel is not None and build.kernel is not None:
        refused = build.ask("kernel", build.kernel.refuses, layout, build.model, build.hardware)
        check_accepted(config.kernel.name, config.kvcache.name, refused)
    build.layout = layout
    if config.quant is not None:
        build.quantizer = build.checked_quantizer()
    executor: Executor = build.one("executor")
    build.tokenizer = getattr(executor, "tokenizer", None)
    instances: list[Instance] = []
    try:
        check_cluster(config, executor)
        capacity = build.ask("executor", executor.capacity, layout)
        offline = any("task.offline" in one.provides for one in selected)
        if fit_length and config.engine.max_model_len is None:
            config = build.fit(layout, capacity, kvcache)
        check_pools(capacity, layout, config.executor.name)
        if not offline:
            check_capacity(capacity, layout, kvcache, config, build.limits)
        for pool, pages in zip(layout.pools, capacity.device_pages, strict=True):
            log.debug("KV pool of %s pages: %s", f"{pages:,}", pool)
        log.debug("limits: %s", build.limits)
        workload = build.one("workload")
        by_class = {name: one.bounds() for name, one in config.slo.classes.items()}
        if config.slo.bounds() or any(by_class.values()):
            workload = DefaultSLO(workload, config.slo.bounds(), by_class)
        if config.prefix is not None:
            check_shareable(layout, config.prefix.name)
        instances = [build.instance(0, kvcache, executor, capacity)]
        observers = tuple(build("observer", choice) for choice in config.observers)
        for index in range(1, config.cluster.instances):
            instances.append(build.another(index))
        cluster = build.cluster(instances)
        task: Task = build.one("task")
        described = build.ask("workload", workload.describe)
        info = run_info(config, registry, selected, layout, capacity, executor, described)
        if hasattr(instances[0].cost, "describe"):
            info["cost"] = build.ask("cost", instances[0].cost.describe)
    except BaseException as exc:
        for one in [executor, *(other.executor for other in instances[1:])]:
            try:
                one.close()
            except Exception as second:
                exc.add_note(f"while closing the executor: {type(second).__name__}: {second}")
        raise
    return Run(
        config=config,
        registry=registry,
        task=task,
        instances=instances,
        cluster=cluster,
        quantizer=build.quantizer,
        tokenizer=build.tokenizer,
        workload=workload,
        truths=build.truths,
        observers=observers,
        info=info,
        run_dir=run_dir,
    )


def another_quantizer(run: Run, choice: Choice) -> Quantizer:
    """A quantizer beside the run's own, for the same parts and as closely checked.

    Raises:
        CapabilityError: it cannot work with the run's other parts, or nobody runs its formats.
        PluginError: its factory failed.
    """
    config = run.config.model_copy(update={"quant": choice})
    _checked_selection(config, run.registry)
    return _Builder(config, run.registry, run.run_dir).checked_quantizer()


def _checked_selection(config: RunConfig, registry: Registry) -> list[Selected]:
    """The run's plugins, which can work together."""
    selected = select(config.choices(), registry)
    check_capabilities(
        selected, registry, ahead=config.engine.max_in_flight > 1, lanes=config.engine.lanes > 1
    )
    return selected


class DefaultSLO:
    """A workload whose requests get the run's bounds where they state none.

    Args:
        workload: whose requests.
        slo: for classes without an entry; None: no bounds.
        by_class: instead of it, by request class.
    """

    def __init__(
        self, workload: Workload, slo: SLO | None, by_class: Mapping[str, SLO | None] = MappingProxyType({})
    ) -> None:
        self._workload, self._slo, self._by_class = workload, slo, by_class

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        return map(self._bounded, self._workload.arrivals())

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        return map(self._bounded, self._workload.react(finished))

    def describe(self) -> dict[str, Any]:
        return self._workload.describe()

    def _bounded(self, item: Arrival | Cancel) -> Arrival | Cancel:
        if isinstance(item, Cancel) or item.spec.slo is not None:
            return item
        slo = self._by_class.get(item.spec.request_class, self._slo)
        return item if slo is None else replace(item, spec=replace(item.spec, slo=slo))


def _with_shape(config: RunConfig, registry: Registry) -> RunConfig:
    """The configuration with the model's shape read from its files, where it is left open."""
    missing = config.model.unstated()
    if not missing:
        return config
    name = config.executor.name
    describe = registry.resolve("executor", name, "describe_model")
    if describe is None:
        raise ConfigError(
            f"the shape of model {config.model.name!r} is not stated",
            where=f"model: {', '.join(missing)}",
            why=f"executor {name!r} does not read it from the model's files",
            do="state these fields, or choose an executor that runs models (executor=torch)",
        )
    shape = _asked("executor", name, "describe_model", describe, config.model)
    model = config.model.model_copy(update=shape)
    if left := model.unstated():
        raise PluginError(
            f"executor {name!r} left parts of the model's shape open: {', '.join(left)}",
            where="describe_model()",
            do="mend the executor",
        )
    config = config.model_copy(update={"model": model})
    if problems := across(config):
        raise refusal(problems)
    return config


def _asked(kind: str, name: str, what: str, method: Callable[..., Any], *args: Any) -> Any:
    """Call a plugin while the run is being composed; what it raises is reported with its name."""
    try:
        return method(*args)
    except ServeLabError:
        raise
    except Exception as exc:
        raise PluginError(
            f"{kind} {name!r} raised {type(exc).__name__}: {exc}",
            where=f"{what}(), while the run was composed",
            do="mend the plugin; SERVELAB_TRACEBACK=1 shows where",
        ) from exc


class _Builder:
    """Calls factories, each with its settings and its own context."""

    def __init__(
        self, config: RunConfig, registry: Registry, run_dir: Path | None, sweep: bool = False
    ) -> None:
        self.config, self.registry, self.run_dir, self.sweep = config, registry, run_dir, sweep
        shape = config.model.model_dump(include={f.name for f in fields(ModelFacts)}, exclude_none=True)
        self.model = ModelFacts(**shape, dtype_bytes=DTYPE_BYTES[config.model.dtype])
        self.hardware = config.hardware.facts() if config.hardware else None
        limits = config.engine.model_dump(exclude={"checks", "max_model_len"})
        self.limits = Limits(max_model_len=config.engine.max_model_len or self.model.max_position, **limits)
        self.truths: dict[str, Truth] = {}
        self.kernel: AttentionBackend | None = None
        self.layout: KVLayout | None = None
        self.quantizer: Quantizer | None = None
        self.tokenizer: Tokenizer | None = None
        self.shares = False
        """Requests may share pages (``kvcache.fork``)."""
        self.index = 0
        """The instance that is being built."""

    def memory(self) -> tuple[KVCache, KVLayout]:
        """A kvcache, and its layout as the kernel takes it."""
        name = self.config.kvcache.name
        kvcache: KVCache = self.one("kvcache")
        layout = self.ask("kvcache", kvcache.layout, self.model)
        check_layout(layout, name, self.model)
        if self.config.kernel is not None:
            if self.kernel is None:
                self.kernel = self.one("kernel")
            layout = self.ask("kernel", self.kernel.adapt, layout, self.model)
            check_layout(layout, name, self.model)
        return kvcache, layout

    def instance(self, index: int, kvcache: KVCache, executor: Executor, capacity: Capacity) -> Instance:
        """An engine with a cost model, a scheduler and a prefix store of its own."""
        config, layout = self.config, self.layout
        assert layout is not None
        cost: CostModel = self.one("cost")
        scheduler = self.one("scheduler")
        prefix = None
        if config.prefix is not None:
            prefix = self.one("prefix")
            self.ask("prefix", prefix.attach, layout)
        engine = Engine(
            index=index,
            scheduler=scheduler,
            scheduler_name=config.scheduler.name,
            kvcache=kvcache,
            kvcache_name=config.kvcache.name,
            layout=layout,
            capacity=capacity,
            limits=self.limits,
            model=self.model,
            hardware=self.hardware,
            cost=cost,
            horizon=executor.horizon,
            checks=config.engine.checks,
            prefix=prefix,
            prefix_name=config.prefix.name if config.prefix else "",
            shares=self.shares,
        )
        return Instance(engine, executor, cost)

    def another(self, index: int) -> Instance:
        """A further instance like the first, with generators of its own."""
        assert self.layout is not None
        self.index = index
        try:
            kvcache, layout = self.memory()
            if layout != self.layout:
                raise PluginError(
                    f"kvcache {self.config.kvcache.name!r} proposed another layout for instance {index}",
                    where="layout()",
                    why=f"{layout!r:.60} is not what it proposed for instance 0",
                    do="propose the same layout whenever model and settings are the same",
                )
            executor: Executor = self.one("executor")
            capacity = self.ask("executor", executor.capacity, self.layout)
            return self.instance(index, kvcache, executor, capacity)
        finally:
            self.index = 0

    def cluster(self, instances: list[Instance]) -> Cluster | None:
        """The selected router with everything it is to rule."""
        config = self.config
        if config.router is None:
            return None

        def one_more(index: int) -> tuple[Engine, Executor, CostModel]:
            made = self.another(index)
            instances.append(made)
            return made.engine, made.executor, made.cost

        return Cluster(
            self.one("router"),
            config.router.name,
            [one.engine for one in instances],
            report_interval_ns=round(config.cluster.report_interval_ms * 1e6),
            model=self.model.name,
            hardware=self.hardware,
            network_bytes_per_s=self._network(),
            network_latency_ns=round(config.cluster.network_latency_us * 1e3),
            max_instances=config.cluster.max_instances,
            start_ns=None if config.cluster.start_s is None else round(config.cluster.start_s * 1e9),
            another=one_more,
        )

    def _network(self) -> float | None:
        stated = self.config.cluster.network_gb_per_s
        if stated is not None:
            return stated * 1e9
        return self.hardware.network_bytes_per_s if self.hardware else None

    def fit(self, layout: KVLayout, capacity: Capacity, kvcache: KVCache) -> RunConfig:
        """Limit requests to what KV memory holds; the configuration with that stated."""
        longest = self.limits.max_model_len
        for pool, pages in zip(layout.pools, capacity.device_pages, strict=True):
            most = pool.most_tokens(longest, self.limits.max_batch_tokens)
            if self.ask("kvcache", kvcache.pages_for, pool, None, most) > pages:
                longest = max(1, min(longest, self.ask("kvcache", kvcache.tokens_in, pool, pages)))
        self.limits = replace(self.limits, max_model_len=longest)
        engine = self.config.engine.model_copy(update={"max_model_len": longest})
        self.config = self.config.model_copy(update={"engine": engine})
        return self.config

    def one(self, kind: str) -> Any:
        """The run's only plugin of a kind."""
        return self(kind, getattr(self.config, kind))

    def checked_quantizer(self) -> Quantizer:
        """The selected quantizer, each of whose formats somebody runs."""
        quantizer: Quantizer = self.one("quant")
        name, seen = self.config.quant.name if self.config.quant else "", set()
        for site in linear_sites(self.model):
            format = self.ask("quant", quantizer.format, site, self.model)
            if format is None or (format, site.n, site.k) in seen:
                continue
            if not isinstance(format, WeightFormat):
                raise PluginError(
                    f"quant {name!r} gave no usable format",
                    where=f"format() of {site.name}",
                    why=f"it returned {format!r:.60}",
                    do="return a WeightFormat, or None to leave the linear as it is",
                )
            seen.add((format, site.n, site.k))
            refused = self.ask("quant", quantizer.refuses, format, site.n, site.k, self.hardware)
            if refused:
                raise CapabilityError(
                    f"nobody runs the format {format} of quant {name!r}",
                    where=f"{site.name}, {site.n} outputs of {site.k} inputs",
                    why=refused,
                    do="change the settings of quant, or choose another quantizer",
                )
        return quantizer

    def ask(self, kind: str, method: Callable[..., Any], *args: Any) -> Any:
        """Call a selected plugin."""
        name = getattr(self.config, kind).name
        return _asked(kind, name, getattr(method, "__name__", str(method)), method, *args)

    def __call__(self, kind: str, choice: Choice, place: tuple[str, ...] = ()) -> Any:
        """A plugin, or a part of one at a place told by keys."""
        spec = self.registry.spec(kind, choice.name)
        path = [*place, choice.name, *([f"instance {self.index}"] if self.index else [])]

        def part(kind: str, choice: Choice, key: str = "") -> Any:
            return self(kind, checked_part(kind, choice), (*place, key) if key else place)

        context = Context(
            kind=kind,
            name=choice.name,
            rng=seeded(self.config.seed, kind, "/".join(path)),
            model=self.model,
            hardware=self.hardware,
            limits=self.limits,
            oracle=self.truths.__getitem__ if kind == "executor" or spec.oracle else None,
            checkpoint=self.config.model if kind == "executor" else None,
            kernel=self.kernel if kind in ("executor", "cost") else None,
            quant=self.quantizer if kind in ("executor", "cost") else None,
            layout=self.layout,
            instance=self.index,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
            run_dir=self.run_dir,
            sweep=self.sweep,
            part=part,
        )
        return assemble(choice, context, self.registry)


def assemble(choice: Choice, context: Context, registry: Registry) -> Any:
    """A plugin in a context.

    Raises:
        PluginError: the factory failed, or returned something else than its family asks for.
    """
    kind, spec = context.kind, registry.spec(context.kind, choice.name)
    factory = registry.resolve(kind, choice.name, "factory")
    where = f"{kind} {choice.name!r} of {registry.provider(kind, choice.name)}"
    try:
        made = factory(choice.config, context)
    except ServeLabError:
        raise
    except Exception as exc:
        raise PluginError(
            f"{kind} {choice.name!r} could not be built",
            where=where,
            why=f"its factory {spec.factory} raised {type(exc).__name__}: {exc}",
            do="SERVELAB_TRACEBACK=1 shows where; for settings it cannot work with, "
            "a factory raises ConfigError",
        ) from exc
    lacking = [name for name in KINDS[kind].members if not hasattr(made, name)]
    if lacking:
        raise PluginError(
            f"{kind} {choice.name!r} is not a {KINDS[kind].protocol.partition(':')[2]}",
            where=where,
            why=f"what its factory returned, {made!r:.60}, has no {', '.join(lacking)}",
            do=f"implement the protocol {KINDS[kind].protocol}",
        )
    return made


def checked_part(kind: str, choice: Choice) -> Part:
    """A part that was validated as one, and that capabilities were checked with.

    Raises:
        PluginError: the setting is not marked ``PartOf(kind)``.
    """
    if isinstance(choice, Part) and choice.kind == kind:
        return choice
    raise PluginError(
        f"a part of kind {kind!r} is no setting of that kind",
        where=f"Context.part({kind!r}, {choice!r:.60})",
        why="the run's capabilities are checked with the parts that settings declare",
        do=f'declare the setting as Annotated[Choice, PartOf("{kind}")], and give its value to part()',
    )

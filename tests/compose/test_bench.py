"""The bench task: whatever happens, the log has an end and the executor is closed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.context import Context
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.hookspecs import hookimpl
from servelab.core.records import Record, RequestFinished, RunFinished, RunStarted
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig
from servelab.plugins.tasks import _collector as collector


class Recorder:
    """Keeps every record; raises what it is told to at the n-th."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.records: list[Record] = []
        self.error, self.at = error, at

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.records.append(record)
        if self.error is not None and len(self.records) == self.at:
            raise self.error


class Fragile(ScriptedExecutor):
    """Fails on its third launch, if told to."""

    error: BaseException | None
    launches: int
    closed: int

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(ScriptedExecutorConfig(foresight=False), context)

    def launch(self, batch: Any, steps: int) -> Any:
        Fragile.launches += 1
        if self.error is not None and Fragile.launches == 3:
            raise self.error
        return super().launch(batch, steps)

    def close(self) -> None:
        Fragile.closed += 1


def bench(
    raw: dict[str, Any],
    registry: Registry,
    *,
    error: BaseException | None = None,
    watchers: tuple[Recorder, ...] = (),
    run_dir: Path | None = None,
) -> tuple[list[Record], BaseException | None]:
    """Run; returns the records the first watcher saw and what was raised."""
    watchers = watchers or (Recorder(),)
    Fragile.error, Fragile.launches, Fragile.closed = error, 0, 0
    needs = {"provides": frozenset({"executor.sim"}), "requires": frozenset({"workload.truth"})}
    registry.add("executor", PluginSpec(name="fragile", factory="a:b", **needs), factory=Fragile)
    for i, watcher in enumerate(watchers):
        registry.add("observer", PluginSpec(name=f"w{i}", factory="a:b"), factory=lambda c, x, w=watcher: w)
    raw = {**raw, "executor": "fragile", "observers": [f"w{i}" for i in range(len(watchers))]}
    run = compose(validate(raw, registry), registry, run_dir=run_dir)
    raised: BaseException | None = None
    try:
        assert run.task.run(run) is None
    except BaseException as exc:
        raised = exc
    assert Fragile.closed == 1
    return watchers[0].records, raised


def test_a_good_run(raw: dict[str, Any], registry: Registry) -> None:
    records, raised = bench(raw, registry)
    assert raised is None
    first, last = records[0], records[-1]
    assert isinstance(first, RunStarted)
    assert (first.t_ns, first.info["seed"]) == (0, 7)
    assert isinstance(last, RunFinished)
    assert (last.status, last.reason) == ("ok", "")
    ends = [r for r in records if isinstance(r, RequestFinished)]
    assert [r.outcome for r in ends] == ["completed"] * 5
    assert last.t_ns == ends[-1].t_ns
    assert last.wall_s is not None and last.wall_s > 0  # real time, on the virtual clock too
    assert last.date and last.peak_rss_bytes


@pytest.mark.parametrize("simulated", [True, False])
def test_the_garbage_collector_looks_seldom_while_nothing_is_real(
    raw: dict[str, Any], registry: Registry, monkeypatch: pytest.MonkeyPatch, simulated: bool
) -> None:
    class Watcher(Recorder):
        @hookimpl
        def servelab_on_record(self, record: Record) -> None:
            super().servelab_on_record(record)
            looks.add(gc.get_threshold())

    looks: set[tuple[int, int, int]] = set()
    before = gc.get_threshold()
    monkeypatch.setattr(Fragile, "simulated", simulated)
    for error in (None, OSError("disk")):
        looks.clear()
        bench(raw, registry if error is None else Registry.load(), error=error, watchers=(Watcher(),))
        assert looks == {(max(collector.YOUNG, before[0]), *before[1:]) if simulated else before}
        assert gc.get_threshold() == before


def test_one_seed_gives_one_run(raw: dict[str, Any]) -> None:
    first, _ = bench(raw, Registry.load())
    again, _ = bench(raw, Registry.load())
    assert first == again


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", "keyboard interrupt"),
        (ServeLabError("out of luck", why="none left"), "failed", "out of luck"),
        (OSError("disk"), "failed", "OSError: disk"),
    ],
)
def test_every_end_is_announced(
    raw: dict[str, Any], registry: Registry, error: BaseException, status: str, reason: str
) -> None:
    records, raised = bench(raw, registry, error=error)
    assert raised is error or (isinstance(raised, PluginCallError) and raised.__cause__ is error)
    last = records[-1]
    assert isinstance(last, RunFinished)
    assert last.status == status
    assert reason in last.reason
    ids = {r.request for r in records if r.ev == "arrived"}  # type: ignore[attr-defined]
    assert {r.request for r in records if isinstance(r, RequestFinished)} == ids


def test_an_observer_that_fails_ends_the_run(raw: dict[str, Any], registry: Registry) -> None:
    records, raised = bench(raw, registry, watchers=(Recorder(ValueError("full"), at=4), Recorder()))
    assert isinstance(raised, PluginCallError)
    assert isinstance(raised.__cause__, ValueError)
    last = records[-1]
    assert isinstance(last, RunFinished)
    assert last.status == "failed"


def test_an_observer_that_fails_at_the_start(raw: dict[str, Any], registry: Registry) -> None:
    records, raised = bench(raw, registry, watchers=(Recorder(ValueError("full"), at=1),))
    assert isinstance(raised, PluginCallError)
    assert [r.ev for r in records] == ["run_started", "run_finished"]


def test_an_observer_that_fails_at_the_end_is_not_hidden(raw: dict[str, Any], registry: Registry) -> None:
    watcher = Recorder()
    bench(raw, registry, watchers=(watcher,))
    last = len(watcher.records)
    _, raised = bench(raw, Registry.load(), watchers=(Recorder(ValueError("full"), at=last),))
    assert isinstance(raised, PluginCallError)


def test_the_first_error_is_the_one_raised(raw: dict[str, Any], registry: Registry) -> None:
    class Stubborn(Recorder):
        @hookimpl
        def servelab_on_run_finished(self, record: RunFinished) -> None:
            raise ValueError("cannot flush")

    error = OSError("disk")
    _, raised = bench(raw, registry, error=error, watchers=(Stubborn(),))
    assert raised is not None
    assert raised.__cause__ is error
    assert any("cannot flush" in note or "raised while" in note for note in raised.__notes__)


def test_wall_clock(raw: dict[str, Any], registry: Registry) -> None:
    raw["clock"] = {"name": "wall"}
    raw["workload"] |= {"request_rate": 200.0}
    raw["cost"] = {"name": "scripted", "step_ns": 100_000}
    records, raised = bench(raw, registry)
    assert raised is None
    assert [r.outcome for r in records if isinstance(r, RequestFinished)] == ["completed"] * 5

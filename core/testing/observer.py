"""Conformance of observers: they survive every run, change none, and write only where they may."""

from __future__ import annotations

import gc
import io
import os
import random
import tempfile
import tracemalloc
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import pytest

from servelab.core.bus import Bus
from servelab.core.context import Context, seeded
from servelab.core.errors import PluginCallError, PluginError, ServeLabError
from servelab.core.records import Record, RunFinished, RunStarted, TokensEmitted, to_dict
from servelab.core.testing.recorded import Log, cut, info, steps, whole, world_named
from servelab.core.testing.suite import TOY_LIMITS, TOY_SHAPE, PluginSuite
from servelab.core.testing.worlds import serve
from servelab.core.testing.written import files_written

KIB = 1024
EXPECT = {
    "run_started": "read info with .get(): it is whatever the task says, and keys may be missing",
    "run_finished": "expect a run that ends before anything arrived, or whose beginning was not seen",
    "": "expect requests that are admitted again after a preemption, end before they are admitted, share a "
    "prompt with others, or run on another instance",
}
"""What an author may have forgotten, by the record at which an observer raised."""


class ObserverSuite(PluginSuite):
    """What is true of every observer.

    It is shown runs recorded from the real engine, whole, cut short and mixed, each in a folder of its own;
    what it prints is thrown away.
    """

    kind: ClassVar[str] = "observer"
    contract: ClassVar[str] = "servelab/core/families/observer.py, core/hookspecs.py"
    bounded: ClassVar[bool] = False
    """The observer keeps nothing per request: its memory must not grow with the run."""
    long_run: ClassVar[int] = 10_000
    """Records of the run whose memory is measured."""

    # ---------------------------------------------------------------- hooks

    def test_hooks_are_valid(self) -> None:
        """Every hook exists, is marked, and takes the record or nothing."""
        with self._folder() as folder:
            try:
                Bus([self._made(folder)])
            except PluginError as exc:
                self.fail(
                    f"{self.name}: {exc.what}; {exc.why}",
                    rule="an observer is an object whose methods implement event hooks, marked with hookimpl",
                    do=exc.do,
                    cause=exc,
                )

    # ----------------------------------------------------------------- runs

    def test_survives_every_run(self) -> None:
        """Every sort of record, as engines send them: preemptions, swaps, samples, reuse, turns, quality."""
        for log in whole():
            self._watch_alone(log)

    def test_survives_runs_cut_short(self) -> None:
        """Nothing but a beginning and an end, an end alone, interrupts and failures at every stage."""
        for log in cut():
            self._watch_alone(log)

    def test_survives_other_information(self) -> None:
        """``RunStarted.info`` is whatever a task says: keys may be missing, others may be there."""
        body = next(log for log in whole() if log.name == "one request").records[1:]
        full = info(world_named("one request"))
        for key in full:
            left = {name: value for name, value in full.items() if name != key}
            self._watch_alone(Log(f"info without {key!r}", (RunStarted(t_ns=0, info=left), *body)))
        more = RunStarted(t_ns=0, info={**full, "nobodys": {"deep": [1, None]}})
        self._watch_alone(Log("info with an unknown key", (more, *body)))

    def test_two_runs_do_not_meet(self) -> None:
        """Two observers in one process, one run each: what they write is what each writes alone."""
        log = next(log for log in whole() if log.name == "little memory")
        with self._folder() as alone, self._folder() as first, self._folder() as second:
            self._watch(self._made(alone), log)
            pair = [self._made(first), self._made(second)]
            buses = [self._bus(observer) for observer in pair]
            for record in log.records:
                for bus in buses:
                    self._emit(bus, record, log)
            wanted = {name: len(data) for name, data in _files(alone).items()}
            for folder in (first, second):
                found = {name: len(data) for name, data in _files(folder).items()}
                if found.keys() != wanted.keys():
                    self.fail(
                        f"{self.name}: beside another one it writes {sorted(found)}, alone {sorted(wanted)}",
                        rule="every run has plugins of its own",
                        do="keep state on the object, none in the class or the module",
                    )

    # ------------------------------------------------------ nothing is changed

    def test_records_are_not_changed(self) -> None:
        """Records are as they were, also those it has kept."""
        for log, mine in zip(whole(), whole(), strict=True):
            with self._folder() as folder:
                self._watch(self._made(folder), mine)
            for given, original in zip(mine.records, log.records, strict=True):
                if given != original:
                    before, after = to_dict(original), to_dict(given)
                    wrong = [name for name in after if after.get(name) != before.get(name)]
                    wrong += [name for name in before if name not in after]
                    self.fail(
                        f"{self.name} changes {', '.join(dict.fromkeys(wrong))} of a {original.ev!r} record "
                        f"at {original.t_ns} ns",
                        rule="records are shared: read them, keep them, never change them",
                        do="copy a list before sorting or extending it",
                    )

    def test_the_run_is_the_same_without_it(self) -> None:
        """A run is the same with and without it, and so is what others find: chance, folder, environment."""
        for name in ("little memory", "samples that share"):
            world = world_named(name)
            without = [to_dict(x) for x in serve(world).records]
            state, cwd, environment = random.getstate(), os.getcwd(), dict(os.environ)
            with self._folder() as folder:
                observer = self._made(folder)
                bus, log = self._bus(observer), Log(name, ())
                self._emit(bus, RunStarted(t_ns=0, info=info(world)), log)

                def show(record: Record, bus: Bus = bus, log: Log = log) -> None:
                    self._emit(bus, record, log)

                served = serve(world, emit=show)
                self._emit(bus, RunFinished(t_ns=served.records[-1].t_ns, status="ok"), log)
            with_it = [to_dict(x) for x in served.records]
            what = None
            if with_it != without:
                what = f"changes the records of the run {name!r}"
            elif random.getstate() != state:
                what = "draws from the global generator"
            elif os.getcwd() != cwd or dict(os.environ) != environment:
                what = "changes the working folder or the environment of the process"
            if what:
                self.fail(
                    f"{self.name} {what}",
                    rule="nothing is decided, everything may be watched",
                    do="read records only; chance is ctx.rng, paths are below ctx.run_dir",
                )

    # ----------------------------------------------------------------- files

    def test_writes_below_its_folder_only(self) -> None:
        """Everything it writes is below ``ctx.run_dir``, and nothing before the first record."""
        for log in (whole()[1], *cut()[:2]):
            with self._folder() as folder:
                with files_written() as early:
                    observer = self._made(folder)
                if own := self._own(early):
                    self.fail(
                        f"{self.name} writes {own[0].name} when it is made",
                        rule="write only below ctx.run_dir, and not before the first record",
                        do="open files at the first record: a run that is refused must leave no trace",
                    )
                with files_written() as written:
                    self._watch(observer, log)
                for path in self._own(written):
                    if not path.is_relative_to(folder):
                        self.fail(
                            f"{self.name} writes {path.name} outside the folder of the run, in {path.parent}",
                            rule="write only below ctx.run_dir",
                            do="make paths from ctx.run_dir, not from the working folder or your home",
                        )

    def test_without_a_folder(self) -> None:
        """With ``run_dir=None`` it refuses, saying what to do, or watches without writing."""
        log = whole()[1]
        with files_written() as written:
            try:
                observer = self._built(None)
            except ServeLabError as exc:
                if not (exc.why and exc.do):
                    self.fail(
                        f"{self.name} refuses a run without a folder and does not say what to do: {exc}",
                        rule="every error says what, where, why and what to do",
                        do="give ConfigError a why and a do",
                    )
                return
            except Exception as exc:
                self.fail(
                    f"{self.name}: without a folder its factory raises {type(exc).__name__}: {exc}",
                    rule="ctx.run_dir: None when nothing may be written",
                    do="write nothing then, or raise ConfigError with what to do",
                    cause=exc,
                )
            self._watch(observer, log)
        if own := self._own(written):
            self.fail(
                f"{self.name} writes {own[0]} in a run without a folder",
                rule="ctx.run_dir: None when nothing may be written",
                do="write nothing where run_dir is None",
            )

    def test_a_folder_in_use_is_refused(self) -> None:
        """Another run's files are not written over: it refuses, says what to do, leaves them as they were."""
        log = whole()[1]
        with self._folder() as folder:
            self._watch(self._made(folder), log)
            before = _files(folder)
            if not before:
                pytest.skip(f"{self.name} writes no files")
            refused: ServeLabError | None = None
            try:
                bus, other = self._bus(self._built(folder)), whole()[2]
                for record in other.records:
                    self._emit(bus, record, other, refusable=True)
            except ServeLabError as exc:
                refused = exc
            after = _files(folder)
            names = sorted(before.keys() | after.keys())
            changed = [name for name in names if before.get(name) != after.get(name)]
            if changed or refused is None:
                self.fail(
                    f"{self.name} writes over {', '.join(changed or names)} of the run that was there"
                    + ("" if refused is None else ", although it refuses the folder"),
                    rule="a folder that holds a run already is refused, and its files stay as they are",
                    do="look for your files in the constructor and raise ConfigError if one is there; open "
                    "them with mode 'x'",
                )
            if not (refused.why and refused.do):
                self.fail(
                    f"{self.name} refuses the folder without saying what to do: {refused}",
                    rule="every error says what, where, why and what to do",
                    do="raise ConfigError(what, where=folder, why=the files found, do=choose another folder)",
                )

    def test_files_are_closed(self) -> None:
        """After the last record nothing is buffered and no file of its is open."""
        log = whole()[1]
        with self._folder() as folder:
            observer = self._made(folder)
            self._watch(observer, log)
            before = _files(folder)
            still = [path for path in _open_files() if path.is_relative_to(folder)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # what it left open is reported below
                del observer
                gc.collect()
            if still or _files(folder) != before:
                names = [path.name for path in still] or ["a file"]
                self.fail(
                    f"{self.name}: {', '.join(names)} is still open after the last record",
                    rule="servelab_on_run_finished: once, last, whatever ended the run: flush and close here",
                    do="close every file in servelab_on_run_finished",
                )

    # ----------------------------------------------------------------- memory

    def test_memory_grows_with_the_run_at_most(self) -> None:
        """Memory grows no faster than the number of records; with ``bounded``, not at all."""
        third = self.long_run // 15
        with self._folder() as folder:
            bus, log, sizes = self._bus(self._made(folder)), Log("a long run", ()), [0]
            tracemalloc.start()
            try:
                records = list(steps(3 * third))
                base = tracemalloc.get_traced_memory()[0]
                for i, record in enumerate(records, 1):
                    self._emit(bus, record, log)
                    if i % 500 == 0:
                        sizes.append(tracemalloc.get_traced_memory()[0] - base)
                        self._reasonable(i, sizes)
            finally:
                tracemalloc.stop()
        half, last = sizes[len(sizes) // 2], sizes[-2]  # before the end, which may write out everything
        if self.bounded and last - half > 64 * KIB:
            self.fail(
                f"{self.name}: holds {half // KIB} KiB in the middle of a run of {len(records)} records, "
                f"{last // KIB} KiB at its end",
                rule="declared in the suite (bounded): memory does not grow with the run",
                do="keep counts and what is live, drop requests that have ended",
            )

    def _reasonable(self, count: int, sizes: Sequence[int]) -> None:
        half, now = sizes[len(sizes) // 2], sizes[-1]
        if now > count * 4 * KIB + 512 * KIB or now > 3 * half + 2048 * KIB:
            self.fail(
                f"{self.name}: holds {now // KIB} KiB after {count} records, {half // KIB} KiB after half of "
                "them",
                rule="an observer keeps a fact per request or record at most: runs have millions",
                do="keep numbers, not copies of lists that grow; write out what is only to be stored",
            )

    # ------------------------------------------------------------- what is used

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="servelab-suite-") as name:
            folder = Path(name).resolve() / "run"
            folder.mkdir()
            yield folder

    def make(self, **context: Any) -> Any:
        """As of every suite, in a run with a folder; it is gone when the check needs none of it."""
        if "run_dir" in context:
            return super().make(**context)
        with self._folder() as folder:
            return self._made(folder)

    def _made(self, folder: Path | None) -> Any:
        with _quiet():
            return super().make(run_dir=folder)

    def _built(self, folder: Path | None) -> Any:
        """The observer; what its factory raises is raised."""
        registry, spec, choice = self._selected
        context = Context(
            kind=self.kind,
            name=spec.name,
            rng=seeded(self.seed, self.kind, spec.name),
            model=TOY_SHAPE,
            hardware=None,
            limits=TOY_LIMITS,
            seed=self.seed,
            run_dir=folder,
        )
        with _quiet():
            return registry.resolve(self.kind, spec.name, "factory")(choice.config, context)

    def _bus(self, observer: Any) -> Bus:
        return Bus([observer])

    def _watch_alone(self, log: Log) -> None:
        with self._folder() as folder:
            self._watch(self._made(folder), log)

    def _watch(self, observer: Any, log: Log) -> None:
        bus = self._bus(observer)
        for record in log.records:
            self._emit(bus, record, log)

    def _emit(self, bus: Bus, record: Record, log: Log, refusable: bool = False) -> None:
        """Show a record; what is printed is thrown away."""
        if isinstance(record, TokensEmitted) and not bus.asks(record.ev):
            return
        try:
            with _quiet():
                bus.emit(record)
        except PluginCallError as exc:
            cause = exc.__cause__
            if refusable and isinstance(cause, ServeLabError):
                raise cause from None
            self.fail(
                f"{self.name} raises on the {record.ev!r} record of {log.name}: {exc.why}",
                rule="an observer that raises ends the run; every record may come in every run",
                do=EXPECT.get(record.ev, EXPECT[""]),
                cause=cause,
            )

    def _own(self, paths: Iterable[Path]) -> Sequence[Path]:
        return [path for path in paths if not _is_scaffolding(path)]


@contextmanager
def _quiet() -> Iterator[None]:
    """What is printed is thrown away."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _is_scaffolding(path: Path) -> bool:
    """Folders that the suite makes itself."""
    return path.name.startswith("servelab-suite-") or (
        path.name == "run" and path.parent.name.startswith("servelab-suite-")
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _open_files() -> list[Path]:
    """Regular files this process has open, where the system says."""
    handles = Path("/proc/self/fd")
    found = []
    for handle in handles.iterdir() if handles.is_dir() else ():
        try:
            found.append(Path(os.readlink(handle)))
        except OSError:
            continue  # closed meanwhile
    return found

"""Observers broken on purpose. ``Counts`` is a good one: it counts, and writes one file at the end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

from servelab.core.context import Context
from servelab.core.errors import ConfigError
from servelab.core.hookspecs import hookimpl
from servelab.core.records import Record, RequestArrived, RequestFinished, RunFinished, RunStarted, StepDone
from servelab.core.spec import PluginSpec
from servelab.core.testing.mutants import Mutant

FILE = "counts.json"


def _spec(name: str) -> PluginSpec:
    return PluginSpec(name=name, factory=f"{__name__}:Counts", summary="a toy")


class Counts:
    """Takes no settings. How long requests waited for their end, and what their prompts were together."""

    spec = _spec("counts")

    def __init__(self, config: None, context: Context) -> None:
        self.folder = context.run_dir
        if self.folder is not None and (self.folder / FILE).exists():
            raise ConfigError(
                "there is a run in this folder",
                where=str(self.folder),
                why=f"it holds {FILE}",
                do="choose another folder",
            )
        self.arrived: dict[str, int] = {}
        self.counts: dict[str, Any] = {"ended": 0, "took_ns": 0, "steps": 0, "largest": 0}

    @hookimpl
    def servelab_on_request_arrived(self, record: RequestArrived) -> None:
        self.arrived[record.request] = record.t_ns

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        self.counts["steps"] += 1
        self.counts["largest"] = max(self.counts["largest"], *record.tokens, 0)

    @hookimpl
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        self.counts["ended"] += 1
        self.counts["took_ns"] += record.t_ns - self.arrived.pop(record.request)

    @hookimpl
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        if self.folder is not None:
            self.write(self.folder / FILE, self.summary(record))

    def summary(self, record: RunFinished) -> dict[str, Any]:
        return {**self.counts, "status": record.status}

    def write(self, path: Path, data: dict[str, Any]) -> None:
        with path.open("x", encoding="utf-8") as file:
            json.dump(data, file)


# ------------------------------------------------------------------ broken


class UnknownHook(Counts):
    spec = _spec("unknown_hook")

    @hookimpl
    def servelab_on_request_finish(self, record: RequestFinished) -> None:
        """There is no such hook."""


class DividesByNothing(Counts):
    spec = _spec("divides_by_nothing")

    def summary(self, record: RunFinished) -> dict[str, Any]:
        return {**super().summary(record), "mean_ns": self.counts["took_ns"] / self.counts["ended"]}


class NeedsTheBeginning(Counts):
    spec = _spec("needs_the_beginning")

    @hookimpl
    def servelab_on_run_started(self, record: RunStarted) -> None:
        self.info = record.info

    def summary(self, record: RunFinished) -> dict[str, Any]:
        return {**super().summary(record), "schema": self.info.get("schema")}


class TrustsTheInformation(Counts):
    spec = _spec("trusts_the_information")

    @hookimpl
    def servelab_on_run_started(self, record: RunStarted) -> None:
        if record.info:
            self.counts["requests"] = record.info["workload"]["requests"]


class KnowsOneSort(Counts):
    """Believes that who is admitted was never admitted before."""

    spec = _spec("knows_one_sort")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, context)
        self.admitted: set[str] = set()

    @hookimpl
    def servelab_on_request_admitted(self, record: Any) -> None:
        if record.request in self.admitted:
            raise ValueError(f"{record.request} is admitted again")
        self.admitted.add(record.request)


class ChangesRecords(Counts):
    spec = _spec("changes_records")

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        record.tokens.sort()
        self.counts["largest"] = record.tokens[-1]


class DrawsLots(Counts):
    spec = _spec("draws_lots")

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        if random.random() < 0.5:
            self.counts["steps"] += 1


class WritesElsewhere(Counts):
    spec = _spec("writes_elsewhere")

    def write(self, path: Path, data: dict[str, Any]) -> None:
        super().write(path, data)
        (path.parent.parent / "latest.json").write_text(json.dumps(data), encoding="utf-8")


class WritesEarly(Counts):
    spec = _spec("writes_early")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, context)
        if self.folder is not None:
            (self.folder / "log.txt").touch()


class NeedsAFolder(Counts):
    spec = _spec("needs_a_folder")

    def __init__(self, config: None, context: Context) -> None:
        self.path = context.run_dir / "log.txt"  # type: ignore[operator]
        super().__init__(config, context)


class WritesOver(Counts):
    spec = _spec("writes_over")

    def __init__(self, config: None, context: Context) -> None:
        folder = context.run_dir
        if folder is not None and (folder / FILE).exists():
            (folder / FILE).unlink()
        super().__init__(config, context)


class LeavesFilesOpen(Counts):
    spec = _spec("leaves_files_open")

    def write(self, path: Path, data: dict[str, Any]) -> None:
        self.file = path.open("x", encoding="utf-8")
        self.file.write(json.dumps(data))


class KeepsCopies(Counts):
    """Every record with all that came before."""

    spec = _spec("keeps_copies")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, context)
        self.past: list[list[Record]] = [[]]

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        self.past.append([*self.past[-1], record])


class SharesItsState(Counts):
    spec = _spec("shares_its_state")
    written: ClassVar[set[str]] = set()

    def write(self, path: Path, data: dict[str, Any]) -> None:
        if (key := f"{data['ended']} {data['took_ns']} {data['status']}") not in self.written:
            super().write(path, data)
        self.written.add(key)


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="observer", plugin=plugin, original=Counts, check=check, message=message, breaks=breaks
    )


MUTANTS = (
    _mutant(
        UnknownHook,
        "test_hooks_are_valid",
        "did you mean 'servelab_on_request_finished'?",
        "has a hook that does not exist",
    ),
    _mutant(
        KnowsOneSort,
        "test_survives_every_run",
        "raises on the 'admitted' record",
        "believes that a request is admitted once",
    ),
    _mutant(
        DividesByNothing,
        "test_survives_runs_cut_short",
        "a run without requests: ZeroDivisionError",
        "divides by the number of requests that ended",
    ),
    _mutant(
        NeedsTheBeginning,
        "test_survives_runs_cut_short",
        "a run of which only the end was seen: AttributeError",
        "cannot end without having seen the beginning",
    ),
    _mutant(
        TrustsTheInformation,
        "test_survives_other_information",
        "info without 'workload': KeyError",
        "believes that the first record always names the workload",
    ),
    _mutant(
        ChangesRecords,
        "test_records_are_not_changed",
        "changes tokens of a 'step' record",
        "sorts a list of a record in place",
    ),
    _mutant(
        DrawsLots,
        "test_the_run_is_the_same_without_it",
        "draws from the global generator",
        "draws from the generator that everybody shares",
    ),
    _mutant(
        WritesElsewhere,
        "test_writes_below_its_folder_only",
        "writes latest.json outside the folder of the run",
        "writes beside the folder of the run",
    ),
    _mutant(
        WritesEarly,
        "test_writes_below_its_folder_only",
        "open files at the first record",
        "opens its file when it is made",
    ),
    _mutant(
        NeedsAFolder,
        "test_without_a_folder",
        "write nothing then, or raise ConfigError",
        "takes for granted that there is a folder",
    ),
    _mutant(
        WritesOver,
        "test_a_folder_in_use_is_refused",
        "writes over counts.json of the run that was there",
        "removes what an earlier run wrote",
    ),
    _mutant(
        LeavesFilesOpen,
        "test_files_are_closed",
        "counts.json is still open after the last record",
        "does not close its file at the end",
    ),
    _mutant(
        KeepsCopies,
        "test_memory_grows_with_the_run_at_most",
        "keep numbers, not copies of lists that grow",
        "keeps with each record a list of all before",
    ),
    _mutant(
        SharesItsState,
        "test_two_runs_do_not_meet",
        "keep state on the object, none in the class",
        "keeps in its class what was written",
    ),
)

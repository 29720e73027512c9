"""The sweeper: as Hydra's basic one, but jobs do not end one another, and a sweep can be taken up again."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from servelab.core import __version__
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.interrupt import Interruptions, interrupted_by, taking
from servelab.core.registry import Registry, import_target
from servelab.plugins.sweeps.folder import (
    ERROR_FILE,
    LOCK_FILE,
    STOP_FILE,
    JobState,
    bare,
    dict_of,
    differing,
    files_of,
    job_folders,
    read_state,
)
from servelab.plugins.sweeps.job import Job

log = logging.getLogger("servelab.sweep")

LOST = "the process that looked after it was lost"


class Sweeper(HydraSweeper):
    """Sweeps over comma-separated values, as Hydra's own.

    Args:
        max_batch_size: jobs handed to the launcher at once; None: all.
        params: overrides of the sweep by key, as if they stood on the command line.
        comparison: ``module:function``, called with the sweep's folder when the sweep is over, however it
            ended; it prints and writes the comparison of the jobs.
        summary: ``module:function`` that says in a few words what the job of a folder measured.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        comparison: str = "",
        summary: str = "",
    ) -> None:
        self._max_batch_size, self._params = max_batch_size, params or {}
        self._comparison, self._summary = comparison, summary

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        # absolute: the folder must mean the same in every process
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._job = Job(task_function, self._folder, self._summary, process=os.getpid())
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=self._job, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs that are not finished.

        Raises:
            CompactHydraException: the folder is not this sweep's.
            SystemExit: jobs failed.
            KeyboardInterrupt: the sweep was ended; running jobs have ended as interrupted.
        """
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # Hydra loads it in its own time

        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*(f"{k}={v}" for k, v in self._params.items()), *arguments])
        batches = BasicSweeper.split_arguments(overrides, self._max_batch_size)
        jobs = [job for batch in batches for job in batch]
        self._job.total, self._job.swept = len(jobs), frozenset(differing([dict_of(job) for job in jobs]))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _alone(self._folder):
                states = self._enlist(jobs)
                _limit_parallel(self.launcher, self.config, [state.config for state in states])
                OmegaConf.save(self.config, self._folder / "multirun.yaml")
                (self._folder / STOP_FILE).unlink(missing_ok=True)
                return self._launch(batches)
        except ServeLabError as error:
            raise CompactHydraException(f"servelab: {error}") from error
        except OSError as error:
            raise CompactHydraException(f"servelab: {_unwritable(self._folder, error)}") from error

    def _launch(self, batches: Sequence[list[list[str]]]) -> list[Any]:
        assert self.launcher is not None
        Registry.load()  # once, what every job needs and no job changes: forked processes have it
        stop, results, first = _Stop(self._folder), [], 0
        with taking(stop):
            try:
                for batch in batches:
                    results.append(self._launch_batch(batch, first))
                    first += len(batch)
                    if stop.first is not None:
                        raise interrupted_by(stop.first)
            finally:
                (self._folder / STOP_FILE).unlink(missing_ok=True)
                trouble = self._compare() + _trouble(list(job_folders(self._folder)), self._folder)
                sys.stderr.write(trouble)
        if trouble:
            sys.exit(1)  # an exception would be told once more by Hydra
        return results

    def _launch_batch(self, batch: list[list[str]], first: int) -> Any:
        assert self.launcher is not None
        try:
            return self.launcher.launch(batch, initial_job_idx=first)
        except Exception as error:  # jobs raise none
            raise ServeLabError(
                "the launcher gave up before all jobs had run",
                where=f"hydra.launcher, {type(self.launcher).__name__}",
                why=f"{type(error).__name__}: {' '.join(str(error).split())}",
                do="run the same command with the same hydra.sweep.dir: it goes on with what is left",
            ) from error

    def _compare(self) -> str:
        """Let the jobs be compared; what went wrong there, which harms no job."""
        try:
            if self._comparison:
                import_target(self._comparison)(self._folder)
        except Exception as error:
            log.debug("comparing the jobs failed", exc_info=error)
            text = str(error) if isinstance(error, ServeLabError) else f"{type(error).__name__}: {error}"
            return f"servelab: the jobs could not be compared: {text}\n"
        return ""

    def _enlist(self, jobs: Sequence[Sequence[str]]) -> list[JobState]:
        """Compose every job before any runs, and note those that are new in this folder.

        Raises:
            ConfigError: the folder is another sweep's, or holds runs that are not a sweep's.
        """
        assert self.config is not None and self.hydra_context is not None
        found: dict[Path, JobState] = {}
        for number, overrides in enumerate(jobs):
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.num = cfg.hydra.job.id = number
            folder, log_file = self._folder / str(cfg.hydra.sweep.subdir), f"{cfg.hydra.job.name}.log"
            plain = OmegaConf.to_container(cfg, resolve=False)
            assert isinstance(plain, dict)
            config = {str(key): value for key, value in plain.items() if key != "hydra"}
            if folder in found:
                raise _same_folder(folder, found[folder].number, number)
            state = read_state(folder)
            if state is None:
                _check_unused(folder, log_file)
            elif state.config != config:
                raise _other_settings(folder, state, config)
            new = JobState(number=number, overrides=list(overrides), config=config, servelab=__version__)
            found[folder] = state or new
        for folder, state in found.items():
            if state.status == "waiting":
                state.write(folder)
        return list(found.values())


class _Stop(Interruptions):
    """The first signal ends the sweep: running jobs are told by a file, wherever they run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(raises=False)
        self._file = folder / STOP_FILE

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self._file.write_text(str(number))
        super().__call__(number, frame)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder; its jobs hold the lock as well."""
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                "another sweep is running in this folder",
                where=str(folder),
                do="wait for its end, or choose another hydra.sweep.dir",
            ) from error
        yield


def _limit_parallel(launcher: Any, config: DictConfig, configs: Sequence[Mapping[str, Any]]) -> None:
    """Launchers of parallel jobs (joblib's) start one job at a time where a model runs, unless asked."""
    settings = getattr(launcher, "joblib", None)
    if settings is None:
        return
    stated = any(
        str(one).lstrip("+").startswith("hydra.launcher.n_jobs=") for one in config.hydra.overrides.hydra
    )
    if not stated and settings.get("n_jobs") == -1 and any(_computes(one) for one in configs):
        settings["n_jobs"] = 1
        log.warning(
            "jobs run one at a time, as those that run a model would compete for the cores and measure each "
            "other; hydra.launcher.n_jobs=N runs N side by side"
        )
    if settings.get("n_jobs", 1) != 1:
        cores = os.cpu_count() or 1
        wanted = settings["n_jobs"] if settings["n_jobs"] > 0 else cores + 1 + settings["n_jobs"]
        settings["n_jobs"] = max(1, min(wanted, len(configs)))  # a worker without a job would die of Ctrl-C


def _computes(config: Mapping[str, Any]) -> bool:
    """Whether the job's executor really computes, so that its time depends on what runs beside it."""
    name = str((config.get("executor") or {}).get("name"))
    try:
        return "executor.sim" not in Registry.load().spec("executor", name).provides
    except ServeLabError:
        return False  # the job says so itself


def _trouble(jobs: Sequence[tuple[Path, JobState]], sweep: Path) -> str:
    """What to say of jobs that are not finished: of each that failed number, settings, message and log."""
    unfinished = [state for _, state in jobs if state.status != "ok"]
    failed = [(folder, state) for folder, state in jobs if state.status in ("failed", "running")]
    if not unfinished:
        return ""
    lines = [f"servelab: {len(failed)} of {len(jobs)} jobs failed"] if failed else []
    for folder, state in failed:
        path = folder / ERROR_FILE
        text = path.read_text(encoding="utf-8").strip().removeprefix("servelab: ") if path.exists() else ""
        text = text.partition("\nTraceback ")[0].strip()  # that is in the file
        lines += [f"\njob {state.number}: {' '.join(bare(state.overrides))}"]
        lines += [f"  {line}" for line in (text or state.reason or LOST).splitlines()]
        files = f"{ERROR_FILE}, and the .log beside it" if text else "the .log there"
        lines += [f"  log:   {folder}: {files}"]
    lines += [f"\n{len(unfinished)} of {len(jobs)} jobs are not finished. The same command with"]
    return "\n".join([*lines, f"hydra.sweep.dir={sweep} runs these and skips the others.\n"])


def _check_unused(folder: Path, log_file: str) -> None:
    found = [name for name in files_of(folder) if name != log_file] if folder.exists() else []
    if found:
        raise ConfigError(
            "the folder of a job holds files that no sweep of ours left there; nothing was run",
            where=str(folder),
            why=f"found {', '.join(found)}",
            do="choose another hydra.sweep.dir, or remove the files",
        )


def _same_folder(folder: Path, first: int, second: int) -> ConfigError:
    return ConfigError(
        f"jobs {first} and {second} have the same folder; nothing was run",
        where=str(folder),
        why="hydra.sweep.subdir gives both this name",
        do="leave hydra.sweep.subdir out, or let it name what differs between jobs",
    )


def _other_settings(folder: Path, state: JobState, config: Mapping[str, Any]) -> ConfigError:
    old, new = dict(_leaves(state.config)), dict(_leaves(config))
    missing = "(not stated)"
    changes = [
        f"{key}: {old.get(key, missing)!r} there, {new.get(key, missing)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
    return ConfigError(
        f"job {state.number} of this folder has other settings; nothing was run",
        where=str(folder),
        why="; ".join(changes) or "the same values are written in another way",
        do="repeat the command of the sweep as it was, or choose another hydra.sweep.dir",
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _unwritable(folder: Path, error: OSError) -> ServeLabError:
    return ServeLabError(
        "the sweep's folder cannot be written",
        where=str(error.filename or folder),
        why=error.strerror or str(error),
        do="free space or choose another hydra.sweep.dir",
    )

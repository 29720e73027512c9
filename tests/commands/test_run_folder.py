"""Which run a user means, and what is said when there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.commands.runs import write
from tests.metrics.logs import arrived, ended, started

from servelab.core.errors import LogError, ServeLabError
from servelab.core.run_folder import RunFolder, RunFolderError


def make(folder: Path, name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["results.json", "events.jsonl", "plan.jsonl"])
def test_a_folder_or_a_file_in_it(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    (tmp_path / "servelab.log").write_text("")
    for given in (tmp_path, tmp_path / name, tmp_path / "servelab.log", str(tmp_path)):
        assert RunFolder.find(given).path == tmp_path


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run") as error:
        RunFolder.find(tmp_path / "nothing")
    assert error.value.why == "there is no such folder" and error.value.do
    with pytest.raises(RunFolderError, match="there is no run") as error:
        RunFolder.find(tmp_path)
    assert "it holds none of events.jsonl" in error.value.why


def test_a_sweep_names_its_jobs_in_their_order(tmp_path: Path) -> None:
    for job in range(14):
        make(tmp_path / str(job))
    make(tmp_path / "nested" / "deeper")
    with pytest.raises(RunFolderError, match="a folder of runs") as error:
        RunFolder.find(tmp_path)
    assert error.value.why == "it holds 15, as those of a sweep or of a day do"
    first, *rest = error.value.do.removeprefix("name one of them: ").split(", ")
    assert first == str(tmp_path / "0")
    assert rest[:9] == [str(tmp_path / str(job)) for job in range(1, 10)]
    assert error.value.do.endswith("and 3 more")


def test_the_last_run_is_the_one_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match="no last run"):
        RunFolder.find("last")
    old, new = make(Path("outputs/2030-01-01/09-00")), make(Path("multirun/2026-01-01/10-00/3"))
    os.utime(old / "results.json", (1, 1))
    assert RunFolder.find("last").path == new
    os.utime(new / "results.json", (0, 0))
    assert RunFolder.find("last").path == old
    make(Path("last"))  # a folder of that name is what it says
    assert RunFolder.find("last").path == Path("last")


def test_a_log_that_was_not_written_says_why(tmp_path: Path) -> None:
    run = write(tmp_path, [started(), ended(1)], plans=False)
    assert run.info()["model"] == "tiny"
    with pytest.raises(RunFolderError, match=r"no plan\.jsonl") as error:
        run.plans()
    assert "its setting 'plans' was false" in error.value.why
    with pytest.raises(RunFolderError, match=r"no results\.json") as error:
        run.results()
    assert "observer 'report'" in error.value.why


@pytest.mark.parametrize("text", ["{oops", "[1]", ""])
def test_results_that_are_none(tmp_path: Path, text: str) -> None:
    (make(tmp_path) / "results.json").write_text(text)
    with pytest.raises(LogError, match="not a JSON object"):
        RunFolder.find(tmp_path).results()


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    run = write(tmp_path, [started(), arrived(0, "a"), ended(1)])
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [record.ev for record in run.events()] == ["run_started", "arrived"]
    assert isinstance(json.loads(path.read_text().splitlines()[0]), dict)
    assert issubclass(RunFolderError, ServeLabError)

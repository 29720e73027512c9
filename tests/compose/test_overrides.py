"""Both spellings of a choice mean the same, and a misspelt section is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from servelab.core.errors import ConfigError, ServeLabError, nearest
from servelab.core.overrides import check_choices, normalize


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("scheduler=x", "+scheduler=x"),
        ("+scheduler=x", "+scheduler=x"),
        ("scheduler=a,b", "+scheduler=a,b"),
        ("hardware=a100", "+hardware=a100"),
        ("experiment=p_fig3", "+experiment=p_fig3"),
        ("executor=x", "executor=x"),
        ("+executor=x", "executor=x"),
        ("scheduler.field=1", "++scheduler.field=1"),
        ("+scheduler.field=1", "++scheduler.field=1"),
        ("workload.prompt_length.value=1", "++workload.prompt_length.value=1"),
        ("engine.checks=full", "++engine.checks=full"),
        ("scheduler={name:x,f:1}", "++scheduler={name:x,f:1}"),
        ("quant=null", "++quant={name:null}"),
        ("+quant=none", "++quant={name:null}"),
        ("slo=none", "slo=none"),  # a file of that name
        ("seed=1,2", "seed=1,2"),
        ("observers=[a,b]", "observers=[a,b]"),
        ("hydra.run.dir=x=y", "hydra.run.dir=x=y"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("~quant", "~quant"),
        ("model@draft=toy", "model@draft=toy"),
        ("+theirs=x", "+theirs=x"),
        ("--help", "--help"),
    ],
)
def test_rewriting(given: str, wanted: str) -> None:
    assert normalize([given]) == [wanted]


def test_a_plugin_within_another_is_named_beside_its_settings() -> None:
    """Hydra cannot set a field of what is a word."""
    given = ["workload.of=x", "workload.of.rate=2", "+workload.of.law={law: a}", "workload.of.law.max=3"]
    assert normalize(given) == [
        "++workload.of.name=x",
        "++workload.of.rate=2",
        "++workload.of.law={law: a}",
        "++workload.of.law.max=3",
    ]
    assert normalize(["workload.of=x,y", "workload.off.rate=2"]) == [
        "++workload.of=x,y",
        "++workload.off.rate=2",
    ]


@pytest.mark.parametrize("flag", ["-sc", "--cfg", "--info", "--config-dir", "-cd", "--package"])
def test_values_of_flags_are_left_alone(flag: str) -> None:
    assert normalize([flag, "query=bash", "scheduler=x"]) == [flag, "query=bash", "+scheduler=x"]


def test_another_primary_configuration_is_left_alone() -> None:
    args = ["--config-name=mine", "scheduler=x", "whatever=1"]
    assert normalize(args) == args


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("observers.report.tbt_ms=20", "'observers=[jsonl,progress,{name: report, tbt_ms: 20}]'"),
        ("observers.0.events=false", "'observers=[{name: jsonl, events: false},progress,report]'"),
        ("observers.1.mode=off", "'observers=[jsonl,{name: progress, mode: off},report]'"),
        ("++observers.mine.x=1", "'observers=[jsonl,progress,report,{name: mine, x: 1}]'"),
    ],
)
def test_settings_of_an_observer_are_written_into_the_list(given: str, form: str) -> None:
    with pytest.raises(ConfigError, match="observers is a list") as error:
        normalize([given])
    assert form in error.value.do


@pytest.mark.parametrize(("given", "nearest"), [("shceduler=x", "scheduler"), ("enigne.lanes=2", "engine")])
def test_misspelt_section(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {nearest!r}") as error:
        normalize([given])
    assert given in error.value.where


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model=llama-2-7b", "did you mean 'llama2_7b'?"),
        ("model=Qwen2.5-7B", "did you mean 'qwen2_5_7b'?"),
        ("model=meta-llama/Llama-2-7b-hf", "did you mean 'llama2_7b'?"),
        ("model=/models/mine", "model=local model.path=/models/mine"),
        ("+hardware=a100", "did you mean 'a100_80g' or 'a100_40g'?"),
        ("+hardware=A100-80GB", "did you mean 'a100_80g'?"),
        ("workload=sharegpt", "did you mean 'sharegpt_like' or "),
        ("+cost=splitwise", "did you mean 'splitwise_llama2_70b_h100' or "),
        ("+scheduler=past-future", "did you mean 'pastfuture'?"),
    ],
)
def test_a_name_as_others_spell_it(given: str, said: str) -> None:
    """Also names of configuration files, which are no plugin's."""
    with pytest.raises(ServeLabError) as error:
        check_choices([given])
    assert said in error.value.do


def test_names_that_are_near() -> None:
    assert nearest("A_B", ["ab", "ab_c"]).startswith("did you mean 'ab'? known")
    assert nearest("", ["ab"]) == "known: ab"
    assert nearest("x", ["xyz"]) == "known: xyz"  # one letter is not the beginning of a name
    assert nearest("--", ["ab"]) == "known: ab"
    assert nearest("l2", ["l2_a", "l2_b", "l2_c", "l2_d"]).count("'") == 6


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"], ["-cd", "{}"]])
def test_names_of_ones_own_folder_are_known_and_their_files_are_yaml(tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text("name: mine\nflops: 2.1e+14\n")
    (tmp_path / "hardware" / "torn.yaml").write_text("name: torn\nflops: [1\n")
    (tmp_path / "hardware" / "latin.yaml").write_bytes(b"name: \xe9\n")
    folder = [part.format(tmp_path) for part in flag]
    fine = [*folder, "+hardware=mine", "model=llama3_8b", "seed=1"]
    assert check_choices(fine) == fine
    with pytest.raises(ConfigError, match="unknown hardware 'min'") as unknown:
        check_choices([*folder, "+hardware=min"])
    assert unknown.value.do.startswith("did you mean 'mine'?") and "a100_80g" in unknown.value.do
    with pytest.raises(ConfigError, match="a configuration file is no YAML") as torn:
        check_choices([*folder, "+hardware=mine,torn"])
    assert torn.value.where == f"{tmp_path}/hardware/torn.yaml, line 3, column 1"
    assert "expected ',' or ']'" in torn.value.why
    with pytest.raises(ConfigError, match="a configuration file is no YAML") as latin:
        check_choices([*folder, "+hardware=latin"])
    assert latin.value.where == f"{tmp_path}/hardware/latin.yaml"


def test_ones_own_folder_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, why in (("nothing", "is not there"), ("file", "is a file")):
        with pytest.raises(ConfigError, match="there is no folder") as missing:
            check_choices([f"--config-dir={tmp_path / name}", "+hardware=mine"])
        assert missing.value.why == f"{tmp_path / name} {why}"


@pytest.mark.parametrize(
    ("args", "what", "do"),
    [
        (["model", "=", "toy"], "'model' is no setting", "write model=... without spaces"),
        (["executor:sim"], "'executor:sim' is no setting", "--help"),
        (["workload={name:", "synthetic}"], "a bracket is not closed", "'workload=...'"),
        (
            ["workload.steps=[{step:", "scale}]"],
            "a bracket is not closed",
            "quote the whole setting: 'workload.steps=",
        ),
        (
            ["+hardware=l4", "hardware=h100"],
            "hardware is chosen twice",
            "keep one; to compare them: -m hardware=l4,h100",
        ),
    ],
)
def test_what_the_shell_has_cut_or_is_there_twice(args: list[str], what: str, do: str) -> None:
    with pytest.raises(ConfigError) as error:
        normalize(args)
    assert error.value.what == what and do in error.value.do


@pytest.mark.parametrize(
    "args",
    [
        ["--cfg", "job", "~quant", "-m"],
        ["workload.steps=[{step: scale, by: 2}]", "workload.path='a[b'", "model.path=a\\{b"],
        ["scheduler=orca", "scheduler.max_num_seqs=3", "hydra/launcher=joblib", "model=toy", "model=toy"],
    ],
)
def test_what_is_written_as_hydra_reads_it_passes(args: list[str]) -> None:
    assert len(normalize(args)) == len(args)

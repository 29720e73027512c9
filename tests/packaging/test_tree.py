"""The checkout hangs together: links, tables, YAML, versions, names written in two places."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import servelab.core
from servelab.core import overrides
from servelab.core.config import PLUGIN_SECTIONS, RunConfig, Section
from servelab.core.families import KINDS
from servelab.core.hookspecs import EVENT_OF_RECORD, Events, Registration
from servelab.core.registry import EVENT_HOOKS, HOOKS, Registry
from servelab.plugins.commands.show import SECTIONS

REGISTRY = Registry.load()
IN_TREE = [key for key, provider in sorted(REGISTRY.providers.items()) if provider.distribution == "servelab"]


@pytest.mark.parametrize("name", ["core", "plugins", "configs"])
def test_link_names_its_folder(repository: Path, name: str) -> None:
    link = repository / "src" / "servelab" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.samefile(repository / name)


def test_code_runs_from_the_folders_themselves(repository: Path) -> None:
    assert Path(servelab.core.__file__) == repository / "core" / "__init__.py"


def test_version_is_stated_once_per_reader(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == servelab.core.__version__


def test_every_registration_hook_has_a_kind_and_the_reverse() -> None:
    declared = {name for name in vars(Registration) if name.startswith("servelab_")}
    assert declared == set(HOOKS)


def test_every_event_hook_is_fired_by_a_record() -> None:
    assert {name for name in vars(Events) if name.startswith("servelab_")} == EVENT_HOOKS
    assert {"servelab_on_record", *EVENT_OF_RECORD.values()} == EVENT_HOOKS


def test_every_kind_has_a_section() -> None:
    assert set(PLUGIN_SECTIONS) <= set(RunConfig.model_fields)
    assert set(PLUGIN_SECTIONS.values()) == set(KINDS)
    assert set(RunConfig.model_fields) == overrides.SECTIONS


def test_every_field_of_ours_is_documented() -> None:
    for section in (RunConfig, *_sections()):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith((".", ";")), f"{section.__name__}.{name}"


def _sections(base: type[BaseModel] = Section) -> list[type[BaseModel]]:
    """Models of our own; not those that other tests derive from ours."""
    ours = [model for model in base.__subclasses__() if model.__module__.startswith("servelab.core.config.")]
    return ours + [below for model in ours for below in _sections(model)]


def test_every_section_of_ours_can_be_shown() -> None:
    """``servelab show SECTION`` and the reference page know each."""
    own = set(RunConfig.model_fields) - set(PLUGIN_SECTIONS) - {"seed"}
    assert set(SECTIONS) == own
    for section, name in SECTIONS.items():
        annotation = str(RunConfig.model_fields[section].annotation)
        assert f".{name}'" in annotation or f".{name} " in annotation


def test_defaults_list_is_what_the_command_line_assumes(repository: Path) -> None:
    config = yaml.safe_load((repository / "configs" / "config.yaml").read_text(encoding="utf-8"))
    first, *groups = config["defaults"]
    assert first == "_self_"
    assert {
        name for group in groups for name in group if not name.startswith("override ")
    } == overrides.CHOSEN
    techniques = {kind.name for kind in KINDS.values() if kind.technique} & config.keys()
    assert all(config[kind].keys() == {"name"} for kind in techniques)


def test_nothing_in_the_tree_is_broken() -> None:
    assert [str(b) for b in REGISTRY.broken if b.provider and b.provider.distribution == "servelab"] == []
    assert len(IN_TREE) >= 8


@pytest.mark.parametrize(("kind", "name"), IN_TREE)
class TestInTreePlugin:
    def test_imports(self, kind: str, name: str) -> None:
        spec = REGISTRY.spec(kind, name)
        if reason := REGISTRY.unavailable(spec):
            pytest.skip(f"{kind} {name} cannot run here: {reason}")
        assert callable(REGISTRY.resolve(kind, name, "factory"))
        model = REGISTRY.resolve(kind, name, "config")
        assert model is None or issubclass(model, BaseModel)

    def test_settings_are_strict_and_documented(self, kind: str, name: str) -> None:
        spec = REGISTRY.spec(kind, name)
        model = None if REGISTRY.unavailable(spec) else REGISTRY.resolve(kind, name, "config")
        if model is None:
            pytest.skip("takes no settings, or cannot run here")
        assert model.model_config.get("extra") == "forbid"
        assert model.model_config.get("frozen") is True
        assert "name" not in model.model_fields
        assert [field for field, info in model.model_fields.items() if not info.description] == []

    def test_declares_what_it_is(self, kind: str, name: str) -> None:
        spec = REGISTRY.spec(kind, name)
        assert spec.summary
        assert not spec.summary.endswith(".")
        assert spec.factory.startswith(f"servelab.plugins.{KINDS[kind].folder}.")

    def test_has_a_yaml_file(self, repository: Path, kind: str, name: str) -> None:
        if kind == "observer":
            pytest.skip("observers are chosen by a list, not by a group")
        content = yaml.safe_load((repository / "configs" / kind / f"{name}.yaml").read_text(encoding="utf-8"))
        assert _own(kind, content)["name"] == name


def test_every_yaml_file_of_a_kind_names_a_plugin(repository: Path) -> None:
    for kind in KINDS:
        for path in (repository / "configs" / kind).glob("*.yaml"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert REGISTRY.spec(kind, _own(kind, content)["name"])


def _own(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """The kind's own section of a file, which may set other sections as well."""
    own: dict[str, Any] = content.get(kind, content)
    return own


def test_every_group_folder_is_known(repository: Path) -> None:
    groups = {path.parent.name for path in (repository / "configs").glob("*/*.yaml")}
    assert groups <= overrides.TECHNIQUES | overrides.CHOSEN


def test_tested_versions_cover_the_dependencies(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_name(line) for line in lines if line and not line.startswith("#")}
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    assert {_name(line) for line in wanted} - {"servelab"} <= pinned
    assert "triton" not in pinned  # CUDA builds of torch want their own


def _name(requirement: str) -> str:
    for mark in "[<>=; ":
        requirement = requirement.partition(mark)[0]
    return requirement.lower().replace("_", "-")

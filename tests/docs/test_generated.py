"""Pages made from code are up to date, and what they are made from is described."""

from __future__ import annotations

import re
from pathlib import Path

import generate_docs
import pytest
from docs_pages import api, markdown, plugins, records
from docs_pages.source import members

from servelab.core.families import KINDS
from servelab.core.hookspecs import Commands, Events, Registration

COMMAND = "python tools/generate_docs.py --write"
DOCS = markdown.DOCS
SKELETON = ["## Deviations", "## Faithful when"]
IDS = [f"{kind}-{name}" for kind, name in plugins.IN_TREE]


@pytest.fixture(scope="module")
def wanted() -> dict[Path, str]:
    pytest.importorskip("torch", reason="settings of executor 'torch' are read from its module")
    return generate_docs.outputs() | generate_docs.indexes_of()


def test_everything_is_up_to_date(wanted: dict[Path, str]) -> None:
    late = [str(path.relative_to(markdown.ROOT)) for path in generate_docs.stale(wanted)]
    assert not late, f"out of date: {', '.join(late)}; run: {COMMAND}"


def test_making_them_again_changes_nothing(wanted: dict[Path, str]) -> None:
    assert generate_docs.outputs() | generate_docs.indexes_of() == wanted


@pytest.mark.parametrize("group", [Registration, Commands, Events])
def test_every_hook_has_its_exact_signature(group: type, wanted: dict[Path, str]) -> None:
    page = wanted[DOCS / "reference" / "hooks.md"]
    for hook in members(group):
        told = f"```python\ndef {hook.name}{hook.signature}: ...\n```\n\n{markdown.prose(hook.doc)}"
        assert f"### `{hook.name}`\n\n{told}" in page


@pytest.mark.parametrize(
    "cls", [c for _, group in api.GROUPS.values() for c in group], ids=lambda c: c.__name__
)
def test_every_field_of_views_and_plans_is_described(cls: type) -> None:
    silent = [m.name for m in members(cls) if not m.doc and m.name != "run"]
    if cls.__name__ == "Tokens":
        silent = []  # slots without annotations: its docstring lists its arguments
    assert not silent, f"{cls.__module__}.{cls.__name__} does not say what these are: {silent}"


def test_every_record_is_listed(wanted: dict[Path, str]) -> None:
    page = wanted[DOCS / "reference" / "records.md"]
    for ev, cls in records.RECORDS.items():
        assert f"## `{ev}`" in page
        for member in members(cls):
            assert f"| `{member.name}` |" in page, f"{cls.__name__}.{member.name}"


@pytest.mark.parametrize(("kind", "name"), plugins.IN_TREE, ids=IDS)
def test_a_technique_is_told_by_one_skeleton(kind: str, name: str) -> None:
    """Heading, what it does, facts, a command, deviations, when it is faithful, the tests that hold it."""
    path = plugins.page_of(kind, name)
    text = path.read_text(encoding="utf-8")
    places = [
        text.find(f"<!-- {what} of {kind} {name}: begin -->") for what in ("facts", "deviations", "tests")
    ]
    assert min(places) > 0 and places == sorted(places), f"{path.name} lacks a part of its skeleton"
    headings = re.findall(r"^## .*$", text, re.M)
    assert [h for h in headings if h in SKELETON] == SKELETON, f"{path.name} has the headings {headings}"
    chosen = {f"{kind}={name}", f"observers=[{name}]", f"+experiment={name}"}
    shown = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))
    picked = any(word in shown for word in chosen) or re.search(rf"observers=\[.*\b{name}\b", shown)
    default = {("executor", "scripted"), ("cost", "scripted")}  # what +experiment=scripted selects
    assert picked or ((kind, name) in default and "+experiment=scripted" in shown), (
        f"{path.name} shows no command"
    )


@pytest.mark.parametrize(("kind", "name"), plugins.IN_TREE, ids=IDS)
def test_deviations_are_those_of_the_docstring(kind: str, name: str) -> None:
    spec = plugins.IN_TREE[kind, name]
    stated = [" ".join(item.replace("``", "").split()) for item in plugins.stated_deviations(spec)]
    assert list(spec.deviations) == stated, (
        f"{plugins.source_file(spec)} and the table of its folder differ; the docstring says it in full"
    )


def test_every_page_of_techniques_belongs_to_a_plugin() -> None:
    owned = {plugins.page_of(kind, name) for kind, name in plugins.IN_TREE}
    for folder in ("techniques", "experiments"):
        pages = {p for p in (DOCS / folder).glob("*.md") if p.name != "index.md"}
        assert pages == {p for p in owned if p.parent.name == folder}


def test_kinds_without_plugins_are_said_to_have_none(wanted: dict[Path, str]) -> None:
    page = wanted[DOCS / "techniques" / "index.md"]
    for kind in KINDS:
        assert (f"## {kind}\n" in page) == any(kind == one for one, _ in plugins.IN_TREE), kind
        assert f"`{kind}`" in page or f"## {kind}\n" in page

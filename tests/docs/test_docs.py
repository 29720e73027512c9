"""The documentation is checked: links lead somewhere, code compiles, the shown plugins run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from docs_pages.markdown import anchor

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.hookspecs import EVENT_OF_RECORD, Commands, Events, Registration
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)#\s]+)(#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for lang, code in FENCE.findall(page.read_text()) if lang == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    dead = [
        target
        for target, _ in LINK.findall(text)
        if "://" not in target and not (page.parent / target).resolve().exists()
    ]
    assert not dead, f"{page.relative_to(ROOT)} links to files that do not exist: {dead}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {anchor(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading)) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_anchors_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"(?<!!)\[[^\]]+\]\(([^)#\s:]*)#([^)\s]+)\)", text)
    dead = [
        f"{target}#{name}"
        for target, name in links
        if name not in anchors((page.parent / target).resolve() if target else page)
    ]
    assert not dead, f"{page.relative_to(ROOT)} links to headings that do not exist: {dead}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def _serve(name: str, source: str, cls: str, config: str | None, tmp_path: Path) -> dict[str, Any]:
    """Run a scheduler given as source text through a composed run; returns its terminal counts."""
    space: dict[str, Any] = {"__name__": "shown"}
    exec(compile(source, name, "exec"), space)
    registry = Registry.load()
    registry.add(
        "scheduler",
        PluginSpec(name=name, factory="shown:X", config="shown:Y" if config else None),
        factory=space[cls],
        config=space[config] if config else None,
    )
    raw = {
        "scheduler": {"name": name},
        "kvcache": {"name": "paged"},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted", "num_kv_pages": 64},
        "workload": {"name": "synthetic", "num_requests": 24, "request_rate": 100},
        "task": {"name": "bench"},
        "observers": [],
        "engine": {"checks": "full", "max_model_len": 1024},
        "model": dict(
            name="toy",
            layers=2,
            hidden=64,
            heads=2,
            kv_heads=1,
            head_dim=32,
            ffn=128,
            vocab=100,
            max_position=2048,
        ),
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    return dict(run.engine.ended)


def test_the_scheduler_of_the_readme_runs(tmp_path: Path) -> None:
    (source,) = (block for block in blocks(ROOT / "README.md", "python") if "class Newest" in block)
    ended = _serve("readme_newest", source, "Newest", None, tmp_path)
    assert ended == {**dict.fromkeys(ended, 0), "completed": 24}


def test_the_scheduler_of_the_how_to_runs(tmp_path: Path) -> None:
    sources = blocks(ROOT / "docs/howto/add_a_scheduler.md", "python")
    (source,) = [s for s in sources if "class Newest" in s]
    ended = _serve("howto_newest", source, "Newest", "NewestConfig", tmp_path)
    assert ended == {**dict.fromkeys(ended, 0), "completed": 24}


def test_every_record_has_its_event_hook() -> None:
    from servelab.core.records import RECORDS

    assert set(EVENT_OF_RECORD) == set(RECORDS)
    assert {*EVENT_OF_RECORD.values(), "servelab_on_record"} == {
        n for n in vars(Events) if n.startswith("servelab_")
    }


def test_every_kind_has_its_registration_hook() -> None:
    from servelab.core.families import KINDS

    assert {kind.hook for kind in KINDS.values()} == {
        n for n in vars(Registration) if n.startswith("servelab_")
    }


def test_every_hook_says_what_it_is_for() -> None:
    for group in (Registration, Commands, Events):
        for name, hook in vars(group).items():
            if name.startswith("servelab_"):
                assert hook.__doc__ and hook.__doc__.strip().endswith("."), name


def test_metrics_of_the_engine_page_match_the_code() -> None:
    """The event order table is the code's."""
    from servelab.core import events

    rows = re.findall(
        r"^\| (\d) \| `(\w+)` \|", (ROOT / "docs/explanation/engine.md").read_text(), re.MULTILINE
    )
    assert {name: int(order) for order, name in rows} == {
        name: cls.ORDER for name, cls in vars(events).items() if hasattr(cls, "ORDER")
    }

"""The site is built in strict mode, finds every page, and fetches nothing while it is read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mkdocs_hooks
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
needs_mkdocs = pytest.mark.skipif(
    find_spec("material") is None, reason="needs the extra 'docs': mkdocs-material"
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As ``.ci/run`` does it: ``--quiet`` would hide warnings from ``--strict`` too."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
@pytest.mark.parametrize("link", ["nowhere.md", "logs.md#nowhere"])
def test_a_link_that_leads_nowhere_stops_the_build(link: str, tmp_path: Path) -> None:
    for name in ("mkdocs.yml", "tools/mkdocs_hooks.py", "docs/site.css", "docs/reference/logs.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "reference" / "logs.md").write_text("# Logs\n", encoding="utf-8")
    page = tmp_path / "docs" / "reference" / "index.md"
    page.write_text("# Start\n\n[logs](logs.md)\n", encoding="utf-8")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    page.write_text(f"# Start\n\n[away]({link})\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and link in done.stderr


@needs_mkdocs
def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES:
        target = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / target).exists() and f'href="{target}"' in start, f"the site does not lead to {target}"


@needs_mkdocs
def test_nothing_is_fetched(site: Path) -> None:
    """Links that a reader may follow are fine; what a browser would load by itself is not."""
    loads = re.compile(r"<(?:link|script|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\s>]*")
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?https?://", sheet.read_text(encoding="utf-8"))


def test_sections_are_the_folders() -> None:
    folders = {p.name for p in (ROOT / "docs").iterdir() if p.is_dir()}
    assert folders == set(mkdocs_hooks.SECTIONS), "tools/mkdocs_hooks.py states the sections of the site"
    for folder in folders:
        assert (ROOT / "docs" / folder / "index.md").exists()


def test_no_network_is_configured() -> None:
    class Loader(yaml.SafeLoader):
        """Tags of Python objects are left alone."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert config["strict"] is True and config["theme"]["font"] is False
    assert "repo_url" not in config and "edit_uri" not in config


def test_links_out_of_the_docs_become_paths() -> None:
    class File:
        src_uri = "reference/logs.md"

    class Page:
        file = File

    told = mkdocs_hooks.on_page_markdown("[look](../../README.md#around), [here](metrics.md#x)", page=Page)
    assert told == "look (`README.md`), [here](metrics.md#x)"

"""``servelab data list`` and ``servelab data fetch NAME``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from servelab.core.errors import nearest
from servelab.core.user_cache import DATA, cache_root
from servelab.plugins.commands.data.catalog import CATALOG, DataSet
from servelab.plugins.commands.data.download import DataError, download


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        DataError: the name is not known, or the file cannot be fetched.
    """
    args = _parser().parse_args(argv)
    if args.action == "list":
        _list(as_json=args.json)
    else:
        _fetch(args.name, args.url, args.to, again=args.again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab data",
        description="Published traces of LLM services. They are not part of ServeLab: each is fetched from "
        "its publisher, under its publisher's licence.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|fetch")
    listed = actions.add_parser("list", help="what there is, and what is here already")
    listed.add_argument("--json", action="store_true", help="machine-readable")
    fetch = actions.add_parser("fetch", help="get one; workload.path=NAME then finds it")
    fetch.add_argument("name", metavar="NAME", help="as data list says it")
    fetch.add_argument("--url", help="another address of the same file")
    fetch.add_argument(
        "--to", type=Path, metavar="DIR", help="folder to write to; data/ in ServeLab's cache by default"
    )
    fetch.add_argument("--again", action="store_true", help="also if it is here already")
    return parser


def _list(*, as_json: bool) -> None:
    folder = cache_root() / DATA
    here = {name: folder / f"{name}{one.suffix}" for name, one in CATALOG.items()}
    if as_json:
        found = {
            name: {**asdict(one), "path": str(here[name]) if here[name].is_file() else None}
            for name, one in CATALOG.items()
        }
        print(json.dumps({"schema_version": 1, "folder": str(folder), "data": found}, indent=2))
        return
    wide = max(map(len, CATALOG))
    for name, one in CATALOG.items():
        mark = "fetched" if here[name].is_file() else ""
        print(
            f"{name:<{wide}}  {one.size:<12}  {one.licence:<10}  workload={one.workload:<8}  {mark}".rstrip()
        )
        print(f"{'':<{wide}}  {one.what}; {one.publisher}")
    print(f"\nservelab data fetch NAME puts one into {folder}; workload.path=NAME then finds it.")


def _fetch(name: str, url: str | None, to: Path | None, *, again: bool) -> None:
    one = CATALOG.get(name)
    if one is None:
        raise DataError(
            f"no data set is called {name!r}", where="servelab data fetch", do=nearest(name, CATALOG)
        )
    folder = cache_root() / DATA if to is None else to.expanduser()
    path = folder / f"{name}{one.suffix}"
    if path.is_file() and not again:
        print(f"{name} is here already: {path} (--again fetches it anew)")
        return
    address = url or one.url
    print(f"{one.what} ({one.size}, {one.licence}, {one.publisher})\nfrom {address}", flush=True)
    sha256 = download(address, path, sha256=one.sha256, git_blob=one.git_blob)
    _record(one, path, address, sha256)
    print(f"to   {path} ({path.stat().st_size:,} bytes)")
    print(f"     {_checked(one, sha256)}")
    stated = name if to is None else str(path)
    print(f"use  python run.py workload={one.workload} workload.path={stated}")


def _checked(one: DataSet, sha256: str) -> str:
    if one.sha256 or one.git_blob:
        return "it is the published file: its hash is the one we know"
    return f"no hash of it is known; SHA-256 {sha256} is noted beside it"


def _record(one: DataSet, path: Path, url: str, sha256: str) -> None:
    """What the file is and where it is from, beside it."""
    about = {
        "name": one.name,
        "what": one.what,
        "publisher": one.publisher,
        "licence": one.licence,
        "url": url,
        "sha256": sha256,
        "bytes": path.stat().st_size,
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

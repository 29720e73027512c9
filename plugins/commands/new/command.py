"""``servelab new KIND NAME``: arguments in, a folder and the next steps out."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from servelab.core.errors import PluginError
from servelab.core.families import KINDS
from servelab.core.registry import Registry
from servelab.plugins.commands.new.kinds import OFFERS
from servelab.plugins.commands.new.names import Names, checked_names
from servelab.plugins.commands.new.write import write_package


def main(argv: Sequence[str]) -> None:
    """Write a package and print what to do next, or list what can be made.

    Raises:
        PluginError: unknown kind, a name that is taken or none, or a folder that cannot be made.
    """
    args = _parser().parse_args(argv)
    if args.list:
        _print_kinds()
        return
    if args.kind is None or args.name is None:
        raise PluginError(
            "what is to be made?",
            where="command line: servelab new KIND NAME",
            do=f"such as servelab new {args.kind if args.kind in OFFERS else 'scheduler'} my_idea; the kinds "
            "there are: servelab new --list",
        )
    names = checked_names(args.kind, args.name, args.package, Registry.load())
    target = Path(args.dir or names.distribution)
    written = write_package(names, target)
    _print_done(names, target, written)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servelab new",
        description="Write a package that can be installed, tested and run as it is: a small plugin that "
        "works, marked where your own idea goes, its settings, its tests.",
    )
    parser.add_argument("kind", metavar="KIND", nargs="?", help=", ".join(OFFERS))
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the plugin, as in +scheduler=NAME")
    parser.add_argument("--dir", metavar="D", help="folder to make; default ./servelab-NAME")
    parser.add_argument("--package", metavar="P", help="what it is imported as; default servelab_NAME")
    parser.add_argument("--list", action="store_true", help="the kinds, one line each")
    return parser


def _print_kinds() -> None:
    width = max(map(len, OFFERS))
    for kind, offer in OFFERS.items():
        print(f"{kind:<{width}}  decides: {KINDS[kind].decides}")
        print(f"{'':<{width}}  starts as: {offer.starts_as}")


def _print_done(names: Names, target: Path, written: Sequence[str]) -> None:
    offer = OFFERS[names.kind]
    print(f"{names.kind} {names.name!r} is in {target}:")
    for path in written:
        print(f"  {path}")
    print("\nNext:")
    steps = [
        (f"cd {shlex.quote(str(target))}", ""),
        ('pip install -e ".[test]"', ""),
        ("pytest", f"its own tests, and the contract of every {names.kind}"),
        (f"servelab plugins {names.kind}", f"{names.name}, from {names.distribution} 0.1.0"),
        (f"servelab {offer.run.format(name=names.name)}", offer.about_run),
    ]
    for command, about in steps:
        print(f"  {command}" + (f"   # {about}" if about else ""))
    print(f"\nYour idea goes into src/{names.package}/, where it says YOUR IDEA.")

"""``--help``, without Hydra: it would take longer with every plugin, and this must not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from servelab.core.overrides import TECHNIQUES
from servelab.core.registry import Registry, config_packages

USAGE = """\
servelab: write an LLM-serving technique once as a plugin; run it on a real engine and in a simulator.

  python run.py                                    the default run: a real model serves chat requests
  python run.py +experiment=scripted               placeholder tokens at stated prices on the virtual clock;
                                                   needs no model and no torch
  python run.py executor=sim model=llama2_7b hardware=a100_80g workload=burstgpt
                                                   a model and a device that you do not have: memory and
                                                   time as described, neither weights nor torch
  python run.py model=local model.path=PATH        another model: a folder or a GGUF file
  python run.py model=hub model.repo=OWNER/NAME    another model: one of the Hugging Face hub
  python run.py +scheduler=NAME +quant=NAME         choose parts (kind=name and +kind=name are the same)
  python run.py engine.max_batch_tokens=2048       set a field
  python run.py -m +experiment=scripted seed=0,1,2
                                                   a sweep: one job per combination, then a comparison;
                                                   the same with hydra.sweep.dir=FOLDER goes on where it
                                                   ended; with hydra/launcher=joblib in parallel, which
                                                   needs: pip install -e ".[sweep]"
  python run.py -v ... | -vv ... | -q ...          log what is composed | of all libraries | warnings only
  python run.py plugins [KIND] [--json]            all plugins: papers, tiers, what is disabled and why
  python run.py show KIND NAME                     the settings of one plugin
  python run.py show engine                        of a section: engine, slo, model, clock, cluster, ...
  python run.py COMMAND --help                     what one of the commands below takes
  python run.py -p no:PACKAGE ...                  leave an installed package out
  python run.py ... --cfg job                      show the composed configuration and stop
  python run.py --version | --hydra-help           versions; Hydra's own flags

`servelab` is the same command once the package is installed. SERVELAB_TRACEBACK=1 shows where an error came
from.
"""


def show_help() -> None:
    """Print usage, groups with their choices, and the default configuration."""
    print(USAGE)
    print("Commands")
    commands = list_commands()
    width = max(map(len, commands))
    for name, summary in commands.items():
        print(f"  {name:<{width}}  {summary}")
    print("\nChoices")
    groups = choices()
    for group in sorted(groups):
        sign = "+" if group in TECHNIQUES else " "
        print(f"  {sign}{group + '=':<12} {', '.join(sorted(groups[group]))}")
    print("\nThe default run")
    for line in _default_run():
        print(f"  {line}")


def list_commands() -> dict[str, str]:
    """Subcommand -> summary."""
    declared = Registry.load().commands
    return {name: declared[name].summary for name in sorted(declared)}


def choices(more: Iterable[Path] = ()) -> dict[str, set[str]]:
    """Group -> names, from the YAML files of this package, of installed ones and of further folders."""
    found: dict[str, set[str]] = defaultdict(set)
    packages = ["servelab.configs", *(p.package for p in config_packages() if p.problem is None)]
    for root in (*_folders(packages), *more):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and not group.startswith("hydra/"):
                found[group].add(file.stem)
    return found


def _folders(packages: list[str]) -> Iterator[Path]:
    for package in packages:
        spec = find_spec(package)
        yield from map(Path, (spec and spec.submodule_search_locations) or ())


def _default_run() -> Iterator[str]:
    """Our part of ``configs/config.yaml``, as it is written."""
    (root, *_) = _folders(["servelab.configs"])
    text = (root / "config.yaml").read_text(encoding="utf-8")
    yield from text[text.index("defaults:") :].partition("\nhydra:")[0].strip().splitlines()

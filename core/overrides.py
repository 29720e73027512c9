"""Makes the command line forgiving: Hydra's three spellings (``k=v``, ``+k=v``, ``++k=v``) become one.

Whether a ``+`` is needed depends on whether a group is in the defaults list and whether a field is in a YAML
file. Users cannot know either, and Hydra's messages about it mislead, so both spellings are accepted:

- ``scheduler=x`` and ``+scheduler=x`` choose a technique; ``executor=x`` and ``+executor=x`` a fixed part;
- ``scheduler.field=v`` sets a field whether or not a file mentions it (pydantic refuses unknown ones);
- ``quant=null`` (or ``none``) leaves a part out;
- ``workload.of=x workload.of.field=v`` chooses a plugin within another's settings and sets its fields;
- a misspelt section is refused here, with the nearest name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from servelab.core.errors import ConfigError, nearest
from servelab.core.families import KINDS

TECHNIQUES = frozenset(kind.name for kind in KINDS.values() if kind.technique) | {"hardware", "experiment"}
"""Groups outside the defaults list: Hydra wants a ``+``."""
CHOSEN = frozenset({"executor", "workload", "task", "model", "clock", "slo"})
"""Groups in the defaults list: Hydra refuses a ``+``."""
SECTIONS = frozenset("observers" if kind == "observer" else kind for kind in KINDS) | {
    "seed",
    "model",
    "hardware",
    "engine",
    "cluster",
    "slo",
    "clock",
    "quality",
}
"""The fields of ``RunConfig``, which is not imported: pydantic would cost ``--help`` a third of its time."""
USUAL_OBSERVERS = ("jsonl", "progress", "report")
"""The list in ``configs/config.yaml``."""
ROOTS = SECTIONS | TECHNIQUES | {"hydra"}

_OVERRIDE = re.compile(r"(?P<sign>\+{0,2})(?P<key>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)
_NAMES = re.compile(r"[A-Za-z_]\w*(,[A-Za-z_]\w*)*")
_OTHER_CONFIG = ("-cn", "-cp", "--config-name", "--config-path")
_TAKES_VALUE = frozenset(
    {*_OTHER_CONFIG, "-cd", "--config-dir", "-p", "--package", "-sc", "-c", "--cfg", "-i", "--info"}
)


def normalize(argv: Sequence[str]) -> list[str]:
    """Rewrite the overrides among Hydra's arguments.

    Raises:
        ConfigError: an override names a section that does not exist, or is none; a technique is chosen twice.
    """
    if any(arg.partition("=")[0] in _OTHER_CONFIG for arg in argv):
        return list(argv)  # another primary configuration has its own sections
    out: list[str] = []
    skip = False
    keys = [arg.partition("=")[0].lstrip("+") for arg in argv]
    for arg in argv:
        if not skip and not arg.startswith(("-", "~")):
            _check_form(arg)
        match = None if skip or arg.startswith("-") else _OVERRIDE.fullmatch(arg)
        skip = arg in _TAKES_VALUE
        if match is None:
            out.append(arg)
            continue
        stated = match.groupdict()
        beside = any(key.startswith(stated["key"] + ".") for key in keys)
        if beside and "." in stated["key"] and _NAMES.fullmatch(stated["value"]):
            stated["key"] += ".name"  # the name and the settings go into one mapping
        out.append(_rewrite(arg, **stated))
    chosen = [arg.partition("=")[0] for arg in out if arg.partition("=")[0][1:] in TECHNIQUES]
    if twice := next((group[1:] for group in chosen if chosen.count(group) > 1), None):
        names = [arg.partition("=")[2] for arg in out if arg.startswith(f"+{twice}=")]
        raise ConfigError(
            f"{twice} is chosen twice",
            where=f"command line: {', '.join(f'{twice}={name}' for name in names)}",
            do=f"keep one; to compare them: -m {twice}={','.join(names)}",
        )
    return out


def _check_form(arg: str) -> None:
    """What the shell has cut or the user has written apart, which Hydra answers in its parser's words."""
    key, stated, value = arg.partition("=")
    if not stated:
        raise ConfigError(
            f"{arg!r} is no setting",
            where="command line",
            why="settings are written KEY=VALUE",
            do=f"write {key}=... without spaces, or see python run.py --help",
        )
    if not any(quote in value for quote in "'\"\\") and any(
        value.count(left) != value.count(right) for left, right in ("[]", "{}")
    ):
        raise ConfigError(
            "a bracket is not closed",
            where=f"command line: {arg}",
            why="the shell cuts what is not quoted at its spaces",
            do=f"quote the whole setting: '{key}=...'",
        )


def _rewrite(arg: str, sign: str, key: str, value: str) -> str:
    root, _, rest = key.partition(".")
    if root not in ROOTS:
        if sign:
            return arg  # a stranger's own group; pydantic has the last word
        raise ConfigError(
            f"unknown section {root!r}",
            where=f"command line: {arg}",
            do=nearest(root, ROOTS),
        )
    if root == "hydra":
        return arg
    if root == "observers" and rest:
        raise _not_a_section(arg, rest, value)
    if rest:
        return f"++{key}={value}" if root in SECTIONS else arg
    if root in SECTIONS and root in KINDS.keys() | {"hardware"} and value in ("null", "none"):
        return f"++{key}={{name:null}}"
    if value.startswith("{"):
        return f"++{key}={value}"  # a whole section, not the name of a file
    if root in TECHNIQUES:
        return f"+{key}={value}"
    if root in CHOSEN:
        return f"{key}={value}"
    return arg


def _not_a_section(arg: str, rest: str, value: str) -> ConfigError:
    """``observers`` is a list: Hydra cannot set a field of an entry."""
    name, _, field = rest.partition(".")
    if name.isdigit():
        name = USUAL_OBSERVERS[int(name) % len(USUAL_OBSERVERS)]
    whole = _listed(name, field or "FIELD", value)
    return ConfigError(
        "observers is a list; the settings of an observer are written into it",
        where=f"command line: {arg}",
        do=f"state the whole list, quoted for the shell: 'observers=[{whole}]'",
    )


def _listed(name: str, field: str, value: str) -> str:
    """The default list with one field set, in Hydra's spelling."""
    entry = f"{{name: {name}, {field}: {value}}}"
    entries = [entry if one == name else one for one in USUAL_OBSERVERS]
    return ",".join(entries if name in USUAL_OBSERVERS else [*entries, entry])


def check_choices(argv: Sequence[str]) -> list[str]:
    """Refuse names that nobody knows, before Hydra does it without the nearest name or a package's fault.

    A plugin without a YAML file of its own is chosen all the same. Of a file in the user's own folder
    (``--config-dir``) the syntax is checked.

    Raises:
        ConfigError: no such choice, or no such folder; a file of it is no YAML.
        PluginError: no such plugin, with the packages that could not be loaded.
    """
    if any(arg.partition("=")[0].lstrip("+") in _OTHER_PLACES for arg in argv):
        return list(argv)
    own = _own_folder(argv)
    return [_check_choice(arg, own) for arg in argv]


def _own_folder(argv: Sequence[str]) -> Path | None:
    """The folder that ``--config-dir`` names."""
    for arg, following in pairwise([*argv, ""]):
        flag, stated, value = arg.partition("=")
        if flag in ("-cd", "--config-dir"):
            folder = Path(value if stated else following)
            if not folder.is_dir():
                raise ConfigError(
                    f"there is no folder {str(folder)!r}",
                    where=f"command line: {flag}",
                    why=f"{folder.absolute()} is {'a file' if folder.exists() else 'not there'}",
                    do="name the folder that holds hardware/NAME.yaml, model/NAME.yaml and the like",
                )
            return folder
    return None


def _check_syntax(file: Path) -> None:
    import yaml  # what Hydra reads it with

    try:
        yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        mark = getattr(exc, "problem_mark", None)
        raise ConfigError(
            "a configuration file is no YAML",
            where=f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(file),
            why=getattr(exc, "problem", None) or str(exc),
            do="mend it: a bracket, a quotation mark or the spaces before a key are wrong there or before",
        ) from exc


_OTHER_PLACES = frozenset({*_OTHER_CONFIG, "hydra.searchpath"})
_CHOICE = re.compile(r"\+?(?P<group>\w+)=(?P<names>[\w./-]+(,[\w./-]+)*)")


def _check_choice(arg: str, own: Path | None = None) -> str:
    match = _CHOICE.fullmatch(arg)
    if match is None or match["group"] not in TECHNIQUES | CHOSEN:
        return arg
    from servelab.core.help import choices

    group, names = match["group"], match["names"].split(",")
    for file in (own / group / f"{name}.yaml" for name in names if own):
        if file.is_file():
            _check_syntax(file)
    found = choices([own] if own else [])
    known = found.get(group, set()) | {
        f"{folder.removeprefix(group + '/')}/{name}"
        for folder, inside in found.items()
        if folder.startswith(group + "/")
        for name in inside
    }
    unknown = [name for name in names if name not in known]
    if not unknown:
        return arg
    if group not in KINDS:
        do = nearest(unknown[0], known)
        if group == "model" and "/" in unknown[0]:
            do = f"a checkpoint is model=local model.path={unknown[0]}, or model=hub model.repo=...; {do}"
        raise ConfigError(f"unknown {group} {unknown[0]!r}", where=f"command line: {arg}", do=do)
    from servelab.core.registry import Registry

    registry = Registry.load()
    for name in unknown:
        if name not in registry.names(group):
            registry.unknown(group, name, known)
    return f"++{group}.name={match['names']}"

"""Whether a plugin's declaration is well formed. Specs come from strangers, so nothing is taken on trust."""

from __future__ import annotations

import re
from typing import get_args

from servelab.core.spec import HOOK_API, Paper, PluginSpec, Runs, Tier
from servelab.core.vocabulary import unknown_capabilities

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_MODULE = re.compile(r"[A-Za-z_][\w.]*")


class WrongApi(TypeError):
    """Written for another hook API."""

    do = ""


def check_spec(spec: object) -> PluginSpec:
    """Return the spec if every field has its type.

    Raises:
        WrongApi: another major version of the hook API.
        TypeError: anything else; the message names the field.
    """
    if not isinstance(spec, PluginSpec):
        raise TypeError(f"the hook returned {spec!r:.60}, not a PluginSpec")
    # the version first: the meaning of other fields may depend on it
    _require(isinstance(spec.api, str), "api", spec.api, 'a string such as "1"')
    if spec.api.split(".")[0] != str(HOOK_API[0]):
        raise _wrong_api(spec)
    _require(_matches(_NAME, spec.name), "name", spec.name, "lower-case letters, digits and _ . -")
    _require(spec.name != "none", "name", spec.name, "another word: 'none' means no plugin")
    _require(_matches(_PATH, spec.factory), "factory", spec.factory, '"package.module:Attribute"')
    for field in ("config", "probe", "describe_model", "diagnose"):
        value = getattr(spec, field)
        _require(value is None or _matches(_PATH, value), field, value, '"package.module:Attribute" or None')
    _require(isinstance(spec.summary, str), "summary", spec.summary, "a string")
    _require(isinstance(spec.oracle, bool), "oracle", spec.oracle, "True or False")
    _require(
        spec.paper == "baseline" or isinstance(spec.paper, Paper),
        "paper",
        spec.paper,
        'a Paper or "baseline"',
    )
    _require(spec.tier in get_args(Tier), "tier", spec.tier, " or ".join(map(repr, get_args(Tier))))
    for field in ("provides", "requires", "conflicts"):
        value = getattr(spec, field)
        ok = isinstance(value, (frozenset, set)) and all(isinstance(item, str) for item in value)
        _require(ok, field, value, "a frozenset of strings")
        if unknown := unknown_capabilities(sorted(value)):
            raise TypeError(f"field {field!r}: {' '.join(unknown)}")
    for field in ("deviations", "imports", "runs"):
        value = getattr(spec, field)
        ok = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        _require(ok, field, value, "a tuple of strings")
    _require(all(_matches(_MODULE, m) for m in spec.imports), "imports", spec.imports, "names of modules")
    _require(
        bool(spec.runs) and set(spec.runs) <= set(get_args(Runs)),
        "runs",
        spec.runs,
        f"one or more of {', '.join(get_args(Runs))}",
    )
    return spec


def _wrong_api(spec: PluginSpec) -> WrongApi:
    ours = HOOK_API[0]
    error = WrongApi(f"it was written for hook API {spec.api}, this servelab has {ours}.{HOOK_API[1]}")
    newer = spec.api.split(".")[0].isdecimal() and int(spec.api.split(".")[0]) > ours
    error.do = "upgrade servelab" if newer else f"upgrade its package to one written for API {ours}"
    return error


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise TypeError(f"field {field!r} is {value!r:.60}, must be {rule}")

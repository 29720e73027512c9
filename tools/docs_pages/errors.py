"""docs/reference/errors.md: the error classes, and every message the source can raise."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from docs_pages.markdown import ROOT, page, prose, table
from servelab.core import errors
from servelab.core.errors import ServeLabError

INTRO = """Every error a user can see is a `ServeLabError` with four parts: **what** failed, **where**
(plugin, step, request, file or setting), **why** (the value met and the limit or rule it broke) and what
to **do**. The command line prints them without a traceback and ends with status 1; `SERVELAB_TRACEBACK=1`
shows where one came from. From Python they are raised as they are, with `.what`, `.where`, `.why` and
`.do`."""

MESSAGES = """Read from the source: wherever `core/` or `plugins/` (`core/testing` apart) states the first
part of an error on the spot, with `{...}` for what is filled in. Errors that are put together elsewhere
(several problems of a configuration in one message, for instance) are not in the list."""


def render() -> str:
    parts = [INTRO, "## Classes"]
    classes = [
        cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, ServeLabError)
    ]
    rows = []
    for cls in classes:
        bases = "" if cls is ServeLabError else f"`{cls.__mro__[1].__name__}`"
        rows.append(
            (f"[`{cls.__name__}`](#{cls.__name__.lower()})", bases, prose(cls.__doc__).partition("\n")[0])
        )
    found = _messages({cls.__name__ for cls in classes})
    own = sorted(found.keys() - {cls.__name__ for cls in classes})
    for name in own:
        module, base, doc = _declared()[name]
        rows.append(
            (f"[`{name}`](#{name.lower()})", f"`{base}`", f"{prose(doc).partition(chr(10))[0]} (`{module}`)")
        )
    parts += [table(("class", "is a", "meaning"), rows), "## Messages", MESSAGES]
    for name in [*(cls.__name__ for cls in classes), *own]:
        lines = [(f"`{what}`", f"`{module}`") for what, module in sorted(set(found.get(name, [])))]
        parts += [f"### {name}", table(("what", "raised in"), lines) if lines else "None on the spot."]
    return page("Errors", *parts)


def _sources() -> Iterator[Path]:
    for folder in ("core", "plugins"):
        yield from (p for p in sorted((ROOT / folder).rglob("*.py")) if "testing" not in p.parts)


@cache
def _declared() -> dict[str, tuple[str, str, str]]:
    """Subclasses declared outside ``core/errors.py``: name -> (module, base, docstring)."""
    found: dict[str, tuple[str, str, str]] = {}
    known = {name for name, cls in vars(errors).items() if inspect.isclass(cls)}
    for path in _sources():
        if path == ROOT / "core" / "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.bases and isinstance(node.bases[0], ast.Name):
                base = node.bases[0].id
                if base in known:
                    known.add(node.name)
                    found[node.name] = (str(path.relative_to(ROOT)), base, ast.get_docstring(node) or "")
    return found


def _messages(classes: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Error class -> (message, module) of each place that states one."""
    names = classes | _declared().keys()
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in _sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        makers = {name: (name, 0) for name in names} | _helpers(tree, names)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or (made := makers.get(_called(node))) is None:
                continue
            cls, place = made
            what = _template(node.args[place]) if len(node.args) > place else None
            if what:
                found[cls].append((what, str(path.relative_to(ROOT))))
    return found


def _called(node: ast.Call) -> str:
    """``Name(...)`` or ``self.name(...)``."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self":
        return node.func.attr
    return ""


def _helpers(tree: ast.Module, names: Collection[str]) -> dict[str, tuple[str, int]]:
    """Functions of a module that pass their ``what`` on to an error: name -> (class, its place)."""
    found: dict[str, tuple[str, int]] = {}
    for _ in range(2):  # a helper may call another one
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [a.arg for a in node.args.args if a.arg != "self"]
            if "what" not in arguments:
                continue
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and call.args and ast.unparse(call.args[0]) == "what":
                    cls = _called(call) if _called(call) in names else found.get(_called(call), ("", 0))[0]
                    if cls:
                        found[node.name] = (cls, arguments.index("what"))
    return found


def _template(node: ast.expr) -> str | None:
    """The literal of a message, with ``{...}`` where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else _hole(part) for part in node.values
        )
    else:
        return None
    return " ".join(text.replace("`", "'").split())


def _hole(part: ast.expr) -> str:
    assert isinstance(part, ast.FormattedValue)
    inner = part.value
    if isinstance(inner, ast.Attribute):
        return f"{{{inner.attr}}}"
    return f"{{{inner.id}}}" if isinstance(inner, ast.Name) else "{...}"

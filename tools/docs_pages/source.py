"""What the source says about the members of a class: annotations, defaults and the text below each."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Member:
    """One field, property or method."""

    name: str
    kind: str
    """``field``, ``property`` or ``method``."""
    signature: str
    """Type and default of a field, type of a property, arguments and result of a method."""
    doc: str


def members(cls: type) -> list[Member]:
    """The public members a class states itself, in the order of its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = tree.body[0]
    assert isinstance(body, ast.ClassDef)
    found = [
        one
        for node, after in zip(body.body, [*body.body[1:], None], strict=True)
        if (one := _member(node, after))
    ]
    return [one for one in found if not one.name.startswith("_")]


def _member(node: ast.stmt, after: ast.stmt | None) -> Member | None:
    if isinstance(node, ast.FunctionDef):
        doc = ast.get_docstring(node) or ""
        decorators = {ast.unparse(d) for d in node.decorator_list}
        if "property" in decorators:
            return Member(node.name, "property", ast.unparse(node.returns) if node.returns else "", doc)
        return Member(node.name, "method", signature(node), doc)
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        if "ClassVar" in ast.unparse(node.annotation):
            return None
        value = node.value
        text, default = _string(after), ""
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "_live":  # a property of RequestView
            text = ast.literal_eval(value.args[1])
            return Member(node.target.id, "property", ast.unparse(node.annotation), text)
        if value is not None:
            default = f" = {_default(value)}"
        return Member(node.target.id, "field", ast.unparse(node.annotation) + default, text)
    return None


def _string(node: ast.stmt | None) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return inspect.cleandoc(node.value.value)
    return ""


def _default(value: ast.expr) -> str:
    """A default as a reader wants it: ``field(default_factory=list)`` is ``[]``."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {k.arg: k.value for k in value.keywords}
        if "default" in given:
            return ast.unparse(given["default"])
        if "default_factory" in given:
            made = ast.unparse(given["default_factory"])
            return {"list": "[]", "dict": "{}", "tuple": "()"}.get(made, f"{made}()")
    return ast.unparse(value)


def signature(node: ast.FunctionDef) -> str:
    """``(a: int) -> str``, without ``self``."""
    arguments = node.args
    kept = ast.arguments(
        posonlyargs=arguments.posonlyargs,
        args=[a for a in arguments.args if a.arg != "self"],
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=arguments.kw_defaults,
        kwarg=arguments.kwarg,
        defaults=arguments.defaults,
    )
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(kept)}){result}"

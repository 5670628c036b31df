"""How a thing is called, read from its source without importing it.

Importing what the catalogue lists would load torch, and a listing should not. The syntax tree says the same: the
signature of a function, of a class's ``__init__`` or of a dataclass's fields, and the first sentence of the docstring.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from setpoint.errors import InputError

_ROOT = Path(__file__).parents[2]
_HOPS = 5


@dataclass(frozen=True)
class Signature:
    """What can be said of a callable from its source.

    Args:
        module: Dotted name of the module that defines it.
        name: Its name there.
        call: Its parameters as written, ``"(model, *, deep: bool = False)"``; "" for what is no callable.
        summary: First sentence of its docstring.
    """

    module: str
    name: str
    call: str
    summary: str


def signature(path: str) -> Signature:
    """Read how ``"setpoint.module:attribute"`` is called.

    Args:
        path: Import path as in the catalogue. A name that the module itself imports is followed to its home.

    Raises:
        InputError: There is no such module, or nothing of that name at its top level.

    >>> signature("setpoint.errors:nearest").call
    '(name: str, known: Iterable[str], count: int = 3, *, likeness: float = 0.0) -> list[str]'
    """
    module, _, name = path.partition(":")
    for _ in range(_HOPS):
        source = _source(module)
        for node in _tree(source).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return Signature(module, name, _call(node), _first_sentence(node))
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return Signature(module, name, "", "")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return Signature(module, name, "", "")
        module, name = _followed(_tree(source), module, name, is_package=source.name == "__init__.py")
    raise InputError(f"{path}: followed {_HOPS} imports and found no definition")


def _source(module: str) -> Path:
    base = _ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    raise InputError(f"there is no module {module}: neither {base}.py nor {base}/__init__.py exists")


@cache
def _tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def _followed(tree: ast.Module, module: str, name: str, *, is_package: bool) -> tuple[str, str]:
    """Module and name behind ``from … import name``."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".") if is_package else module.split(".")[:-1]
                    home = parts[: len(parts) - node.level + 1] if node.level else []
                    return ".".join([*home, *([node.module] if node.module else [])]), alias.name
    raise InputError(f"the module {module} defines nothing called {name}")


def _call(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"({', '.join(_parameters(node.args))}){returns}"
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return f"({', '.join(_parameters(member.args)[1:])})"
    return f"({', '.join(_field(member) for member in node.body if _is_field(member))})"


def _parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter as a person writes it; `ast.unparse` leaves no space around the default of an annotated one."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    written = [_parameter(a, default) for a, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        written.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        written.append("*" + _parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        written.append("*")
    written += [_parameter(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        written.append("**" + _parameter(arguments.kwarg, None))
    return written


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if annotation else "="
    return argument.arg + annotation + (equals + ast.unparse(default) if default else "")


def _is_field(member: ast.stmt) -> bool:
    return isinstance(member, ast.AnnAssign) and "ClassVar" not in ast.unparse(member.annotation)


def _field(member: ast.stmt) -> str:
    assert isinstance(member, ast.AnnAssign)
    value = f" = {ast.unparse(member.value)}" if member.value else ""
    return f"{ast.unparse(member.target)}: {ast.unparse(member.annotation)}{value}"


def _first_sentence(node: ast.ClassDef | ast.FunctionDef) -> str:
    paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
    return " ".join(paragraph.split())

"""What a result depends on, as one short hash.

The code part is the import closure of a study within setpoint: the study's own module and every module of setpoint that
it imports, directly or through others, also inside functions. A name that a package only re-exports is followed to
where it is defined, so that a change in one layer does not make the results of another stale. Comments, docstrings and
layout do not count. The engine itself is left out: it decides what is run and judged, not what a run gives; when that
changes, `EXECUTION` goes up.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = "setpoint"
EXECUTION = 1
"""Goes up when the engine seeds or runs a run differently."""

_OUTSIDE = (
    "setpoint.studies.engine",
    "setpoint.studies.declare",
    "setpoint.studies.registry",
    # What shows, names or examines, and gives no number of a run. The training loop imports the check for the moment
    # when a loss breaks; a study that measures with probes imports those itself, and they count.
    "setpoint.types",
    "setpoint.report",
    "setpoint.catalog",
    "setpoint.checkup",
    "setpoint.errors",
    "setpoint.extras",
    "setpoint.words",
)
_OUTSIDE_EXACT = ("setpoint", "setpoint.studies")


def digest(value: Any) -> str:
    """A hash of plain data.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest(path: Path) -> str:
    """Hash of a study's file and of everything in setpoint that it imports.

    Args:
        path: The study's Python file.

    >>> import setpoint.studies.batchnorm as module
    >>> len(code_digest(Path(module.__file__)))
    16
    """
    found = {path.name: _normal(path)}
    found |= {name: _normal(_file(name)) for name in closure(path)}
    return digest([EXECUTION, found])


def closure(path: Path) -> tuple[str, ...]:
    """Names of the setpoint modules that a file imports, directly or through others, sorted.

    >>> closure(Path(__file__))
    ()
    """
    seen: set[str] = set()
    waiting = list(_imports(path, _package_of(path)))
    while waiting:
        name = waiting.pop()
        if name in seen or _outside(name):
            continue
        seen.add(name)
        waiting += _imports(_file(name), name if _file(name).name == "__init__.py" else name.rpartition(".")[0])
    return tuple(sorted(seen))


def data_digest(path: Path | None) -> str:
    """Hash of the user's file, or of the names and sizes of a folder's files; "" for the study's own data."""
    if path is None:
        return ""
    if path.is_dir():
        return digest([[str(p.relative_to(path)), p.stat().st_size] for p in sorted(path.rglob("*")) if p.is_file()])
    total = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()[:16]


def _outside(name: str) -> bool:
    return name in _OUTSIDE_EXACT or any(name == head or name.startswith(head + ".") for head in _OUTSIDE)


def _imports(path: Path, package: str) -> Iterator[str]:
    """Modules of setpoint that the file's own statements name, wherever in the file they stand."""
    for node in _statements(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _inside(alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, package)
            if _inside(module):
                yield from (target for alias in node.names for target in _defining(module, alias.name))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *_statements(other))
            continue
        yield node
        yield from _statements(node)


@cache
def _defining(module: str, name: str) -> tuple[str, ...]:
    """Where ``from module import name`` leads: a submodule, the module that defines the name, or out of setpoint."""
    if _exists(f"{module}.{name}"):
        return (f"{module}.{name}",)
    path = _file(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _statements(_tree(path)):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, package)
            for alias in node.names:
                if (alias.asname or alias.name) == name and source != module:
                    return _defining(source, alias.name) if _inside(source) else ()
        elif isinstance(node, ast.Dict):  # a package that loads its names on first use has a table of them
            for key, value in zip(node.keys, node.values, strict=True):
                match key, value:
                    case ast.Constant(value=entry), ast.Constant(value=str(home)) if entry == name and _inside(home):
                        return _defining(home, name)
    return (module,)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _package_of(path: Path) -> str:
    """Dotted package of a file inside setpoint; "" elsewhere."""
    root = _file(ROOT).parent
    if not path.resolve().is_relative_to(root):
        return ""
    return ".".join([ROOT, *path.resolve().relative_to(root).parent.parts])


def _inside(name: str) -> bool:
    return name == ROOT or name.startswith(ROOT + ".")


@cache
def _exists(name: str) -> bool:
    base = _file(ROOT).parent.joinpath(*name.split(".")[1:])
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


@cache
def _file(name: str) -> Path:
    """Where a module of setpoint lies; found by path, since importing it would run it."""
    if name == ROOT:
        spec = find_spec(ROOT)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).resolve()
    base = _file(ROOT).parent.joinpath(*name.split(".")[1:])
    return base / "__init__.py" if (base / "__init__.py").is_file() else base.with_suffix(".py")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _normal(path: Path) -> str:
    """Source without comments, docstrings and layout."""
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)

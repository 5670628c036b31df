"""What a result depends on, as one short hash.

The code part is the closure of a study within setpoint: the study's own module and every module of setpoint that it
reaches, directly or through others, also inside functions. It is read from the source, and there are four ways in:

- an import; a name that a package only re-exports, or loads on first use, is followed to where it is defined, so that a
  change in one layer does not make the results of another stale;
- an attribute of an imported package, ``setpoint.nn.DyT``;
- a string that says where something is, ``"setpoint.nn:RMSNorm"``: that is how a fix names what it builds;
- an item of the catalogue, ``"pre-rmsnorm"``, in the words of a study that reaches what loads code by such an id.

Comments, docstrings and layout do not count. The engine itself is left out: it decides what is run and judged, not what
a run gives; when that changes, `EXECUTION` goes up.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
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
    # What shows or names, and gives no number of a run.
    "setpoint.types",
    "setpoint.report",
    "setpoint.catalog",
    "setpoint.errors",
    "setpoint.extras",
    "setpoint.words",
)
_OUTSIDE_EXACT = ("setpoint", "setpoint.studies")
_ASIDE = frozenset({("setpoint.train.failure", "setpoint.checkup")})
"""Imports that don't count: the training loop examines a model when its loss has broken, and the run is over then."""
_PLACE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
"""``module:name``, where the code of an item or of a part of a model is."""


def digest(value: Any) -> str:
    """A hash of plain data.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sources(path: Path) -> dict[str, str]:
    """What a study's figures hang on: its file, everything in setpoint that it reaches, and how runs are run.

    Args:
        path: The study's Python file.

    Returns:
        For each file a hash of its text and one of its code alone, as ``"text code"``.

    >>> import setpoint.studies.batchnorm as module
    >>> {"batchnorm.py", "execution", "setpoint.train.loop"} <= set(sources(Path(module.__file__)))
    True
    """
    files = {path.name: path} | {name: _file(name) for name in closure(path)}
    return {"execution": str(EXECUTION)} | {name: " ".join(_hashes(file)) for name, file in files.items()}


def code_digest(found: Mapping[str, str]) -> str:
    """One hash of the code alone.

    Args:
        found: From `sources`.
    """
    return digest({name: hashes.split()[-1] for name, hashes in found.items()})


def has_changed(before: Mapping[str, str], path: Path) -> bool:
    """Whether code is another than it was; quick, since only files whose text has changed are looked into.

    Args:
        before: What `sources` gave then; with nothing in it the code counts as changed.
        path: The study's Python file.
    """
    if before.get("execution") != str(EXECUTION):
        return True
    for name, hashes in before.items():
        if name == "execution":
            continue
        file = path if name == path.name else _file(name)
        if not file.is_file():
            return True
        text, code = hashes.split()
        if text != _hash(file.read_text(encoding="utf-8")) and code != _hash(_normal(file)):
            return True
    return False


def closure(path: Path) -> tuple[str, ...]:
    """Names of the setpoint modules that a file reaches, directly or through others, sorted.

    >>> closure(Path(__file__))
    ()
    """
    seen: set[str] = set()
    _follow(_reached(path, _package_of(path)), seen)
    if any(_loads_by_id(_file(name)) for name in seen):
        own = [path, *(_file(name) for name in seen if name.startswith(f"{ROOT}.studies."))]
        for file in own:
            _follow(_items_named(file), seen)
    return tuple(sorted(seen))


def _follow(names: Iterable[str], seen: set[str]) -> None:
    """Add modules, and all that they reach."""
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen or _outside(name):
            continue
        seen.add(name)
        file = _file(name)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [target for target in _reached(file, package) if (name, target) not in _ASIDE]


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


def _hashes(path: Path) -> tuple[str, str]:
    return _hash(path.read_text(encoding="utf-8")), _hash(_normal(path))


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


def _outside(name: str) -> bool:
    return name in _OUTSIDE_EXACT or any(name == head or name.startswith(head + ".") for head in _OUTSIDE)


def _reached(path: Path, package: str) -> Iterator[str]:
    """Modules of setpoint that the file itself names, wherever in the file it does."""
    bound = {}
    for node in _code(_tree(path)):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if _inside(alias.name):
                        yield alias.name
                        bound[alias.asname or ROOT] = alias.name if alias.asname else ROOT
            case ast.ImportFrom():
                module = _absolute(node, package)
                if _inside(module):
                    for alias in node.names:
                        yield from _defining(module, alias.name)
            case ast.Constant(value=str(text)) if (place := _PLACE.fullmatch(text)) and _exists(place[1]):
                yield from _defining(place[1], place[2])
            case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(text)), *_]) if _exists(text):
                yield text
    for node in _code(_tree(path)):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in bound and all(map(str.isidentifier, rest)):
                yield from _attribute(bound[first], rest)


def _attribute(module: str, names: list[str]) -> Iterator[str]:
    """Where ``module.a.b`` leads: past the packages on the way, to the module that defines what follows them."""
    while names and _exists(f"{module}.{names[0]}"):
        module, names = f"{module}.{names[0]}", names[1:]
    if names:
        yield from _defining(module, names[0])


def _loads_by_id(path: Path) -> bool:
    """Whether a module looks items of the catalogue up and imports what they name."""
    nodes = list(_code(_tree(path)))
    calls = any(isinstance(n, ast.Call) and ast.unparse(n.func).endswith("import_module") for n in nodes)
    return calls and any(isinstance(n, ast.ImportFrom) and n.module == f"{ROOT}.catalog" for n in nodes)


def _items_named(path: Path) -> Iterator[str]:
    """Modules of the catalogue's items that a file names in its strings, with or without options."""
    from setpoint.catalog import items

    known = items()
    for node in _code(_tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for part in node.value.split(","):
                if (id := part.strip().partition(":")[0]) in known and (place := _PLACE.fullmatch(known[id][1].path)):
                    yield from _defining(place[1], place[2])


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but docstrings and those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *_code(other))
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield node
            yield from _code(node)


@cache
def _defining(module: str, name: str) -> tuple[str, ...]:
    """Where ``from module import name`` leads: a submodule, the module that defines the name, or out of setpoint."""
    if _exists(f"{module}.{name}"):
        return (f"{module}.{name}",)
    path = _file(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _code(_tree(path)):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, package)
            for alias in node.names:
                if (alias.asname or alias.name) == name and source != module:
                    return _defining(source, alias.name) if _inside(source) else ()
        elif isinstance(node, ast.Dict):  # a package that loads its names on first use has a table of their homes
            for key, value in zip(node.keys, node.values, strict=True):
                match key, value:
                    case ast.Constant(value=entry), ast.Constant(value=str(home)) if entry == name:
                        for where in (home, f"{package}.{home}"):
                            if _exists(where) and where != module:
                                return _defining(where, name)
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
    """Whether a module of setpoint has this name."""
    if not _inside(name) or not all(map(str.isidentifier, name.split("."))):
        return False
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
    return _parsed(path.read_text(encoding="utf-8"))


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _normal(path: Path) -> str:
    """Source without comments, docstrings and layout."""
    return _stripped(path.read_text(encoding="utf-8"))


@cache
def _stripped(text: str) -> str:
    tree = ast.parse(text)  # a tree of its own, since it is changed
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

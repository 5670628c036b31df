"""Finding studies: those that setpoint ships, one module per method, and those in a file of the user's."""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setpoint.errors import InputError, nearest
from setpoint.studies.declare import Study

FOLDER = Path(__file__).parent
ENGINE = frozenset({"__init__", "declare", "registry"})
"""Modules of this package that are no studies; shared helpers begin with an underscore."""


def study_keys() -> tuple[str, ...]:
    """Keys of the methods that have studies, sorted; nothing is imported.

    >>> "batchnorm" in study_keys()
    True
    """
    stems = (path.stem for path in FOLDER.glob("*.py"))
    return tuple(sorted(stem.replace("_", "-") for stem in stems if stem not in ENGINE and not stem.startswith("_")))


def find_studies(source: str) -> tuple[Study, ...]:
    """The studies of a method, or of a file.

    Args:
        source: A method's key, or the path of a Python file that declares studies with `setpoint.studies.study`.

    Returns:
        Its studies in the order in which they are declared.

    Raises:
        InputError: There is no such method or file, or it declares no study.

    >>> [study.name for study in find_studies("batchnorm")]
    ['sigmoid_digits', 'relu_digits', 'learning_rates']
    """
    module = load_module(source)
    found = tuple(
        value for value in vars(module).values() if isinstance(value, Study) and value.module == module.__name__
    )
    if not found:
        raise InputError(f"{source} declares no study; decorate a function with setpoint.studies.study")
    return found


def source_file(source: str) -> Path:
    """The file behind a key or a path; it is not imported.

    Raises:
        InputError: There is none.

    >>> source_file("pre-rmsnorm").name
    'pre_rmsnorm.py'
    """
    if source.endswith(".py"):
        path = Path(source).resolve()
        if not path.is_file():
            raise InputError(f"there is no file {path}; give a method's key or a Python file that declares studies")
        return path
    if source not in study_keys():
        raise InputError(_unknown(source))
    return FOLDER / f"{source.replace('-', '_')}.py"


def load_module(source: str) -> ModuleType:
    """Import the module behind a key or a path; the same path gives the same module."""
    file = source_file(source)
    if source.endswith(".py"):
        return _load_file(file)
    return import_module(f"setpoint.studies.{source.replace('-', '_')}")


def _load_file(path: Path) -> ModuleType:
    # The stem stays last, so that a study's key reads as the file is called.
    name = f"setpoint_study_{sha256(str(path).encode()).hexdigest()[:12]}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses inside look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _unknown(source: str) -> str:
    from setpoint.catalog import find

    try:
        method = find(source)
    except InputError as error:
        close = nearest(source, study_keys())
        return f"{error}; studies exist for {', '.join(close) or 'no method'}"
    if method.key in study_keys():
        return f"{source!r} is an item of {method.key}; run `setpoint prove {method.key}`"
    if method.proof == "none":
        return f"{method.key} has no proof of its own: tests hold its code to its definition"
    return f"the study of {method.key} is not in this version"

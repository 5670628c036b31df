from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def course() -> ModuleType:
    """The small network, its data and a run of both, which tests also start as a script."""
    spec = importlib.util.spec_from_file_location("course", Path(__file__).with_name("course.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

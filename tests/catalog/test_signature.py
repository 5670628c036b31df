from __future__ import annotations

import ast

import pytest

from setpoint.catalog.signature import _parameters, signature
from setpoint.errors import InputError


def test_function_signature_is_as_written() -> None:
    found = signature("setpoint.errors:nearest")
    assert found.call == "(name: str, known: Iterable[str], count: int = 3, *, likeness: float = 0.0) -> list[str]"
    assert found.summary == "The ``count`` names of ``known`` most like ``name``, best first."


def test_every_kind_of_parameter_is_written() -> None:
    source = "def f(a, /, b: int = 1, *rest: int, c, d: str = 'x', **more): ..."
    arguments = ast.parse(source).body[0].args  # type: ignore[attr-defined]
    assert ", ".join(_parameters(arguments)) == "a, /, b: int = 1, *rest: int, c, d: str = 'x', **more"
    arguments = ast.parse("def f(*, c=2): ...").body[0].args  # type: ignore[attr-defined]
    assert ", ".join(_parameters(arguments)) == "*, c=2"


def test_dataclass_signature_is_its_fields() -> None:
    call = signature("setpoint.types:Unread").call
    assert call == "(name: str, reason: str)"
    assert "items: tuple[Item, ...]" in signature("setpoint.types:Method").call


def test_class_signature_is_its_init_without_self() -> None:
    assert signature("setpoint.catalog:Catalog").call == "(folder: Path)"


def test_imported_name_is_followed_to_its_home() -> None:
    found = signature("setpoint.catalog:InputError")
    assert (found.module, found.name) == ("setpoint.errors", "InputError")


def test_value_has_no_call() -> None:
    assert signature("setpoint.catalog:methods").call == ""


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("setpoint.nowhere:thing", "there is no module setpoint.nowhere"),
        ("setpoint.errors:Missing", "the module setpoint.errors defines nothing called Missing"),
    ],
)
def test_wrong_path_is_named(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        signature(path)

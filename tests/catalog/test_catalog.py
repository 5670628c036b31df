"""Walks the catalogue: what it says must be true of the code, the tests and the probes."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import setpoint
from setpoint.catalog import UnknownMethod, find, items, methods, select
from setpoint.catalog.listing import as_json, render_method
from setpoint.catalog.reader import parse
from setpoint.catalog.signature import signature
from setpoint.errors import InputError
from setpoint.probe.registry import PROBES, codes
from setpoint.probe.remedies import literature
from setpoint.types import Item, Method

TESTS = Path(__file__).parents[1]
SOURCE = Path(setpoint.__file__).parent
CATALOG = SOURCE / "catalog"
ITEMS = sorted(items())


FILES = [CATALOG / method.room / f"{key}.toml" for key, method in methods.items()]


def owner(item: str) -> tuple[Method, Item]:
    return items()[item]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_toml_and_reads_alike_with_tomllib(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert parse(text, str(path)) == tomllib.loads(text)


@pytest.mark.parametrize("item", ITEMS)
def test_every_path_imports(item: str) -> None:
    module, name = owner(item)[1].path.split(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("item", ITEMS)
def test_every_signature_is_read_without_importing(item: str) -> None:
    found = signature(owner(item)[1].path)
    assert found.call.startswith("(")
    assert found.summary


@pytest.mark.parametrize("key", list(methods))
def test_every_method_lives_in_a_room_and_is_shown(key: str) -> None:
    method = methods[key]
    assert (SOURCE / method.room).is_dir() or (SOURCE / f"{method.room}.py").is_file()
    assert render_method(method)
    assert key in as_json([method])


def test_every_method_but_companions_of_a_finding_has_a_test_file_of_its_name() -> None:
    for key, method in methods.items():
        if key not in codes() or method.proof != "none":
            name = f"test_{key.replace('-', '_')}.py"
            assert list(TESTS.rglob(name)), f"{key}: write tests/{method.room}/{name}"


def test_a_companion_raises_the_code_it_is_named_for() -> None:
    for key in set(methods) & set(codes()):
        assert methods[key].treats == {key}


def test_every_finding_code_is_raised_by_exactly_one_check() -> None:
    raised = [code for _, item in items().values() if item.kind == "check" for code in item.treats]
    assert sorted(raised) == sorted(codes())


def test_every_probe_of_the_registry_is_in_the_catalogue_under_its_code() -> None:
    for probe in PROBES:
        item = owner(probe.code)[1]
        assert item.path == f"{type(probe).__module__}:{type(probe).__name__}"


def test_fixes_treat_only_codes_that_some_check_raises() -> None:
    for method, item in items().values():
        assert set(item.treats) <= set(codes()), f"{method.key}, item {item.id}"


def test_every_result_belongs_to_a_method() -> None:
    assert {path.stem for path in (CATALOG / "results").glob("*.json")} <= set(methods)


def test_keys_are_the_file_names() -> None:
    on_disk = {path.stem for path in CATALOG.rglob("*.toml") if path.parent != CATALOG}
    assert on_disk == set(methods)


def test_methods_is_the_front_door_of_the_package() -> None:
    assert setpoint.methods is methods


def test_select_keeps_what_meets_every_filter() -> None:
    assert {m.key for m in select()} == set(methods)
    assert [m.key for m in select(treats="massive-activation", kind="check")] == ["massive-refined"]
    assert select(kind="callback", treats="rank-collapse") == ()
    assert all(m.room.split("/")[0] == "probe" for m in select(room="probe"))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"kind": "layer"}, "no kind is called 'layer'"),
        ({"room": "prob"}, "no room is called 'prob'; the nearest names are probe"),
        ({"treats": "massive"}, "no finding code is called 'massive'; the nearest names are massive-activation, "),
    ],
)
def test_select_refuses_a_filter_nothing_can_meet(filters: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(**filters)  # type: ignore[arg-type]


def test_find_takes_a_key_or_an_item() -> None:
    assert find("massive-refined") is find("massive-activation") is methods["massive-refined"]
    with pytest.raises(UnknownMethod, match="no method or item is called 'masive-activation'; the nearest names are m"):
        find("masive-activation")


def test_find_names_the_paper_of_a_method_that_is_not_carried() -> None:
    for paper in literature().values():
        if paper.key not in methods:
            with pytest.raises(UnknownMethod) as caught:
                find(paper.key)
            assert str(caught.value).startswith(f"{paper.key} is published and not carried by this version")
            assert paper.arxiv in str(caught.value)

"""The reader takes what the catalogue's files may say, and names the file and field of what they may not."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from setpoint.catalog import Catalog, UnknownMethod
from setpoint.catalog.reader import parse, read_folder
from setpoint.errors import InputError

GOOD = """\
# comment
summary = "Squashes with \\"tanh\\", so that no statistics are needed."
proof = "none"

[paper]
title = "Transformers without Normalization"
authors = "Zhu et al."
year = 2025
arxiv = "2503.10622"

[[item]]
id = "dyt"
kind = "fix"
path = "setpoint.nn.norm.dyt:ToDyT"
does = "Replaces every norm by a scaled tanh."
treats = ["massive-activation"]
preserves = "retrain"

[[item]]
id = "dyt-layer"
kind = "part"
path = "setpoint.nn.norm.dyt:DyT"
does = "The layer."
"""


def write(folder: Path, name: str = "nn/norm/dyt.toml", text: str = GOOD) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_key_and_room_come_from_the_file_name_and_folder(tmp_path: Path) -> None:
    write(tmp_path)
    method = read_folder(tmp_path)["dyt"]
    assert (method.key, method.room) == ("dyt", "nn/norm")
    assert method.reference == "Zhu et al., 2025 · arXiv 2503.10622"
    assert method.kinds == {"fix", "part"}
    assert method.items[0].treats == ("massive-activation",)
    assert method.items[0].preserves == "retrain"
    assert method.items[1].preserves is None


def test_subset_reader_agrees_with_tomllib() -> None:
    assert parse(GOOD, "GOOD") == tomllib.loads(GOOD)


def test_result_is_joined_from_the_results_folder(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_folder(tmp_path)["dyt"].result is None
    write(tmp_path, "results/dyt.json", json.dumps({"verdict": "holds", "effect": 0.25}))
    assert read_folder(tmp_path)["dyt"].result == {"verdict": "holds", "effect": 0.25}


def test_files_outside_a_room_are_no_methods(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "literature.toml", "anything at all")
    write(tmp_path, "__pycache__/x.toml", "anything at all")
    assert list(read_folder(tmp_path)) == ["dyt"]


def test_methods_are_sorted_by_key_over_all_rooms(tmp_path: Path) -> None:
    for room, key in [("probe", "zeta"), ("nn/norm", "beta"), ("optim", "alpha")]:
        write(tmp_path, f"{room}/{key}.toml", GOOD.replace("dyt", key))
    assert list(read_folder(tmp_path)) == ["alpha", "beta", "zeta"]


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("summary =", "sumary =", "sumary: no such field; did you mean 'summary'"),
        ('proof = "none"\n', "", "proof: expected lower-case words"),
        ("year = 2025", 'year = "2025"', "[paper] year"),
        ("2503.10622", "arXiv:2503.10622", "[paper] arxiv"),
        ('authors = "Zhu et al."', 'authors = ""', "[paper] authors"),
        ('kind = "fix"', 'kind = "layer"', "[[item]] 1 kind: expected 'check' or 'fix'"),
        ("setpoint.nn.norm.dyt:ToDyT", "setpoint.nn.norm.dyt.ToDyT", "[[item]] 1 path"),
        ('preserves = "retrain"\n', "", "[[item]] 1 preserves: expected a value for a fix"),
        ('preserves = "retrain"', 'preserves = "mostly"', "[[item]] 1 preserves: expected 'exact'"),
        ('does = "The layer."', 'does = "The layer."\npreserves = "exact"', "[[item]] 2 preserves"),
        ('["massive-activation"]', '"massive-activation"', "[[item]] 1 treats"),
        ('["massive-activation"]', '["Massive"]', "[[item]] 1 treats"),
        ('id = "dyt-layer"', 'id = "dyt"', "the item id 'dyt' is taken by the method 'dyt'"),
        ('id = "dyt-layer"', "ident = 3", "[[item]] 2 ident: no such field; did you mean 'id'"),
        ("[[item]]", "[[items]]", "items: no such field"),
        ("[paper]", "[papers]", "papers: no such field; did you mean 'paper'"),
        ("year = 2025", "year: 2025", "line 8: expected `name = value`"),
        ("year = 2025", "year = 2025\nyear = 2026", "line 9: expected `name = value`"),
        ("year = 2025", "year = 2025  # when", "line 8: expected `name = value`"),
        ("[[item]]", "[paper]", "[paper] comes twice"),
    ],
)
def test_bad_file_is_refused_by_file_and_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    assert old in GOOD
    path = write(tmp_path, text=GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path)
    assert str(path) in str(caught.value)
    assert field in str(caught.value)


def test_same_key_in_two_rooms_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, "optim/dyt.toml", GOOD.replace("dyt-layer", "b").replace('"dyt"', '"c"'))
    with pytest.raises(InputError, match="the key 'dyt' is taken by nn/norm/dyt"):
        read_folder(tmp_path)


def test_file_name_must_be_a_key(tmp_path: Path) -> None:
    write(tmp_path, "nn/norm/DyT.toml")
    with pytest.raises(InputError, match="the file's name: expected lower-case words joined by hyphens, got 'DyT'"):
        read_folder(tmp_path)


def test_a_check_says_what_it_raises(tmp_path: Path) -> None:
    bare = GOOD.replace('kind = "part"', 'kind = "check"')
    write(tmp_path, text=bare)
    with pytest.raises(InputError, match="2 treats: expected a list of finding codes"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    path = write(tmp_path, "results/dyt.json", text)
    with pytest.raises(InputError, match=str(path)):
        read_folder(tmp_path)


def test_catalog_is_a_read_only_mapping(tmp_path: Path) -> None:
    write(tmp_path)
    catalog = Catalog(tmp_path)
    assert len(catalog) == 1
    assert "dyt" in catalog
    assert "dty" not in catalog
    assert catalog.get("dty") is None
    assert [key for key, _ in catalog.items()] == ["dyt"]
    with pytest.raises(TypeError):
        catalog["x"] = catalog["dyt"]  # type: ignore[index]


def test_unknown_key_names_the_nearest_and_is_a_key_error(tmp_path: Path) -> None:
    for key in ["dyt", "derf", "gdn", "lorc"]:
        write(tmp_path, f"nn/{key}.toml", GOOD.replace("dyt", key))
    with pytest.raises(UnknownMethod) as caught:
        Catalog(tmp_path)["dty"]
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, InputError)
    assert str(caught.value).startswith("no method is called 'dty'; the nearest names are dyt, ")
    assert str(caught.value).count(",") == 2


def test_catalog_reads_its_files_only_when_asked(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "missing")
    write(tmp_path / "missing")
    assert list(catalog) == ["dyt"]

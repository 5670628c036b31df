"""Every layer of the catalogue goes through `check_layer`.

How a layer is made and called for it is data: ``layers/<item id>.toml``, with

* ``arguments`` and ``keywords`` of its constructor. A value ``{ path = "module:name" }`` stands for what is imported
  from there, and with ``arguments`` or ``keywords`` for the object that it makes;
* ``inputs``, one entry per argument of its call: a shape of normal numbers, a list of entries for a tuple,
  ``{ mask = [5, 3] }`` for a boolean mask of two rows with so many true positions, or
  ``{ shape = [2, 5], below = 11 }`` for whole numbers such as tokens;
* ``batch_axis``, ``feature_axis`` (``"none"`` for none) and ``[except]``, as `check_layer` takes them.
"""

from __future__ import annotations

import tomllib
from importlib import import_module
from inspect import isclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpoint.catalog import items
from setpoint.testing import LAYER_CHECKS, check_layer
from setpoint.testing.layer_checks import SLOW_CHECKS

FOLDER = Path(__file__).parent / "layers"


def imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


PARTS = sorted(name for name, (_, item) in items().items() if item.kind == "part")
LAYERS = [
    name for name in PARTS if isclass(part := imported(items()[name][1].path)) and issubclass(part, nn.Module)
]  # fmt: skip


def built(value: Any) -> Any:
    if isinstance(value, dict) and "path" in value:
        found = imported(value["path"])
        if value.keys() == {"path"}:
            return found
        return found(*built(value.get("arguments", [])), **built(value.get("keywords", {})))
    if isinstance(value, dict):
        return {key: built(entry) for key, entry in value.items()}
    return [built(entry) for entry in value] if isinstance(value, list) else value


def example(entry: Any, numbers: torch.Generator) -> Any:
    if isinstance(entry, dict) and "mask" in entry:
        return torch.arange(max(entry["mask"])) < torch.tensor(entry["mask"])[:, None]
    if isinstance(entry, dict):
        return torch.randint(entry["below"], entry["shape"], generator=numbers)
    if entry and isinstance(entry[0], int):
        return torch.randn(entry, generator=numbers)
    return tuple(example(part, numbers) for part in entry)


def axis(value: int | str) -> int | None:
    return None if value == "none" else int(value)


FIRST_TIER = {check: "taken in the first tier" for check in LAYER_CHECKS if check not in SLOW_CHECKS}


def checked(item: str, *, slow: bool) -> None:
    path = FOLDER / f"{item}.toml"
    assert path.is_file(), (
        f"the layer {item} has no example: write {path.name} as tests/conformance/test_layers.py says"
    )
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    unknown = data.keys() - {"arguments", "keywords", "inputs", "batch_axis", "feature_axis", "except"}
    assert not unknown, f"{path.name}: no such fields: {unknown}"
    layer = imported(items()[item][1].path)
    inputs = example(data["inputs"], torch.Generator().manual_seed(0)) if data["inputs"] else ()
    assert isinstance(inputs, tuple | Tensor)
    check_layer(
        lambda: layer(*built(data.get("arguments", [])), **built(data.get("keywords", {}))),
        inputs,
        batch_axis=axis(data.get("batch_axis", 0)),
        feature_axis=axis(data.get("feature_axis", -1)),
        except_=data.get("except", {}) | (FIRST_TIER if slow else {}),
        slow=slow,
    )


@pytest.mark.filterwarnings("ignore:MaskedBatchNorm1d")  # what it says of an empty batch
@pytest.mark.parametrize("item", LAYERS)
def test_layer_passes_the_suite(item: str) -> None:
    checked(item, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("item", LAYERS)
def test_layer_passes_the_checks_of_the_second_tier(item: str) -> None:
    checked(item, slow=True)


def test_every_example_belongs_to_a_layer() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(LAYERS)

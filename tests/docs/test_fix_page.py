"""The examples of the page on fixing run, one after the other, and its table is the catalogue's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from setpoint.catalog import items
from setpoint.fixing import parse
from setpoint.running import evaluated

PAGE = (Path(__file__).parents[2] / "docs" / "fix.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's Python leaves behind; the fix of one's own is a module of the name that the page gives it."""
    folder = tmp_path_factory.mktemp("fix-page")
    first, load, own, use = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / "round_writers.py").write_text(own, encoding="utf-8")
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        try:
            for number, block in enumerate([first, load, "from round_writers import RoundWriters\n" + use]):
                exec(compile(block, f"fix.md, block {number}", "exec"), space)
        finally:
            sys.modules.pop("round_writers", None)
    return space


def test_the_model_that_is_loaded_gives_the_outputs_that_were_saved(names: dict[str, Any]) -> None:
    fixed = names["setpoint"].fix(names["model"], "pre-rmsnorm", names["batches"], timed=False)
    batch = names["batches"][0]
    with evaluated(names["same"]), evaluated(fixed.model):
        assert torch.equal(names["same"](batch), fixed.model(batch))


def test_the_fix_of_ones_own_rounds_to_so_many_values(names: dict[str, Any]) -> None:
    fixed = names["fixed"]
    assert fixed.specs == ("pre-rmsnorm", "round-writers:bits=4")
    rounded = [edit.value for edit in fixed.edits if edit.why == "4 bits"]
    assert len(rounded) == 2 * 6
    assert all(len(weight.unique()) <= 15 for weight in rounded)
    assert 0 < fixed.change.relative < 0.5


def test_every_spec_on_the_page_is_one_that_the_shell_takes() -> None:
    specs = re.findall(r"--with (\S+)", PAGE)
    assert len(specs) > 5
    for spec in specs:
        parse(spec)


def test_every_fix_of_the_catalogue_is_on_the_page() -> None:
    fixes = {name for name, (_, item) in items().items() if item.kind == "fix"}
    assert set(re.findall(r"^\| \[`([\w-]+)`\]", PAGE, re.MULTILINE)) == fixes

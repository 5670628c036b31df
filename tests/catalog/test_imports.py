"""Listing and help answer at once because they load next to nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "altair", "jinja2", "sklearn", "pandas", "scipy", "safetensors", "tomllib"}

RUN = """
import json, sys
sys.argv = ["setpoint", *json.loads(sys.argv[1])]
try:
    from setpoint.cli import main
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["list"], ["list", "--json"], ["list", "--treats", "rank-collapse"], ["show", "massive-refined"]],
    ids=" ".join,
)
def test_shell_loads_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(RUN, json.dumps(arguments))
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_methods_loads_nothing_heavy() -> None:
    code = (
        "import json, sys, setpoint; assert len(setpoint.methods);"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
    )
    assert not modules_after(code) & (HEAVY | {"typer", "rich"})

"""The shell as a person meets it: exit codes, one-line errors, standard output that can be piped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from setpoint.cli import main

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 50)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))

def build():
    torch.manual_seed(0)
    return Net(), [torch.randint(0, 50, (2, 24))]

def poisoned():
    net, batches = build()
    with torch.no_grad():
        net.body.layers[1].linear2.weight[0, 0] = float("nan")
    return net, batches

def wrong():
    return 3

def leaving():
    raise SystemExit(0)

def labelled():
    net, (tokens,) = build()
    def loss(logits, batch):
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    return net, [(tokens, tokens)], loss, lambda model, batch: model(batch[0])
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("net_of_mine", None)
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    code = stop.value.code
    return 0 if code is None else int(code)


def test_a_healthy_model_of_ones_own_exits_with_zero(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "net_of_mine:build", "--fail-on", "warning") == 0
    assert "Net" in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else_on_standard_output(
    own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "net_of_mine:poisoned", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"model", "findings", "trace", "schema_version"} <= set(report)
    finding = next(f for f in report["findings"] if f["code"] == "non-finite")
    assert finding["severity"] == "error"
    assert {"code", "severity", "sites", "evidence", "remedies"} <= set(finding)


def test_fail_on_decides_the_exit_code(own_model: Path) -> None:
    assert run("check", "net_of_mine:poisoned", "--fail-on", "error") == 1
    assert run("check", "net_of_mine:poisoned", "--fail-on", "error", "--ignore", "non-finite") == 0


def test_one_probe_reports_only_its_code(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "net_of_mine:poisoned", "--probe", "non-finite", "--json") == 0
    assert {f["code"] for f in json.loads(capsys.readouterr().out)["findings"]} == {"non-finite"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("check", "smolm2"), ("smolm2", "smollm2")),
        (("check", "net_of_mine:wrong"), ("net_of_mine:wrong", "int")),
        (("check", "net_of_mine:biuld"), ("biuld", "build")),
        (("check", "net_of_mine:build", "--probe", "dead-unit"), ("dead-unit", "dead-units")),
        (("check", "net_of_mine:build", "--html", "no/such/folder/r.html"), ("no/such/folder",)),
        (("check", "net_of_mine:build", "--html", "."), ("folder",)),
        (("check", "net_of_mine:build", "--dtype", "int8"), ("int8", "bfloat16")),
        (("check", "net_of_mine:build", "--device", "cuda:99"), ("cuda:99",)),
        (("show", "massive-refind"), ("massive-refind", "massive-refined")),
        (("models", "get", "smollm"), ("smollm", "smollm2")),
        (("diff", "a.json", "b.json"), ("a.json",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    own_model: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert run(*args) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert len(seen.err.strip().splitlines()) == 1
    for word in words:
        assert word in seen.err


def test_a_saved_report_can_be_compared(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("build", "poisoned"):
        run("check", f"net_of_mine:{name}", "--json")
        Path(f"{name}.json").write_text(capsys.readouterr().out)
    assert run("diff", "build.json", "poisoned.json", "--json") == 0
    assert "non-finite" in capsys.readouterr().out


def test_anatomy_prints_a_tree(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("anatomy", "net_of_mine:build") == 0
    assert "body.layers" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--help"], ["list"], ["show", "massive-refined"]])
def test_answers_that_need_no_tensor_do_not_load_the_tensor_library(args: list[str]) -> None:
    code = (
        "import sys\nfrom setpoint.cli import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'altair', 'jinja2', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_factory_that_exits_is_no_success(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "net_of_mine:leaving", "--fail-on", "info") == 2
    assert "failed while building the model: SystemExit" in capsys.readouterr().err


def test_inputs_with_labels_are_run_as_the_factory_says(own_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "net_of_mine:labelled", "--loss", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trace"]["loss"] == pytest.approx(4, abs=1.5)


def test_control_c_says_that_it_stopped(
    own_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("setpoint.checkup.check", interrupted)
    assert run("check", "net_of_mine:build") == 130
    assert capsys.readouterr().err.strip() == "setpoint: stopped"


def test_a_fault_of_our_own_has_an_exit_code_of_its_own(
    own_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise IndexError("a mistake of ours")

    monkeypatch.setattr("setpoint.checkup.check", broken)
    assert run("check", "net_of_mine:build", "--fail-on", "error") == 70
    assert "please report it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("bert-base-uncased", "owner/name with --hub"),
        ("net_of_mine:", "net_of_mine:FUNCTION"),
        ("net_of_mine.py:build", "net_of_mine:build"),
    ],
)
def test_a_source_that_is_nearly_right_is_told_how(
    own_model: Path, capsys: pytest.CaptureFixture[str], source: str, hint: str
) -> None:
    assert run("check", source) == 2
    assert hint in capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "setpoint", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("setpoint ")

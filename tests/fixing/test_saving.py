from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix, load
from setpoint.errors import InputError
from setpoint.fixing.saving import refuse_target
from setpoint.loading import restore
from setpoint.running import evaluated
from setpoint.staging import begin
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

Make = Callable[..., tuple[nn.Module, Tensor]]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluated(model):
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("gpt2", "pre-rmsnorm"),
        ("opt", "pre-rmsnorm"),
        ("vit", "pre-rmsnorm"),
        ("gpt2", "pre-crmsnorm:untie=true"),
        ("vit", "pre-crmsnorm"),
    ],
)
def test_what_is_saved_loads_back_to_the_same_outputs(make: Make, tmp_path: Path, family: str, spec: str) -> None:
    model, batch = make(family)
    fixed = fix(model, spec, [batch], timed=False)
    folder = fixed.save(tmp_path / "out")
    again = load(folder)
    assert torch.equal(logits(again.model, batch), logits(fixed.model, batch))
    assert again.task == fixed.loaded.task
    assert again.notes == (f"changed by {spec}",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_every_file_of_the_folder_can_be_read_by_the_same_people(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_tied_head_is_tied_after_loading(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    again = load(folder).model
    assert again.lm_head.weight is again.transformer.wte.weight


def test_transformers_refuses_a_model_that_its_architecture_cannot_express(make: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    with pytest.raises(ValueError, match="setpoint-gpt2"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AttributeError, match=r"read this folder with setpoint\.load"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize("first", ["pre-rmsnorm", "pre-crmsnorm:untie=true", "peri-ln"])
def test_a_folder_is_fixed_again_and_keeps_what_was_done_before(make: Make, tmp_path: Path, first: str) -> None:
    model, batch = make("gpt2")
    once = fix(model, first, [batch], timed=False)
    again = fix(once.save(tmp_path / "once"), "kv-bias-slot", [batch], timed=False)
    for result in (again, fix(once.loaded, "kv-bias-slot", [batch], timed=False)):
        loaded = load(result.save(tmp_path / "twice", force=True))
        assert torch.equal(logits(loaded.model, batch), logits(result.model, batch))
        assert [type(m) for m in loaded.model.modules()] == [type(m) for m in result.model.modules()]
        assert loaded.notes == (f"changed by {first}, kv-bias-slot",)


def test_a_bare_model_that_was_fixed_before_loads_back_with_both_fixes(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    changed = fix(model, "pre-rmsnorm", [batch], timed=False).model
    second = fix(changed, "kv-bias-slot", [batch], timed=False)
    assert torch.equal(logits(load(second.save(tmp_path / "out")).model, batch), logits(second.model, batch))


def test_what_would_load_back_as_another_model_is_not_saved(make: Make, tmp_path: Path) -> None:
    changed, batch = make("gpt2")
    changed.transformer.h[1].mlp.act = nn.ReLU()
    with pytest.raises(InputError, match=r"would not load back as it is.*h\.1\.mlp\.act"):
        fix(changed, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_model_that_is_of_its_old_architecture_again_loads_through_transformers(
    make: Make, tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    model, batch = make(family)
    scaled = fix(model, "lns", [batch], timed=False)
    with pytest.raises(ValueError, match=f"setpoint-{family}"):
        AutoModelForCausalLM.from_pretrained(scaled.save(tmp_path / "scaled"))
    folded = fix(tmp_path / "scaled", "lns-fold", [batch], timed=False)
    folder = folded.save(tmp_path / "folded")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock) is type(model)
    assert torch.equal(logits(stock, batch), logits(folded.model, batch))
    assert torch.equal(logits(load(folder).model, batch), logits(folded.model, batch))


def test_a_head_that_was_untied_is_not_tied_again_by_transformers(make: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    @dataclass(frozen=True)
    class Untied:
        """Gives the head a weight of its own."""

        id: ClassVar[str] = "untied"
        stage: ClassVar[Stage] = "transform"
        preserves: ClassVar[Preserves] = "approximate"

        def applies(self, anatomy: Any) -> Refusal | None:
            return None

        def plan(self, ctx: FixContext) -> list[Edit]:
            build = Build("torch.nn:Linear", {"in_features": 16, "out_features": 64, "bias": False})
            weight = 2 * ctx.model.get_parameter("lm_head.weight").detach()
            return [Edit("lm_head", build), Edit("lm_head.weight", weight)]

    model, batch = make("gpt2")
    fixed = fix(model, Untied(), [batch], timed=False)
    folder = fixed.save(tmp_path / "out")
    with pytest.raises(ValueError, match="setpoint-gpt2"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load(folder).model, batch), logits(fixed.model, batch))


def test_a_model_of_ones_own_is_restored_into_ones_own_class(make: Make, tmp_path: Path) -> None:
    model, batch = make("encoder")
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    folder = fixed.save(tmp_path / "out")
    with pytest.raises(InputError, match=r"restore\(folder, model\)"):
        load(folder)
    fresh, _ = make("encoder")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    assert torch.equal(logits(restore(folder, fresh), batch), logits(fixed.model, batch))


@pytest.mark.parametrize("kind", ["fixed", "copied", "restored"])
def test_a_model_of_ones_own_that_was_fixed_before_is_restored_with_both_fixes(
    kind: str, make: Make, tmp_path: Path
) -> None:
    model, batch = make("encoder")
    first = fix(model, "pre-rmsnorm", [batch], timed=False)
    restored = restore(first.save(tmp_path / "first"), make("encoder")[0])
    bare = {"fixed": first.model, "copied": deepcopy(first.model), "restored": restored}[kind]
    second = fix(bare, "dyt", [batch], timed=False)
    folder = second.save(tmp_path / "second")
    again = restore(folder, make("encoder")[0])
    assert torch.equal(logits(again, batch), logits(second.model, batch))
    assert [name.split(":")[0] for name in second.loaded.made.fixes] == ["pre-rmsnorm", "dyt"]


def test_a_factory_is_run_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fixture_net.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn

        def build():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
            return nn.Sequential(nn.Linear(4, 8), stack, nn.Linear(8, 3)), [torch.randn(2, 5, 4)]
        """)
    )
    monkeypatch.chdir(tmp_path)
    fixed = fix("fixture_net:build", "pre-rmsnorm", timed=False)
    folder = fixed.save(tmp_path / "out")
    with pytest.raises(InputError, match="trust-code"):
        load(folder)
    again = load(folder, trust_code=True).model
    batch = torch.randn(2, 5, 4)
    assert torch.equal(logits(again, batch), logits(fixed.model, batch))


def test_an_existing_folder_is_left_alone(make: Make, tmp_path: Path) -> None:
    model, batch = make("encoder")
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="--force"):
        fixed.save(mine)
    with pytest.raises(InputError, match="no fix wrote"):
        fixed.save(mine, force=True)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_force_replaces_what_an_earlier_fix_wrote(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    other = fix(model, "pre-crmsnorm:untie=true", [batch], timed=False)
    other.save(folder, force=True)
    assert load(folder).notes == ("changed by pre-crmsnorm:untie=true",)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_missing_parent_is_named(make: Make, tmp_path: Path) -> None:
    model, batch = make("encoder")
    with pytest.raises(InputError, match="does not exist"):
        fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "no" / "out")


def test_tampered_weights_are_refused(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"transformer\.ln_f\.weight was changed"):
        load(folder)


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 99}', '{"schema_version": 1}', "[]"])
def test_a_damaged_statement_is_a_clear_error(make: Make, tmp_path: Path, damage: str) -> None:
    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    (folder / "setpoint.json").write_text(damage)
    with pytest.raises(InputError, match=r"setpoint\.json"):
        load(folder)


def test_a_statement_cannot_name_code_outside_setpoint_and_torch(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    statement = json.loads((folder / "setpoint.json").read_text())
    statement["edits"][0] = {"path": "transformer.wte", "build": "os:system", "arguments": {"command": "echo"}}
    (folder / "setpoint.json").write_text(json.dumps(statement))
    with pytest.raises(InputError, match="classes of setpoint and torch"):
        load(folder)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from setpoint import fix
from setpoint.fixing import saving
layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
stack = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
model = nn.Sequential(nn.Linear(4, 8), stack, nn.Linear(8, 3))
fixed = fix(model, "pre-rmsnorm", [torch.randn(2, 5, 4)], timed=False)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(rest: str, folder: Path) -> None:
    """Save in a process that kills itself on the way."""
    done = subprocess.run([sys.executable, "-c", KILLED + textwrap.dedent(rest), str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_kill_while_writing_leaves_no_half_folder_and_the_next_save_sweeps(make: Make, tmp_path: Path) -> None:
    killed("saving._write_json = die; fixed.save(sys.argv[1])", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir())
    model, batch = make("encoder")
    fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_kill_while_replacing_loses_nothing(tmp_path: Path) -> None:
    killed(
        """
        fixed.save(sys.argv[1])
        rename = Path.rename
        Path.rename = lambda path, to: die() if ".writing-" in path.name else rename(path, to)
        fixed.save(sys.argv[1], force=True)
        """,
        tmp_path / "out",
    )
    with pytest.raises(InputError, match="out exists"):
        refuse_target(tmp_path / "out")
    assert (tmp_path / "out" / "setpoint.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_is_writing_is_left_alone(make: Make, tmp_path: Path) -> None:
    busy = begin(tmp_path / "busy")
    model, batch = make("encoder")
    fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    assert busy.is_dir()


def test_a_folder_has_the_permissions_of_the_users_umask(make: Make, tmp_path: Path) -> None:
    model, batch = make("encoder")
    before = os.umask(0o077)
    try:
        folder = fix(model, "pre-rmsnorm", [batch], timed=False).save(tmp_path / "out")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.prenormalize import Prenormalize
from setpoint.nn import LpNorm, ScaleNorm

Make = Callable[..., tuple[nn.Module, Tensor]]


def norms(model: nn.Module) -> list[LpNorm]:
    return [module for module in model.modules() if isinstance(module, LpNorm)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "encoder", "decoder"])
@pytest.mark.parametrize("kind", ["mad", "guaranteed"])
def test_every_norm_gets_one_and_outputs_stay(make: Make, family: str, kind: str) -> None:
    model, batch = make(family)
    fixed = fix(model, f"prenormalize:kind={kind}", [batch], timed=False)
    assert len(norms(fixed.model)) >= 4
    assert {norm.prenorm for norm in norms(fixed.model)} == {kind}
    assert {norm.center for norm in norms(fixed.model)} == {family not in ("llama", "decoder")}
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-9


def test_gains_and_shifts_are_the_models_own(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, Prenormalize(), [batch], timed=False).model
    assert fixed.transformer.ln_f.weight is model.transformer.ln_f.weight
    assert fixed.transformer.ln_f.eps == model.transformer.ln_f.eps


def test_a_model_in_float16_arithmetic_holds_a_stream_whose_squares_overflow() -> None:
    """What torch does not do, as it squares in float32, a device without it does: `prenorm=None` stands for that."""
    norm = nn.LayerNorm(64)
    model = nn.Sequential(nn.Linear(8, 64), norm, nn.Linear(64, 4))
    nn.init.normal_(model[0].weight, std=300.0)
    x = torch.randn(16, 8)
    wanted = model(x)
    fixed = fix(model, Prenormalize(), [x], timed=False).model.half()
    assert (fixed(x.half()).float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    fixed[1].prenorm = None
    assert (fixed(x.half()).float() - wanted).abs().max() > 0.3 * wanted.abs().max()


def test_fixed_model_comes_back_from_disk_and_has_nothing_left_to_do(make: Make, tmp_path: Path) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, Prenormalize(), [batch], timed=False)
    loaded = setpoint.load(fixed.save(tmp_path / "out"))
    with torch.no_grad():
        difference = loaded.forward(loaded.model, batch).logits - fixed.model(batch).logits
    assert difference.abs().max() == 0
    assert any("already" in note for note in fix(fixed.model, Prenormalize(), [batch], timed=False).notes)
    other = fix(fixed.model, "prenormalize:kind=max", [batch], timed=False).model
    assert {norm.prenorm for norm in norms(other)} == {"max"}


def test_norm_that_is_no_equal_of_one_is_refused_with_the_place() -> None:
    with pytest.raises(InputError, match="1: "):
        fix(nn.Sequential(nn.Linear(4, 8), ScaleNorm(8), nn.Linear(8, 2)), Prenormalize(), [torch.randn(3, 4)])


def test_model_without_norms_has_nothing_to_replace_and_bad_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="there is nothing to replace"):
        fix(nn.Sequential(nn.Linear(4, 2)), Prenormalize(), [torch.randn(3, 4)], timed=False)
    with pytest.raises(InputError, match="one of mad, max, guaranteed, got 'mean'"):
        Prenormalize("mean")  # type: ignore[arg-type]

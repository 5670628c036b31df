from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix, load
from setpoint.errors import InputError
from setpoint.fixing import NotExact
from setpoint.fixing.measure import change_between, time_ratio
from setpoint.running import run_batch
from setpoint.surgery import Anatomy
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

Make = Callable[..., tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class Scaled:
    """Multiplies the head."""

    factor: float = 0.5
    stage: Stage = "transform"
    preserves: Preserves = "approximate"
    log: tuple[list[Any], ...] = ()

    id: ClassVar[str] = "scaled"

    def applies(self, anatomy: Any) -> Refusal | None:
        return None

    def plan(self, ctx: FixContext) -> list[Edit]:
        if self.log:
            self.log[0].append((self.stage, ctx.anatomy, ctx.reference))
        weight = ctx.model.get_parameter("2.weight").detach()
        return [Edit("2.weight", weight * self.factor)]


def test_fixes_run_by_stage_whatever_order_they_are_named_in(make: Make) -> None:
    model, batch = make("encoder")
    log: list[Any] = []
    wanted = [Scaled(stage=s, log=(log,)) for s in ("tune", "quantize", "transform", "compensate")]
    fixed = fix(model, wanted, [batch], timed=False)
    assert [stage for stage, _, _ in log] == ["transform", "quantize", "compensate", "tune"]
    torch.testing.assert_close(fixed.model[2].weight, model[2].weight * 0.5**4)


def test_the_structure_is_read_anew_before_each_fix_and_the_reference_stays(make: Make) -> None:
    model, batch = make("encoder")
    log: list[Any] = []
    fix(model, [Scaled(log=(log,)), Scaled(log=(log,))], [batch], timed=False)
    assert log[0][1] is not log[1][1]
    assert log[0][2] is log[1][2] is model


def test_a_promise_not_kept_is_undone(make: Make) -> None:
    model, batch = make("encoder")
    before = model[2].weight
    with pytest.raises(NotExact, match=r"in float64 they moved by 4\.5e-01"):
        fix(model, Scaled(preserves="exact"), [batch], inplace=True)
    assert model[2].weight is before


def test_a_change_below_the_models_own_rounding_is_no_change(make: Make) -> None:
    model, batch = make("encoder")
    fixed = fix(model, Scaled(factor=1.0 + 1e-12, preserves="exact"), [batch], timed=False)
    assert fixed.change.exact is not None
    assert 0 < fixed.change.exact[0] < 1e-9


def test_everything_is_undone_when_a_later_fix_fails(make: Make) -> None:
    model, batch = make("encoder")
    parts = list(model.modules()), list(model.parameters())
    with pytest.raises(InputError):
        fix(model, ["pre-rmsnorm", Scaled(preserves="exact", stage="tune")], [batch], inplace=True)
    assert all(a is b for a, b in zip(parts[0], model.modules(), strict=True))
    assert all(a is b for a, b in zip(parts[1], model.parameters(), strict=True))


def test_an_interrupt_while_training_gives_the_weights_back(make: Make) -> None:
    model, batch = make("gpt2")
    before = [p.detach().clone() for p in model.parameters()]

    def interrupted(changed: nn.Module) -> None:
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fix(model, "lns", [batch], inplace=True, retrain=interrupted)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_in_place_the_model_itself_is_changed_and_its_optimizers_are_called_stale(make: Make) -> None:
    model, batch = make("encoder")
    fixed = fix(model, "pre-rmsnorm", [batch], inplace=True, timed=False)
    assert fixed.model is model
    assert type(model[1].norm).__name__ == "RMSNorm"
    assert any("stale" in note for note in fixed.notes)
    assert fixed.change.difference < 1e-4


def test_a_compiled_model_is_fixed_inside(make: Make) -> None:
    model, batch = make("encoder")
    fixed = fix(torch.compile(model), "pre-rmsnorm", [batch], timed=False)
    assert fixed.change.exact is not None
    assert not hasattr(fixed.model, "_orig_mod")


def test_a_compiled_model_computes_the_changed_function_when_fixed_in_place(make: Make) -> None:
    model, batch = make("encoder")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(batch)
        fix(compiled, Scaled(), [batch], inplace=True, timed=False)
        bias = model[2].bias
        torch.testing.assert_close(compiled(batch) - bias, 0.5 * (before - bias))


def test_the_change_of_a_language_model_has_divergence_and_perplexity(make: Make) -> None:
    model, batch = make("gpt2")
    change = fix(model, "lns", [batch], timed=False).change
    assert change.perplexity is not None
    assert change.perplexity[0] != change.perplexity[1]
    assert change.divergence is not None
    assert change.divergence > 0
    assert change.exact is None


def test_the_change_counts_a_tied_tensor_once(make: Make) -> None:
    model, batch = make("gpt2")
    change = fix(model, "pre-crmsnorm:untie=true", [batch], timed=False).change
    assert change.parameters[0] == sum(p.numel() for p in model.parameters())
    assert change.bytes[0] == 4 * change.parameters[0]
    assert change.parameters[1] - change.parameters[0] > 0


def test_a_time_is_a_ratio_near_one_for_the_same_model_or_is_not_given(make: Make) -> None:
    model, batch = make("encoder")
    ratio = time_ratio(model, model, batch, run_batch)
    assert ratio is None or 0.5 < ratio < 2.0


def test_a_batch_that_does_not_fit_is_a_clear_error(make: Make) -> None:
    model, _ = make("encoder")
    with pytest.raises(InputError, match="could not be run on batch 1 of 1"):
        fix(model, "pre-rmsnorm", [torch.randn(2, 5, 7)])


def test_a_fault_of_our_own_is_not_blamed_on_the_model(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise IndexError("a mistake in the anatomy")

    model, batch = make("gpt2")
    monkeypatch.setattr("setpoint.surgery.Anatomy.trace", broken)
    with pytest.raises(IndexError, match=r"^a mistake in the anatomy$"):
        fix(model, "pre-rmsnorm", [batch])


def test_no_batches_is_a_clear_error(make: Make) -> None:
    model, _ = make("encoder")
    with pytest.raises(InputError, match="batches is empty"):
        fix(model, "pre-rmsnorm", [])


def test_a_model_that_breaks_by_a_fix_is_a_clear_error(make: Make) -> None:
    @dataclass(frozen=True)
    class Breaks(Scaled):
        def plan(self, ctx: FixContext) -> list[Edit]:
            return [Edit("2", Build("torch.nn:Linear", {"in_features": 9, "out_features": 3}))]

    model, batch = make("encoder")
    with pytest.raises(InputError, match="does not run after scaled"):
        fix(model, Breaks(), [batch], inplace=True)
    assert model[2].in_features == 8


def test_forward_and_loss_of_ones_own_are_used(make: Make) -> None:
    model, batch = make("gpt2")
    loaded = replace(load(model), task="other")
    fixed = fix(
        loaded,
        "pre-rmsnorm",
        [(batch,)],
        forward=lambda m, b: m(input_ids=b[0], use_cache=False).logits,
        loss=lambda output, b: output.float().square().mean(),
        timed=False,
    )
    assert fixed.change.perplexity is not None


def test_several_fixes_compose_and_the_statement_names_them(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "pre-rmsnorm,kv-bias-slot", [batch], timed=False)
    assert fixed.specs == ("pre-rmsnorm", "kv-bias-slot")
    assert fixed.change.exact is not None
    words = dict(fixed.lines())
    assert words["fixes"] == "pre-rmsnorm, kv-bias-slot"
    assert words["time"] == "not measurable here"


def test_casts_to_float32_inside_do_not_hide_behind_rounding(make: Make) -> None:
    """Llama's norms compute in float32 whatever comes in; judged in float64 all the same."""
    model, batch = make("llama")
    fixed = fix(model, "kv-bias-slot", [batch], timed=False)
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-12


@pytest.mark.parametrize("spec", ["pre-rmsnorm", "lns"])
def test_a_model_whose_outputs_are_not_finite_is_refused(make: Make, spec: str) -> None:
    model, batch = make("gpt2")
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite before the fix"):
        fix(model, spec, [batch], timed=False)


def test_outputs_that_are_not_finite_are_never_called_exact(make: Make) -> None:
    model, batch = make("encoder")
    broken = Scaled(factor=float("nan"))
    with pytest.raises(NotExact, match="before it are not finite"):
        fix(model, [broken, Scaled(factor=1.0, preserves="exact")], [batch], timed=False)


def test_a_fix_that_makes_outputs_not_finite_is_undone(make: Make) -> None:
    model, batch = make("encoder")
    before = model[2].weight
    with pytest.raises(InputError, match="after scaled the outputs are not finite"):
        fix(model, Scaled(factor=float("nan")), [batch], inplace=True, timed=False)
    assert model[2].weight is before


def test_a_measured_change_to_nan_is_nan(make: Make) -> None:
    model, batch = make("gpt2")
    broken, _ = make("gpt2")
    with torch.no_grad():
        next(broken.parameters())[0, 0] = torch.nan
    change = change_between(model, broken, [batch, batch], run_batch, anatomy=Anatomy.trace(model, batch), timed=False)
    assert change.difference != change.difference
    assert change.divergence is not None
    assert change.divergence != change.divergence


def test_a_fix_named_twice_is_said_to_have_changed_the_model_once(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "lns,lns", [batch], timed=False)
    assert fixed.notes == (
        "lns: its norms are scaled already; there is nothing to do",
        "lns changed what the model computes: train it before use",
    )


def test_what_a_factory_gives_is_not_said_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_factory.py").write_text("from setpoint.testing.tiny import gpt2\nbuild = gpt2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="tiny_factory:build may have been trained: give data"):
        fix("tiny_factory:build", "lns", [torch.ones(1, 4, dtype=torch.long)], timed=False)

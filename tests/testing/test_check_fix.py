"""`check_fix` must see each violation: one is planted per test."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from setpoint.fixes.lns import Scaling
from setpoint.fixing import engine
from setpoint.surgery import Anatomy, editing
from setpoint.surgery.copying import share, whole
from setpoint.testing import check_fix
from setpoint.testing.probe import ConformanceError
from setpoint.testing.tiny import tiny
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

HEAD = "2.weight"
"""Last weight of the tiny encoder."""


@dataclass(frozen=True)
class Good:
    """Halves the head and doubles nothing.

    Args:
        factor: What the head is multiplied by.
    """

    factor: float = 0.5

    id: ClassVar[str] = "halve-head"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "approximate"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        return None if anatomy.head is not None and anatomy.blocks else Refusal("", "it has no head")

    def plan(self, ctx: FixContext) -> list[Edit]:
        name = ctx.anatomy.head.parameter
        module, _, last = name.rpartition(".")
        weight = getattr(ctx.model.get_submodule(module), last)
        return [Edit(name, weight.detach() * self.factor)]


def caught(fix: Any, message: str, **options: Any) -> None:
    with pytest.raises(ConformanceError, match=message):
        check_fix(fix, **{"families": ["encoder"], **options})


def test_a_good_fix_passes() -> None:
    assert check_fix(Good(), families=["encoder", "gpt2"]) == ("encoder", "gpt2")
    assert check_fix(Good, lambda: tiny("vit")) == ("the given model",)


def test_a_published_fix_passes() -> None:
    assert check_fix(Scaling(), families=["encoder"]) == ("encoder",)


def test_a_fix_that_needs_arguments_is_caught() -> None:
    @dataclass(frozen=True)
    class Needy(Good):
        """Args: factor: as it is."""

        factor: float  # type: ignore[misc]

        def __init__(self, factor: float) -> None:
            object.__setattr__(self, "factor", factor)

    caught(Needy, "can't be made without arguments")


def test_a_mutable_fix_is_caught() -> None:
    @dataclass
    class Mutable:
        """Nothing."""

        id: ClassVar[str] = "mutable"
        stage: ClassVar[Stage] = "transform"
        preserves: ClassVar[Preserves] = "approximate"
        applies = Good.applies
        plan = Good.plan

    caught(Mutable(), "frozen=True")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("id", "Halve Head", "lower-case"), ("stage", "later", "the stage"), ("preserves", "mostly", "preserves")],
)
def test_a_wrong_declaration_is_caught(name: str, value: str, message: str) -> None:
    caught(type("Wrong", (Good,), {name: value, "__doc__": Good.__doc__})(), message)


def test_a_field_without_a_word_is_caught() -> None:
    @dataclass(frozen=True)
    class Silent(Good):
        """Says nothing of its field."""

    caught(Silent(), "does not explain")


def broken(plan: Callable[[Good, FixContext], Any] | None = None, **attributes: Any) -> Good:
    """The good fix with another plan or other attributes."""
    if plan is not None:
        attributes["plan"] = plan
    return type("Broken", (Good,), {"__doc__": Good.__doc__, **attributes})()  # type: ignore[no-any-return]


def test_a_refusal_without_a_reason_is_caught() -> None:
    caught(broken(applies=lambda self, anatomy: Refusal("", " ")), "without a reason")


def test_a_refusal_of_a_place_that_is_not_there_is_caught() -> None:
    caught(broken(applies=lambda self, anatomy: Refusal("no.such", "because")), "which it does not have")


def test_a_changing_answer_is_caught() -> None:
    answers = iter([None, Refusal("", "changed my mind")])
    caught(broken(applies=lambda self, anatomy: next(answers)), "differently the second time")


def test_a_fix_that_accepts_nothing_is_caught() -> None:
    caught(broken(applies=lambda self, anatomy: Refusal("", "never")), "accepts none")


def test_a_crash_on_a_plain_model_is_caught() -> None:
    caught(broken(applies=lambda self, anatomy: None if anatomy.blocks else anatomy.blocks[0]), "broke on a model")


def test_writing_into_a_tensor_while_planning_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        with torch.no_grad():
            ctx.model.get_parameter(HEAD).mul_(0.5)
        return Good.plan(self, ctx)

    caught(broken(plan), "planning changed the model")


def test_replacing_a_module_while_planning_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        edits = Good.plan(self, ctx)
        ctx.model[2] = nn.Linear(8, 3)  # type: ignore[operator]
        return edits

    caught(broken(plan), "planning changed the model")


def test_something_that_is_no_edit_is_caught() -> None:
    caught(broken(lambda self, ctx: ["2.weight"]), "no setpoint.types.Edit")


def test_an_empty_plan_is_caught() -> None:
    caught(broken(lambda self, ctx: []), "plans nothing")


def test_randomness_of_its_own_is_caught() -> None:
    caught(broken(lambda self, ctx: [Edit(HEAD, torch.randn(3, 8))]), "something else the second time")


def test_the_global_generator_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        torch.rand(1)
        return Good.plan(self, ctx)

    caught(broken(plan), "global generator")


def head_of(ctx: FixContext) -> nn.Module:
    return copy.deepcopy(ctx.model.get_submodule("2"))


def test_a_hook_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        layer = head_of(ctx)
        layer.register_forward_hook(lambda module, args, output: output * 0.5)
        return [Edit("2", layer)]

    caught(broken(plan), "left forward hooks")


def test_a_module_in_another_mode_is_caught() -> None:
    caught(broken(lambda self, ctx: [Edit("2", head_of(ctx).eval())]), "in eval mode")


def test_a_broken_promise_of_exactness_is_caught() -> None:
    caught(broken(preserves="exact"), "promises the same outputs")


def test_a_promise_broken_only_in_training_data_type_is_caught() -> None:
    """Exact in float64, too coarse in the model's own type."""

    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        weight = ctx.model.get_parameter(HEAD).detach()
        return [Edit(HEAD, weight if weight.dtype == torch.float64 else weight.bfloat16().to(weight.dtype))]

    caught(broken(plan, preserves="exact"), "rounding explains")


def test_a_tensor_that_is_copied_for_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "share", whole)
    caught(Good(), "was copied though no edit names it")


def test_a_broken_tie_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def untied(model: nn.Module) -> nn.Module:
        model = share(model)
        if hasattr(model, "lm_head"):
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    monkeypatch.setattr(engine, "share", untied)
    norm = Edit("transformer.ln_f.weight", torch.ones(16))
    caught(broken(lambda self, ctx: [norm]), "were one tensor|was copied", families=["gpt2"])


def test_a_model_that_cannot_be_saved_is_caught() -> None:
    caught(broken(lambda self, ctx: [Edit("2", head_of(ctx))]), "can't be saved")


def test_another_type_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        return [Edit("1.norm.bias", ctx.model.get_parameter("1.norm.bias").detach().float() * 0.5)]

    caught(broken(plan), "has parameters of|does not run")


def test_a_fused_path_that_reads_old_parts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        build = Build("setpoint.nn:RMSNorm", {"normalized_shape": 8, "bias": True})
        return [Edit(f"1.layers.{layer}.norm{n}", build) for layer in (0, 1) for n in (1, 2)]

    assert check_fix(broken(plan), families=["encoder"])
    monkeypatch.setattr(editing, "_slow_path", lambda *args: None)
    caught(broken(plan), "fused path")


def test_a_half_made_edit_that_stays_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "rollback", lambda undo: None)
    caught(Good(), "changed although a later fix failed")


def test_an_impossible_edit_that_goes_unnoticed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(model: nn.Module, edits: Any) -> Any:
        return editing.commit(model, [edit for edit in edits if not edit.path.startswith("no.such")])

    monkeypatch.setattr(engine, "commit", careless)
    caught(Good(), "went unnoticed")


def test_a_model_to_be_trained_that_lies_in_the_originals_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_fix(broken(preserves="retrain"), families=["encoder"])
    monkeypatch.setattr(engine, "whole", share)
    caught(broken(preserves="retrain"), "training the new model trains the old")


def test_an_edit_that_is_a_view_of_the_original_is_caught_if_it_is_to_be_trained() -> None:
    caught(
        broken(lambda self, ctx: [Edit(HEAD, ctx.reference.get_parameter(HEAD).detach())], preserves="retrain"),
        "training the new model trains the old",
    )


def test_values_that_change_without_an_edit_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: nn.Module) -> nn.Module:
        model = whole(model)
        with torch.no_grad():
            model.get_parameter("1.norm.bias").add_(1.0)
        return model

    monkeypatch.setattr(engine, "whole", forgetful)
    caught(broken(preserves="retrain"), "other values though no edit names it")


def test_what_overflows_in_half_precision_is_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        weight = ctx.model.get_parameter(HEAD).detach()
        return [Edit(HEAD, weight.sign() * 65504 if weight.dtype == torch.float16 else weight * 0.5)]

    caught(broken(plan), "not finite afterwards|overflow|finite")


def test_state_that_no_edit_carries_is_caught() -> None:
    """A module of setpoint whose values come from nowhere but the plan."""

    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        module = editing.construct(ctx.model, Build("setpoint.nn:DyT", {"normalized_shape": 8}), ctx.model)
        module.alpha_init_value = 0.9
        return [Edit("1.norm", module)]

    caught(broken(plan), "can't be saved")


def test_frozen_parameters_that_thaw_are_caught() -> None:
    def plan(self: Good, ctx: FixContext) -> list[Edit]:
        return [Edit(HEAD, nn.Parameter(ctx.model.get_parameter(HEAD).detach() * 0.5))]

    caught(broken(plan), "were frozen and are trained now")


def test_the_suite_needs_a_model_that_is_accepted_when_one_is_given() -> None:
    caught(Good(), "accepts none", make=lambda: (nn.Sequential(nn.Linear(4, 2)), torch.ones(1, 4)))

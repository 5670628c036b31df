from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from setpoint.catalog import methods
from setpoint.probe.remedies import fitting, remedies
from setpoint.surgery import Anatomy

Make = Callable[..., tuple[nn.Module, Tensor]]


def offered(model: nn.Module, batch: Tensor, code: str) -> set[str]:
    anatomy = Anatomy.trace(model, batch)
    return {remedy.key for remedy in fitting(remedies(code, anatomy.structure, methods), anatomy)}


def test_a_fix_is_offered_to_a_model_that_can_take_it(make: Make) -> None:
    assert {"lns", "peri-ln"} <= offered(*make("gpt2"), "variance-growth")
    assert "dyt" in offered(*make("llama"), "massive-activation")
    assert "tvr" in offered(*make("llama"), "massive-activation")


def test_a_fix_is_not_offered_to_a_model_that_it_would_refuse(make: Make) -> None:
    found = offered(*make("bert"), "variance-growth")
    assert not {"lns", "peri-ln"} & found
    eager, batch = make("gpt2")
    eager.set_attn_implementation("eager")
    assert "kv-bias" not in offered(eager, batch, "attention-saturation")


def test_methods_that_are_only_published_stay(make: Make) -> None:
    model, batch = make("bert")
    anatomy = Anatomy.trace(model, batch)
    published = [r for r in remedies("variance-growth", anatomy.structure, methods) if not r.available]
    assert set(published) <= set(fitting(published, anatomy))

"""What fixes say of a model with nothing for them to act on, and of one that is as they would make it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.catalog import items
from setpoint.fixing import Refused
from setpoint.testing.tiny import tiny

FIXES = [item.id for _, item in items().values() if item.kind == "fix"]


def images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*layers).eval(), torch.randn(4, 3, 9, 9)


@pytest.mark.parametrize("spec", FIXES)
def test_a_model_with_nothing_to_act_on_is_refused(spec: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(Refused):
        fix(model, spec, [torch.randn(3, 4)], timed=False)


@pytest.mark.parametrize(
    ("spec", "family"),
    [
        ("dyt", "gpt2"),
        ("kv-bias", "gpt2"),
        ("kv-bias", "encoder"),
        ("kv-bias-slot", "llama"),
        ("lns", "gpt2"),
        ("osp", "llama"),
        ("peri-ln", "llama"),
        ("powernorm", "encoder"),
        ("pre-crmsnorm", "vit"),
        ("pre-rmsnorm", "gpt2"),
        ("prenormalize", "llama"),
        ("scalenorm", "gpt2"),
        ("sdd", "llama"),
        ("unified-norm", "encoder"),
    ],
)
def test_a_transformer_that_is_so_already_is_left_as_it_is(spec: str, family: str) -> None:
    model, batch = tiny(family)
    once = fix(model, spec, [batch], timed=False)
    twice = fix(once.model, spec, [batch], timed=False)
    assert once.edits
    assert not twice.edits
    assert "already" in twice.notes[0] or "nothing to" in twice.notes[0]


@pytest.mark.parametrize("spec", ["alpha-bn", "evonorm", "online-norm", "region-norm"])
def test_a_network_of_images_that_is_so_already_is_left_as_it_is(spec: str) -> None:
    model, batch = images()
    once = fix(model, spec, [batch], timed=False)
    twice = fix(once.model, spec, [batch], timed=False)
    assert once.edits
    assert not twice.edits


def test_closed_slots_are_opened_and_not_doubled() -> None:
    model, batch = tiny("gpt2")
    closed = fix(model, "kv-bias-slot", [batch], timed=False).model
    with pytest.raises(Refused, match="slot_logit = 0"):
        fix(closed, "kv-bias", [batch], timed=False)

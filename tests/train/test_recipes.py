from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import DyT, LayerNormScaling, RMSNorm
from setpoint.optim import decay_groups, is_decayed, no_weight_decay
from setpoint.train import SGD, WSD, AdamW, Constant, Cosine


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.LayerNorm((3, 4))
        self.batch = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(2, 2))


def decayed(model: nn.Module) -> list[str]:
    return decay_groups(model, 0.1)[0]["names"]


def test_key_and_value_biases_of_torchs_attention_are_not_decayed() -> None:
    names = decayed(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    assert names == ["in_proj_weight", "out_proj.weight"]


def test_norms_biases_and_scalars_are_not_decayed() -> None:
    groups = decay_groups(Parts(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["names"] == ["table", "embed.weight", "conv.weight"]
    assert set(groups[1]["names"]) == {"scale", "conv.bias", "norm.weight", "norm.bias", "batch.weight", "batch.bias"}


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm((3, 4), bias=True),
        DyT((3, 4)),
        LayerNormScaling(RMSNorm((3, 4)), 2),
        LayerNormScaling(nn.LayerNorm((3, 4)), 2),
    ],
    ids=["rmsnorm", "dyt", "scaled rmsnorm", "scaled layernorm"],
)
def test_a_norm_with_a_gain_per_position_is_not_decayed(norm: nn.Module) -> None:
    groups = decay_groups(nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm)), 0.1)
    assert groups[0]["names"] == ["0.weight"]


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("meta")])
def test_a_mark_stays_through_copies_and_moves(through) -> None:  # type: ignore[no-untyped-def]
    model = no_weight_decay(Parts(), "table")
    no_weight_decay(model.embed)
    assert decayed(through(model)) == ["conv.weight"]


def test_marks_add_up_and_unknown_names_are_refused() -> None:
    linear = no_weight_decay(no_weight_decay(nn.Linear(2, 2), "bias"), "weight")
    assert not is_decayed(linear, "weight")
    with pytest.raises(InputError, match="no parameter 'wieght' of its own; it has weight"):
        no_weight_decay(linear, "wieght")


def test_a_tied_weight_is_not_decayed_if_one_owner_says_so() -> None:
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    assert decayed(model) == ["0.weight"]
    no_weight_decay(embed)
    assert decay_groups(model, 0.1)[0]["weight_decay"] == 0.0
    assert len(decay_groups(model, 0.1)) == 1


def test_frozen_parameters_are_left_out_and_timm_is_heard() -> None:
    class Timm(Parts):
        def no_weight_decay(self) -> set[str]:
            return {"embed.weight"}

    model = Timm()
    model.conv.requires_grad_(False)
    assert decayed(model) == ["table"]
    with pytest.raises(InputError, match="nothing to train"):
        decay_groups(model.requires_grad_(False), 0.1)


def test_recipes_build_what_torch_builds() -> None:
    model = Parts()
    adam = AdamW(lr=0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.3).build(model)
    assert isinstance(adam, torch.optim.AdamW)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.3, 0.0]
    assert adam.defaults["lr"] == 0.5
    assert adam.defaults["betas"] == (0.1, 0.2)
    sgd = SGD(lr=0.5, momentum=0.9, nesterov=True).build(model)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["nesterov"]
    assert sum(len(group["params"]) for group in sgd.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("schedule", [Constant(10), Cosine(10, 0.1), WSD(10, 20), Cosine(0.1), WSD(0.1, 0.2)])
def test_schedules_warm_up_to_the_peak(schedule) -> None:  # type: ignore[no-untyped-def]
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert all(b >= a for a, b in pairwise(rates[:10]))
    assert all(b <= a for a, b in pairwise(rates[10:]))


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_floor() -> None:
    rates = [Cosine(warmup=0, final=0.2)(step, 101) for step in range(101)]
    assert rates[50] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert rates[25] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_stays_and_then_falls_linearly() -> None:
    rates = [WSD(warmup=0, decay=10, final=0.5)(step, 100) for step in range(100)]
    assert set(rates[:90]) == {1.0}
    assert rates[90:] == pytest.approx([0.5 + 0.05 * left for left in range(9, -1, -1)])


def test_a_run_of_one_step_has_a_rate() -> None:
    assert Cosine()(0, 1) == 1.0
    assert 0 <= WSD()(0, 1) <= 1


@pytest.mark.parametrize("wrong", [lambda: Cosine(warmup=1.5), lambda: WSD(decay=-1), lambda: Constant(warmup=-0.1)])
def test_shares_above_one_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="as a number of steps"):
        wrong()

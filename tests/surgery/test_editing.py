from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.surgery.copying import editable, in_float64, share, whole
from setpoint.surgery.editing import commit, rollback, ties
from setpoint.testing.tiny import tiny
from setpoint.types import Build, Edit, Ref


def tied() -> nn.Module:
    model = nn.Module()
    model.table, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.table.weight
    return model


def test_a_tied_tensor_is_replaced_at_all_its_places() -> None:
    model = tied()
    commit(model, [Edit("head.weight", torch.ones(5, 3))])
    assert model.table.weight is model.head.weight
    assert model.table.weight.tolist() == [[1.0] * 3] * 5


def test_a_shared_module_is_replaced_at_all_its_places() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    commit(model, [Edit("2", Build("torch.nn:Identity"))])
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Identity)


def test_edits_write_into_no_tensor() -> None:
    model = nn.Linear(2, 2)
    old = model.weight
    before = old.detach().clone()
    commit(model, [Edit("weight", torch.zeros(2, 2))])
    assert torch.equal(old, before)
    assert model.weight is not old


def test_a_failure_half_way_undoes_what_came_before() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    parts, parameters = list(model.modules()), list(model.parameters())
    edits = [
        Edit("0.weight", torch.zeros(4, 2)),
        Edit("1", Build("setpoint.nn:RMSNorm", {"normalized_shape": 4})),
        Edit("2.bias", torch.zeros(2)),
        Edit("7.weight", torch.zeros(1)),
    ]
    with pytest.raises(InputError, match=r"no '7' \(for the edit of '7\.weight'\)"):
        commit(model, edits)
    assert all(a is b for a, b in zip(parts, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert (model[0].out_features, model[2].bias) == (3, None)


def test_undoing_gives_back_the_same_objects() -> None:
    model = tied()
    old = model.table.weight
    undo = commit(model, [Edit("table.weight", torch.ones(7, 3)), Edit("head", Build("torch.nn:Identity"))])
    assert model.table.num_embeddings == 7
    rollback(undo)
    assert model.table.weight is model.head.weight is old
    assert model.table.num_embeddings == 5


def test_sizes_follow_the_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(3, 4, 1))
    commit(model, [Edit("0.weight", torch.zeros(5, 2)), Edit("1.weight", torch.zeros(4, 5, 1, 1))])
    assert (model[0].out_features, model[1].in_channels) == (5, 5)


def test_a_frozen_parameter_stays_frozen() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    commit(model, [Edit("weight", torch.zeros(2, 2))])
    assert not model.weight.requires_grad


def test_a_bias_that_was_left_out_can_be_put_in() -> None:
    model = nn.Linear(2, 2, bias=False)
    commit(model, [Edit("bias", torch.ones(2))])
    assert model(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


def test_a_module_can_be_put_around_itself_and_taken_out_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    inner = model[0]
    commit(model, [Edit("0", Build("setpoint.surgery.inserts:CentredInput", {"inner": Ref("0")}))])
    assert model[0].inner is inner
    assert model[0].in_features == 2
    commit(model, [Edit("0", Ref("0.inner"))])
    assert model[0] is inner


def test_a_new_module_has_the_type_and_mode_of_the_old() -> None:
    model = nn.Sequential(nn.LayerNorm(3)).bfloat16().eval()
    commit(model, [Edit("0", Build("setpoint.nn:RMSNorm", {"normalized_shape": 3}))])
    assert model[0].weight.dtype == torch.bfloat16
    assert not model[0].training


@pytest.mark.parametrize("target", ["os:system", "setpoint.nn:Nothing", "setpoint.errors:nearest", "builtins:print"])
def test_a_build_is_a_module_class_of_setpoint_or_torch(target: str) -> None:
    with pytest.raises(InputError):
        commit(nn.Sequential(nn.ReLU()), [Edit("0", Build(target))])


def test_a_build_with_wrong_arguments_is_a_clear_error() -> None:
    with pytest.raises(InputError, match="can't be built"):
        commit(nn.Sequential(nn.ReLU()), [Edit("0", Build("setpoint.nn:DyT", {"width": 3}))])


def test_an_attribute_that_is_no_tensor_is_not_overwritten() -> None:
    with pytest.raises(InputError, match="is a int, not a tensor"):
        commit(nn.Linear(2, 2), [Edit("in_features", torch.zeros(1))])


def test_a_shared_copy_has_modules_of_its_own_and_the_tensors_of_the_model() -> None:
    model, _ = tiny("gpt2")
    twin = share(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert ties(twin) == ties(model) == {"lm_head.weight": "transformer.wte.weight"}


def test_buffers_of_a_shared_copy_are_its_own() -> None:
    model = nn.BatchNorm1d(2)
    twin = share(model)
    twin(torch.randn(8, 2))
    assert model.running_mean.tolist() == [0.0, 0.0]


def test_a_copy_in_float64_keeps_ties_and_counts() -> None:
    model = tied()
    wide = in_float64(model)
    assert wide.table.weight is wide.head.weight
    assert wide.table.weight.dtype == torch.float64
    assert model.table.weight.dtype == torch.float32


def test_a_whole_copy_shares_nothing() -> None:
    model = tied()
    assert whole(model).table.weight is not model.table.weight


def test_wrappers_are_looked_through_and_programs_are_refused() -> None:
    model = nn.Linear(2, 2)
    assert editable(torch.compile(model)) is model
    with pytest.raises(InputError, match="TorchScript"):
        editable(torch.jit.script(nn.Linear(2, 2)))

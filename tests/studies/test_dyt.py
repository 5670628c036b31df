"""The arms differ in their norms and in nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint.nn import DyT, LayerNorm, RMSNorm
from setpoint.studies import Budget, Context
from setpoint.studies import _language as language
from setpoint.studies import dyt as proof
from setpoint.studies.dyt import language_model, model_for

SMALL = Budget(2, 0.1, language.SMOKE)
NORMS = (RMSNorm, LayerNorm, DyT)


def model(arm: str) -> nn.Module:
    return model_for(language_model.arm(arm)["norm"], 8.0, 0, SMALL, Context())


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, NORMS)]


def test_model_without_norms_has_none() -> None:
    assert not norms(model("none"))


@pytest.mark.parametrize("arm", ["rmsnorm", "dyt"])
def test_every_norm_is_replaced(arm: str) -> None:
    kinds = {type(norm) for norm in norms(model(arm))}
    assert kinds == {RMSNorm if arm == "rmsnorm" else DyT}
    assert len(norms(model(arm))) == 2 * SMALL["depth"] + 1


def test_arms_start_from_the_same_matrices() -> None:
    plain, squashed = (dict(model(arm).named_parameters()) for arm in ("none", "dyt"))
    assert plain.keys() < squashed.keys()
    assert all(torch.equal(plain[name], squashed[name]) for name in plain)


def test_head_has_a_matrix_of_its_own() -> None:
    network = model("dyt")
    assert network.head.weight is not network.embedding.weight


def test_tuned_alpha_reaches_every_dyt(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[nn.Module] = []

    def kept(*args: object) -> nn.Module:
        built.append(model_for(*args))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(proof, "model_for", kept)
    setting = {"lr": 0.0, "embedding_scale": 8.0, "alpha": 0.125}
    language_model(language_model.arm("dyt"), setting, 0, SMALL, Context())
    assert {norm.alpha.item() for norm in norms(built[0])} == {0.125}

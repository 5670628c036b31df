from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.osp import OutlierSafe, ProjectionFolding
from setpoint.nn import ProjectedEmbedding, ProjectedHead, RMSNorm, SSNorm

Make = Callable[..., tuple[nn.Module, Tensor]]


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "decoder"])
def test_norms_table_and_head_are_replaced(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model, OutlierSafe(), [batch], timed=False).model
    assert len(kinds(fixed, SSNorm)) == 5
    assert not kinds(fixed, nn.LayerNorm)
    assert len(kinds(fixed, ProjectedEmbedding)) == len(kinds(fixed, ProjectedHead)) == 1
    table = fixed.get_submodule(kinds(fixed, ProjectedEmbedding)[0])
    assert table.num_embeddings == 64  # and not GPT-2's positions
    assert table.weight is not fixed.get_submodule(kinds(fixed, ProjectedHead)[0]).weight


def test_each_half_can_be_had_alone(make: Make) -> None:
    model, batch = make("decoder")
    norms = fix(model, "osp:projections=false", [batch], timed=False).model
    assert kinds(norms, SSNorm)
    assert norms.head.weight is norms.embedding.weight
    projections = fix(model, "osp:norms=false", [batch], timed=False).model
    assert kinds(projections, RMSNorm)
    assert kinds(projections, ProjectedHead) == ["head"]


def test_model_without_tokens_is_refused_unless_projections_are_left_out(make: Make) -> None:
    model, batch = make("encoder")
    with pytest.raises(InputError, match="no token table and head for projections; add projections=false"):
        fix(model, OutlierSafe(), [batch])
    assert len(kinds(fix(model, OutlierSafe(projections=False), [batch], timed=False).model, SSNorm)) == 5


def test_it_is_done_once(make: Make) -> None:
    model, batch = make("decoder")
    fixed = fix(model, OutlierSafe(), [batch], timed=False)
    again = fix(fixed.loaded, OutlierSafe(), [batch], timed=False, untrained_ok=True)
    assert not again.edits
    assert any("it has these layers already" in note for note in again.notes)


@pytest.mark.parametrize("family", ["gpt2", "decoder"])
def test_trained_projections_fold_into_table_and_head(make: Make, family: str) -> None:
    model, batch = make(family)
    model = fix(model, "osp", [batch], timed=False).model
    for module in model.modules():
        if isinstance(module, ProjectedEmbedding | ProjectedHead):
            nn.init.normal_(module.projection.weight, std=0.3)
    fixed = fix(model, ProjectionFolding(), [batch], timed=False)
    assert not kinds(fixed.model, ProjectedEmbedding | ProjectedHead)  # type: ignore[arg-type]
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-9


def test_folded_model_comes_back_from_disk(make: Make, tmp_path: Path) -> None:
    model, batch = make("decoder")
    fixed = fix(fix(model, "osp", [batch], timed=False).loaded, "osp-fold", [batch], timed=False, untrained_ok=True)
    loaded = setpoint.load(fixed.save(tmp_path / "folded"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(batch), fixed.model(batch), atol=0, rtol=0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="eps above 0"):
        OutlierSafe(eps=0.0)
    with pytest.raises(InputError, match="there is nothing to do"):
        OutlierSafe(norms=False, projections=False)

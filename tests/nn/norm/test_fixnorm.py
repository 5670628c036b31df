"""FixNorm, embeddings of unit length (Nguyen and Salazar, 2019)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from setpoint.errors import InputError
from setpoint.nn import FixNormEmbedding, ScaleNorm
from setpoint.optim.decay import decay_groups


def test_every_embedding_has_length_root_width() -> None:
    table = FixNormEmbedding(11, 16)
    torch.testing.assert_close(table(torch.arange(11)).norm(dim=-1), torch.full((11,), 4.0))


def test_lengths_of_stored_rows_change_neither_embeddings_nor_logits() -> None:
    table, h = FixNormEmbedding(11, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    before = table(torch.arange(11)), table.as_logits(h)
    with torch.no_grad():
        table.weight.mul_(torch.rand(11, 1) + 0.5)
    torch.testing.assert_close((table(torch.arange(11)), table.as_logits(h)), before)


def test_logits_are_products_with_unit_rows_without_the_factor_of_the_input() -> None:
    table, h, bias = FixNormEmbedding(11, 6), torch.randn(3, 6), torch.randn(11)
    torch.testing.assert_close(table.as_logits(h, bias), h @ F.normalize(table.weight, dim=-1).T + bias)


def test_behind_a_scalenorm_logits_are_its_length_times_a_cosine() -> None:
    table, norm, x = FixNormEmbedding(11, 6), ScaleNorm(6, scale=3.0), torch.randn(3, 6)
    cosine = F.cosine_similarity(x[:, None], table.weight[None], dim=-1)
    torch.testing.assert_close(table.as_logits(norm(x)), 3.0 * cosine)


def test_gradient_flows_through_the_length() -> None:
    table = FixNormEmbedding(11, 6, dtype=torch.float64)
    table.as_logits(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.abs().max() > 0
    assert (table.weight.grad * table.weight).sum(-1).abs().max() < 1e-10


def test_the_stored_table_starts_uniform_within_a_hundredth() -> None:
    weight = FixNormEmbedding(500, 64).weight.detach()
    assert weight.abs().max() <= 0.01
    assert weight.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)


def test_padding_is_zero_and_takes_no_gradient() -> None:
    table = FixNormEmbedding(11, 6, padding_idx=-1)
    y = table(torch.tensor([10, 3]))
    y.square().sum().backward()
    assert y[0].abs().max() == 0
    assert table.weight.grad is not None
    assert table.weight.grad[10].abs().max() == 0


def test_the_table_is_not_decayed() -> None:
    assert decay_groups(FixNormEmbedding(11, 6), 0.1)[0]["weight_decay"] == 0.0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        FixNormEmbedding(0, 4)
    with pytest.raises(InputError, match="scale above 0"):
        FixNormEmbedding(4, 4, scale=-1.0)
    with pytest.raises(InputError, match="padding_idx within a table of 4, got 4"):
        FixNormEmbedding(4, 4, padding_idx=4)
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        FixNormEmbedding(4, 4).as_logits(torch.randn(2, 5))

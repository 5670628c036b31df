"""The fidelity checks of outlier-safe pre-training's layers (Park, Lee, Kim and Kang, 2025)."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import (
    EmbeddingProjection,
    ProjectedEmbedding,
    ProjectedHead,
    RMSNorm,
    ScaleNorm,
    SSNorm,
)
from setpoint.optim.decay import decay_groups

Double = torch.float64


def scaled(gain: float = 2.5, dim: int = 6, eps: float = 1e-6) -> SSNorm:
    layer = SSNorm(dim, eps, dtype=Double)
    nn.init.constant_(layer.weight, gain)
    return layer


def rotation(dim: int = 6) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=Double))[0]


def test_it_is_an_rms_norm_whose_gains_are_one_number() -> None:
    x, plain = torch.randn(4, 3, 6, dtype=Double), RMSNorm(6, eps=1e-6, dtype=Double)
    nn.init.constant_(plain.weight, 2.5)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled()(x), plain(x), atol=1e-12, rtol=0)


def test_it_commutes_with_rotations_and_gains_per_channel_do_not() -> None:
    x, turn = torch.randn(5, 6, dtype=Double), rotation()
    torch.testing.assert_close(scaled()(x @ turn), scaled()(x) @ turn, atol=1e-12, rtol=0)
    plain = RMSNorm(6, dtype=Double)
    nn.init.normal_(plain.weight)  # type: ignore[arg-type]
    assert (plain(x @ turn) - plain(x) @ turn).abs().max() > 0.1


def test_every_token_has_the_gain_as_its_root_mean_square() -> None:
    y = scaled(0.7, eps=0.0)(torch.randn(4, 3, 6, dtype=Double))
    torch.testing.assert_close(y.square().mean(-1).sqrt(), torch.full((4, 3), 0.7, dtype=Double))


def test_length_of_the_input_does_not_count_where_eps_is_small_beside_it() -> None:
    x = torch.randn(4, 6, dtype=Double)
    torch.testing.assert_close(scaled()(1e4 * x), scaled(eps=0.0)(x), atol=1e-9, rtol=0)


def test_gradient_of_the_gain_sums_over_tokens_and_channels() -> None:
    layer, x, upstream = scaled(), torch.randn(4, 3, 6, dtype=Double), torch.randn(4, 3, 6, dtype=Double)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, layer.weight, upstream)
    torch.testing.assert_close(gradient, (y * upstream).sum() / 2.5)


def test_the_papers_equation_is_scale_norm_with_a_root_of_the_width() -> None:
    x, other = torch.randn(4, 6, dtype=Double), ScaleNorm(6, scale=2.5 * sqrt(6), dtype=Double)
    torch.testing.assert_close(scaled(eps=0.0)(x), other(x))


def test_gain_is_one_number_that_starts_at_one_and_is_not_decayed() -> None:
    layer = SSNorm((2, 3))
    assert layer.weight.shape == ()
    assert layer.weight.item() == 1.0
    groups = decay_groups(nn.Sequential(nn.Linear(4, 4), layer), 0.1)
    assert "1.weight" in groups[1]["names"]


def test_a_gain_that_was_stored_as_a_vector_of_one_entry_loads() -> None:
    model = nn.Sequential(SSNorm(4))
    model.load_state_dict({"0.weight": torch.tensor([3.0])})
    assert model[0].weight.item() == 3.0
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"0.weight": torch.ones(4)})


def test_the_squares_of_float16_do_not_overflow() -> None:
    x = torch.full((1, 512), 256.0, dtype=torch.float16)
    torch.testing.assert_close(SSNorm(512, dtype=torch.float16)(x), torch.ones_like(x), atol=2e-3, rtol=0)


def test_projections_are_orthogonal_at_the_start_in_every_precision() -> None:
    for dtype, tolerance in ((Double, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        weight = EmbeddingProjection(16, dtype=dtype).weight.detach().double()
        torch.testing.assert_close(weight @ weight.T, torch.eye(16, dtype=Double), atol=tolerance, rtol=0)


def test_a_projected_row_has_the_length_of_the_row_at_the_start() -> None:
    table, tokens = ProjectedEmbedding(11, 8, dtype=Double), torch.arange(11)
    torch.testing.assert_close(table(tokens).norm(dim=-1), table.weight.norm(dim=-1))


def test_folded_tables_compute_the_same() -> None:
    table, head = ProjectedEmbedding(11, 8, dtype=Double), ProjectedHead(8, 11, dtype=Double)
    nn.init.normal_(table.projection.weight), nn.init.normal_(head.projection.weight)
    tokens, x = torch.arange(11), torch.randn(5, 8, dtype=Double)
    torch.testing.assert_close(table.folded_weight(), table(tokens))
    torch.testing.assert_close(nn.functional.linear(x, head.folded_weight(), head.bias), head(x))


def test_both_weights_of_a_table_start_anew_and_the_padding_row_stays_zero() -> None:
    table = ProjectedEmbedding(11, 8, padding_idx=0)
    before = table.projection.weight.clone()
    table.reset_parameters()
    assert not torch.equal(table.projection.weight, before)
    assert table(torch.zeros(1, dtype=torch.long)).abs().max() == 0


def test_bad_arguments_and_inputs_are_refused() -> None:
    for make in (lambda: SSNorm(0), lambda: SSNorm(()), lambda: EmbeddingProjection(0)):
        with pytest.raises(InputError, match="expected"):
            make()
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        SSNorm(4)(torch.randn(2, 5))
    with pytest.raises(InputError, match=r"\(\*, 4\), got \(2, 5\)"):
        ProjectedHead(4, 3)(torch.randn(2, 5))
    with pytest.raises(TypeError, match="int64"):
        SSNorm(4)(torch.ones(2, 4, dtype=torch.long))

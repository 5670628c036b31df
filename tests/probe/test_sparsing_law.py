"""Fidelity to PPL-p % sparsity of Luo et al., 2024 (arXiv 2411.02335)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.probe.interventions.sparsity import (
    cett,
    down_weight,
    find_threshold,
    neuron_magnitudes,
    ppl_sparsity,
    sparse_ffn,
)


class Model(nn.Module):
    """Two residual feed-forwards between an embedding and a head, with a peaked distribution over next tokens."""

    def __init__(self, activation: nn.Module, width: int = 16, hidden: int = 64, vocabulary: int = 400) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.activation = activation
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + 3 * down(self.activation(up(norm(x))))
        return self.head(x)


DOWNS = ["downs.0", "downs.1"]
IDS = (7 * torch.arange(400)).remainder(397).view(4, 100)


def trained(activation: nn.Module) -> Model:
    """A few steps on a repeating sequence, so that the feed-forwards matter."""
    torch.manual_seed(0)
    model = Model(activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(IDS)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def silu() -> Model:
    return trained(nn.SiLU())


@pytest.fixture(scope="module")
def relu() -> Model:
    return trained(nn.ReLU())


def activations(tokens: int = 40, hidden: int = 32, out: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, hidden), torch.randn(out, hidden)


# Check 1


def test_threshold_zero_drops_nothing() -> None:
    h, w = activations()
    h[h < 0] = 0.0
    assert cett(h, w, 0.0) == 0.0


def test_threshold_zero_leaves_the_model_as_it_is(relu: Model) -> None:
    plain = relu(IDS)
    with sparse_ffn(relu, dict.fromkeys(DOWNS, 0.0)) as active:
        assert torch.equal(relu(IDS), plain)
    assert all(float(share.min()) == 1.0 for shares in active.values() for share in shares)


# Check 2


def test_threshold_infinity_drops_everything() -> None:
    h, w = activations()
    assert cett(h, w, float("inf")) == 1.0


# Check 3


def test_three_four_five() -> None:
    h, w = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    assert neuron_magnitudes(h, w).tolist() == [[3.0, 4.0]]
    assert cett(h, w, 3.5) == pytest.approx(0.6)


# Check 4


def dropped(h: Tensor, w: Tensor, target: float = 0.2) -> Tensor:
    return neuron_magnitudes(h, w) < find_threshold(h, w, target)


def test_masks_do_not_change_when_the_output_weight_is_scaled() -> None:
    h, w = activations()
    assert torch.equal(dropped(h, w), dropped(h, 8.0 * w))


def test_masks_do_not_change_when_scale_moves_between_unit_and_weight() -> None:
    h, w = activations()
    scale = 2.0 ** torch.randint(-3, 4, (h.shape[1],)).float()
    assert torch.equal(dropped(h, w), dropped(h * scale, w / scale))
    assert not torch.equal((h.abs() < 0.3), ((h * scale).abs() < 0.3)), "a cut on |h| alone would change"


# Check 5


@pytest.mark.parametrize("target", [0.01, 0.1, 0.3])
def test_threshold_is_the_last_grid_point_within_the_target(target: float) -> None:
    h, w = activations()
    magnitudes = neuron_magnitudes(h, w)
    grid = torch.linspace(float(magnitudes.min()), float(torch.quantile(magnitudes, 0.99)), 4096, dtype=torch.float64)
    found = find_threshold(h, w, target, num=4096)
    index = int((grid - found).abs().argmin())
    assert cett(h, w, float(grid[index])) <= target < cett(h, w, float(grid[index + 1]))


def test_threshold_saturates_at_the_99_percent_quantile() -> None:
    h, w = activations()
    assert find_threshold(h, w, 1.0) == pytest.approx(float(torch.quantile(neuron_magnitudes(h, w), 0.99)), rel=1e-6)


def test_target_zero_still_drops_exact_zeros() -> None:
    h, w = activations()
    h = torch.relu(h)
    assert torch.equal(neuron_magnitudes(h, w) < find_threshold(h, w, 0.0), h == 0)


# Check 6


def test_perplexity_ratio_is_reached(silu: Model) -> None:
    report = ppl_sparsity(silu, IDS, DOWNS, p=1.0)
    assert report.ppl_ratio == pytest.approx(1.01, abs=1e-3)
    assert 0 < report.sparsity < 1
    assert report.activation_ratio.shape == (2, IDS.numel())


def test_larger_p_never_lowers_sparsity(silu: Model) -> None:
    found = [ppl_sparsity(silu, IDS, DOWNS, p=p, tol=1e-3).sparsity for p in (0.5, 1.0, 5.0, 20.0)]
    assert found == sorted(found)


# Check 8


def test_relu_sparsity_is_at_least_the_share_of_zeros(relu: Model) -> None:
    shares = []
    handles = [
        relu.get_submodule(name).register_forward_pre_hook(
            lambda _m, args: shares.append((args[0] == 0).float().mean())
        )
        for name in DOWNS
    ]
    relu(IDS)
    for handle in handles:
        handle.remove()
    zeros = float(torch.stack(shares).mean())
    assert zeros > 0.1
    assert ppl_sparsity(relu, IDS, DOWNS, p=1e-4).sparsity >= zeros - 1e-6


# What users expect


def test_model_is_untouched_afterwards(silu: Model) -> None:
    plain = silu(IDS)
    ppl_sparsity(silu, IDS, DOWNS, tol=1e-2)
    assert torch.equal(silu(IDS), plain)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in silu.modules())


def test_padding_is_left_out() -> None:
    h, w = activations()
    mask = torch.arange(40) < 25
    assert cett(h, w, 0.8, mask) == pytest.approx(cett(h[:25], w, 0.8))


def test_tokens_with_no_output_are_left_out() -> None:
    h, w = activations()
    silent = torch.cat([h, torch.zeros(7, h.shape[1])])
    assert cett(silent, w, 0.8) == pytest.approx(cett(h, w, 0.8))


def test_empty_mask_is_refused() -> None:
    h, w = activations()
    with pytest.raises(ValueError, match="mask is empty"):
        cett(h, w, 0.8, torch.zeros(40, dtype=torch.bool))


def test_p_must_be_positive(silu: Model) -> None:
    with pytest.raises(ValueError, match="p must be positive"):
        ppl_sparsity(silu, IDS, DOWNS, p=0.0)


def test_model_without_feed_forward_is_refused_with_what_was_found() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(400, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.embed(ids)

    with pytest.raises(ValueError, match="branches found: none"):
        ppl_sparsity(Bare(), IDS)


def test_weights_stored_transposed_are_read() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 5))

    assert down_weight(Conv1D(), 12).shape == (5, 12)
    assert down_weight(nn.Linear(12, 5), 12).shape == (5, 12)
    with pytest.raises(InputError, match="7 hidden units"):
        down_weight(nn.Linear(12, 5), 7)

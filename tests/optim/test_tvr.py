from __future__ import annotations

import pytest
import torch
from torch import nn

from setpoint import data
from setpoint.errors import InputError
from setpoint.models import Transformer, TransformerConfig
from setpoint.optim.tvr import TargetVarianceRescaler, matrix_spreads
from setpoint.train import train


def block(std: float, *, mean: float = 0.0, size: int = 16) -> nn.Linear:
    """A linear whose weight has exactly this spread and mean."""
    linear = nn.Linear(size, size)
    with torch.no_grad():
        noise = torch.randn(size, size, dtype=torch.float64)
        linear.weight.copy_((noise - noise.mean()) / noise.std() * std + mean)
        linear.bias.fill_(0.3)
    return linear


def test_a_spread_above_the_threshold_becomes_the_target_and_the_mean_stays() -> None:
    layer = block(0.02, mean=0.005)
    assert TargetVarianceRescaler([layer], target_std=0.01).rescale() == 1
    assert layer.weight.std().item() == pytest.approx(0.01, rel=1e-5)
    assert layer.weight.mean().item() == pytest.approx(0.005, abs=1e-6)
    assert not layer.bias.any()


@pytest.mark.parametrize(("std", "fires"), [(0.0119, 0), (0.0121, 1), (0.001, 0)])
def test_it_fires_only_above_the_threshold_and_never_scales_up(std: float, fires: int) -> None:
    layer = block(std)
    assert TargetVarianceRescaler([layer], target_std=0.01).rescale() == fires
    assert bool(layer.bias.any()) is not bool(fires)
    assert layer.weight.std().item() == pytest.approx(0.01 if fires else std, rel=1e-4)


def test_a_second_look_does_nothing() -> None:
    rescaler = TargetVarianceRescaler([block(0.5)], target_std=0.01)
    assert (rescaler.rescale(), rescaler.rescale(), rescaler.fired) == (1, 0, 1)


def test_with_depth_scaling_layer_four_has_half_the_target() -> None:
    layers = [block(0.05) for _ in range(4)]
    TargetVarianceRescaler(layers, target_std=0.02, scale_with_depth=True).rescale()
    assert layers[3].weight.std().item() == pytest.approx(0.01, rel=1e-4)
    assert layers[0].weight.std().item() == pytest.approx(0.02, rel=1e-4)


def test_it_looks_every_interval_steps() -> None:
    layer = block(0.5)
    rescaler = TargetVarianceRescaler([layer], interval=3)
    assert [rescaler.step() for _ in range(3)] == [0, 0, 1]


def test_embedding_head_and_norms_are_left_alone() -> None:
    model = Transformer(TransformerConfig(vocab_size=32, dim=16, depth=2, num_heads=2, tie_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    outside = {n: p.clone() for n, p in model.named_parameters() if "blocks" not in n or p.dim() < 2}
    assert TargetVarianceRescaler(model).rescale() == 2 * 7
    assert all(torch.equal(p, outside[n]) for n, p in model.named_parameters() if n in outside)


def test_blocks_are_the_longest_list_of_equal_modules() -> None:
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.layers = nn.ModuleList(block(0.5) for _ in range(3))
    assert TargetVarianceRescaler(model).rescale() == 3


class Experts(nn.Module):
    """A block with more experts than the model has blocks, a norm with two axes and a table of positions."""

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.mix = block(std)
        self.experts = nn.ModuleList(block(std) for _ in range(4))
        self.norm = nn.LayerNorm((2, 8))
        self.positions = nn.Embedding(16, 2)


def test_experts_of_a_layer_are_not_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Experts() for _ in range(2))
    model.heads = nn.ModuleList(block(0.5) for _ in range(5))
    kept = {n: p.clone() for n, p in model.named_parameters() if "mix" not in n and "experts" not in n}
    assert TargetVarianceRescaler(model, scale_with_depth=True).rescale() == 2 * 5
    assert model.layers[1].experts[3].weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=1e-4)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: nn.ModuleList([model])], ids=["sequential", "list"])
def test_a_wrapper_and_a_single_block_do_not_hide_or_split_blocks(wrap: type[nn.Sequential]) -> None:
    if wrap is nn.Sequential:
        model = nn.Module()
        model.layers = nn.ModuleList(Experts() for _ in range(2))
        assert TargetVarianceRescaler(wrap(model)).rescale() == 2 * 5
    else:
        assert TargetVarianceRescaler(wrap(Experts())).rescale() == 5


def test_an_encoder_and_a_decoder_as_deep_are_both_blocks() -> None:
    model = nn.Module()
    model.encoder = nn.ModuleList(Experts() for _ in range(3))
    model.decoder = nn.ModuleList(Experts() for _ in range(3))
    TargetVarianceRescaler(model, scale_with_depth=True).rescale()
    for stack in (model.encoder, model.decoder):
        stds = [layer.mix.weight.std().item() for layer in stack]
        assert stds == pytest.approx([0.02, 0.02 / 2**0.5, 0.02 / 3**0.5], rel=1e-4)


def test_targets_by_kind_of_matrix_are_a_share_of_what_a_trained_model_came_to() -> None:
    def model(first: float, second: float) -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList(nn.Sequential(block(first), nn.GELU(), block(second)) for _ in range(2))
        return made

    spreads = matrix_spreads(model(0.1, 0.4))
    assert spreads == pytest.approx({"0.weight": 0.1, "2.weight": 0.4}, rel=1e-4)
    other = model(0.5, 0.5)
    assert TargetVarianceRescaler(other, {name: 0.5 * std for name, std in spreads.items()}).rescale() == 4
    assert matrix_spreads(other) == pytest.approx({"0.weight": 0.05, "2.weight": 0.2}, rel=1e-4)


def test_kinds_without_a_target_are_left_alone_and_unknown_kinds_refused() -> None:
    model = nn.ModuleList(nn.Sequential(block(0.5), block(0.5)) for _ in range(2))
    assert TargetVarianceRescaler(model, {"1.weight": 0.1}).rescale() == 2
    assert matrix_spreads(model) == pytest.approx({"0.weight": 0.5, "1.weight": 0.1}, rel=1e-4)
    with pytest.raises(InputError, match=r"no matrix in a block is called '2\.weight'; there is"):
        TargetVarianceRescaler(model, {"2.weight": 0.1})


def test_as_a_callback_it_keeps_weights_at_the_target_while_training() -> None:
    torch.manual_seed(0)
    digits = data.images("digits")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            for layer in self.blocks:
                x = layer(x).relu()
            return self.head(x)

    model, rescaler = Net(), TargetVarianceRescaler(target_std=0.05, interval=5)
    batches = digits.batches("train", 32)
    train(model, batches, data.label_loss, steps=20, callbacks=[rescaler], accelerator="cpu", progress=False)
    assert rescaler.fired > 0
    assert all(layer.weight.std() <= 0.05 * 1.2 for layer in model.blocks)


def test_a_resumed_run_looks_at_the_steps_of_an_uninterrupted_one() -> None:
    from types import SimpleNamespace

    rescaler = TargetVarianceRescaler([block(0.5)], interval=50)
    rescaler.on_step(SimpleNamespace(step=51))  # type: ignore[arg-type]
    assert rescaler.fired == 0
    rescaler.on_step(SimpleNamespace(step=100))  # type: ignore[arg-type]
    assert rescaler.fired == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": 0},
        {"target_std": 0.0},
        {"target_std": {"weight": 0.0}},
        {"target_std": {}},
        {"ratio_threshold": 0.5},
        {"interval": 1.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        TargetVarianceRescaler([block(0.1)], **wrong)  # type: ignore[arg-type]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="no list of equal modules"):
        TargetVarianceRescaler(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no model yet"):
        TargetVarianceRescaler().rescale()

"""What a fold may touch of weights that read a norm: the rows that are read, once, and nothing that others read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.errors import InputError
from setpoint.models import Transformer, TransformerConfig
from setpoint.nn.block import ScaledPreNorm
from setpoint.surgery import Anatomy
from setpoint.surgery.editing import commit
from setpoint.surgery.fold import cannot_fold, fold_norm
from setpoint.types import Refusal

WIDTH = 8


def norm(shift: float = 0.5) -> nn.LayerNorm:
    """A norm with a gain and a shift of its own."""
    made = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 3, WIDTH))
        made.bias.copy_(torch.linspace(-1, 2, WIDTH) * shift)
    return made


ROWS = torch.linspace(-3, 3, 5 * WIDTH, dtype=torch.float64).sin().reshape(1, 5, WIDTH)


def fold(model: nn.Module, *names: str) -> None:
    """Fold norms and see that outputs stay."""
    model.double().eval()
    with torch.no_grad():
        before = model(ROWS)
        for name in names:
            anatomy = Anatomy.trace(model, ROWS)
            assert cannot_fold(anatomy, anatomy.norms[name]) is None
            commit(model, fold_norm(model, anatomy.norms[name]))
        torch.testing.assert_close(model(ROWS), before, rtol=1e-12, atol=1e-12)


def refusal(model: nn.Module, name: str, batch: Tensor = ROWS) -> Refusal:
    anatomy = Anatomy.trace(model.double().eval(), batch)
    found = cannot_fold(anatomy, anatomy.norms[name])
    assert found is not None
    return found


class Across(nn.Module):
    """Attention to a memory, with a packed in-projection; the memory is normalized or not."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.norm, self.memory = norm(), memory
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x.flip(1))
        return self.attention(self.norm(x), memory, memory)[0]  # type: ignore[no-any-return]


def test_of_a_packed_projection_the_rows_of_the_queries_alone_are_folded() -> None:
    model = Across(nn.Identity())
    before = model.attention.in_proj_weight.detach().double().clone()
    fold(model, "norm")
    after = model.attention.in_proj_weight
    assert torch.equal(after[WIDTH:], before[WIDTH:])
    torch.testing.assert_close(after[:WIDTH], before[:WIDTH] * torch.linspace(0.5, 3, WIDTH))
    assert not model.attention.in_proj_bias[WIDTH:].any()


def test_two_norms_that_read_different_rows_fold_each_alone() -> None:
    model = Across(norm(shift=-2.0))
    fold(model, "norm", "memory")
    assert torch.equal(model.norm.weight, torch.ones(WIDTH, dtype=torch.float64))
    assert torch.equal(model.memory.weight, torch.ones(WIDTH, dtype=torch.float64))


class Twice(nn.Module):
    """One linear that reads a norm and something else."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other, self.norm, self.second, self.linear = other, norm(), norm(2.0), nn.Linear(WIDTH, 3)
        self.narrow = nn.Linear(WIDTH // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.other == "halves":
            return self.narrow(y[..., :4]) + self.narrow(y[..., 4:])  # type: ignore[no-any-return]
        if self.other == "function":
            return functional.linear(y, self.linear.weight) + functional.linear(x, self.linear.weight)
        rest = {"input": x, "second norm": self.second(x), "same norm": y.flip(1)}[self.other]
        return self.linear(y) + self.linear(rest)  # type: ignore[no-any-return]


@pytest.mark.parametrize("other", ["input", "function"])
def test_a_weight_that_reads_what_is_no_norm_too_is_refused(other: str) -> None:
    found = refusal(Twice(other), "norm")
    assert found.path == "linear.weight"
    assert "what is no norm" in found.reason


def test_a_weight_behind_two_norms_is_refused_by_their_names() -> None:
    assert "behind norm and second" in refusal(Twice("second norm"), "norm").reason


def test_a_weight_that_reads_different_channels_with_the_same_rows_is_refused() -> None:
    assert "different channels of norm" in refusal(Twice("halves"), "norm").reason


def test_a_weight_that_reads_a_norm_twice_is_folded_once() -> None:
    fold(Twice("same norm"), "norm")


def test_a_gain_that_is_no_parameter_is_refused() -> None:
    model = Transformer(TransformerConfig(vocab_size=16, dim=16, depth=2, num_heads=2), block=ScaledPreNorm())
    found = refusal(model, "stack.blocks.1.attention.norm", torch.arange(6)[None])
    assert "its gain is no parameter" in found.reason


def test_a_gain_that_two_norms_share_is_refused() -> None:
    model = nn.Sequential(norm(), nn.Linear(WIDTH, WIDTH), norm(), nn.Linear(WIDTH, 2))
    model[2].weight = model[0].weight
    assert refusal(model, "0") == Refusal("0.weight", "is the gain of another norm too, which a fold would change")


MAPS = torch.linspace(-3, 3, 2 * WIDTH * 36, dtype=torch.float64).sin().reshape(2, WIDTH, 6, 6)


def maps(convolution: nn.Module, shift: float) -> nn.Sequential:
    made = nn.Sequential(nn.BatchNorm2d(WIDTH), convolution)
    with torch.no_grad():
        made[0].weight.copy_(torch.linspace(0.5, 3, WIDTH))
        made[0].bias.fill_(shift)
    return made.double().eval()


@pytest.mark.parametrize(
    ("convolution", "shift"),
    [
        (nn.Conv2d(WIDTH, 5, 3), 0.7),
        (nn.Conv2d(WIDTH, 5, 3, padding=1, padding_mode="reflect"), 0.7),
        (nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), 0.7),
        (nn.Conv2d(WIDTH, 5, 3, padding=1), 0.0),
        (nn.ConvTranspose2d(WIDTH, 5, 3, stride=2), 0.0),
    ],
    ids=["unpadded", "reflected", "depthwise", "padded without a shift", "transposed without a shift"],
)
def test_a_batch_norm_folds_into_the_convolution_behind_it(convolution: nn.Module, shift: float) -> None:
    model = maps(convolution, shift)
    before = model(MAPS)
    anatomy = Anatomy.trace(model, MAPS)
    assert cannot_fold(anatomy, anatomy.norms["0"]) is None
    commit(model, fold_norm(model, anatomy.norms["0"]))
    assert model[0].weight.tolist() == [1.0] * WIDTH
    torch.testing.assert_close(model(MAPS), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolution", [nn.Conv2d(WIDTH, 5, 3, padding=1), nn.ConvTranspose2d(WIDTH, 5, 3)])
def test_a_shift_does_not_pass_zeros_around_a_map(convolution: nn.Module) -> None:
    model = maps(convolution, 0.7)
    site = Anatomy.trace(model, MAPS).norms["0"]
    with pytest.raises(InputError, match="zeros around a feature map"):
        fold_norm(model, site)


class Bare(nn.Module):
    """A matrix that no bias goes with, in the model itself or in a linear whose bias is not added."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.norm = form, norm()
        self.matrix, self.linear = (
            nn.Parameter(torch.ones(WIDTH, 3)),
            nn.Linear(WIDTH, 3, bias=form == "bias left aside"),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "matrix":
            return self.norm(x) @ self.matrix  # type: ignore[no-any-return]
        return functional.linear(self.norm(x), self.linear.weight)


@pytest.mark.parametrize("form", ["matrix", "bias left aside", "no bias"])
def test_a_shift_without_a_bias_that_is_added_is_an_error(form: str) -> None:
    model = Bare(form)
    site = Anatomy.trace(model, ROWS.float()).norms["norm"]
    with pytest.raises(InputError, match="expected a bias in every product"):
        fold_norm(model, site)

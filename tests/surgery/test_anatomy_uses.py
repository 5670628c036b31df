"""What a use says about how a weight reads a norm, held to the fold that it promises."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint.surgery import Anatomy
from setpoint.types import NormSite, Use


class Reader(nn.Module):
    """A layer norm with gain and some weights that read it in a way of their own."""

    def __init__(self, read: Callable[[Reader, Tensor], Tensor], **weights: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.norm.weight = nn.Parameter(torch.linspace(0.5, 2.0, 16))
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 16 * 6).cos().reshape(16, 6))
        for name, module in weights.items():
            self.add_module(name, module)
        self._read = read

    def forward(self, x: Tensor) -> Tensor:
        return self._read(self, self.norm(x))


def tokens() -> Tensor:
    return torch.linspace(-3, 3, 2 * 5 * 16).sin().reshape(2, 5, 16)


def read_norm(model: nn.Module, x: Tensor | None = None, name: str = "norm") -> NormSite:
    return Anatomy.trace(model, tokens() if x is None else x).norms[name]


def fold_gain(model: nn.Module, name: str, uses: tuple[Use, ...]) -> nn.Module:
    """Move a norm's gain into the weights that read it, as the uses say."""
    folded = copy.deepcopy(model).double()
    gain = folded.get_parameter(f"{name}.weight")
    with torch.no_grad():
        for use in uses:
            weight, axis = folded.get_parameter(use.parameter), use.input_axis
            assert axis is not None
            factor = gain if use.slice is None else gain[list(use.slice)]
            weight.mul_(factor.reshape([-1 if a == axis else 1 for a in range(weight.dim())]))
        gain.fill_(1.0)
    return folded


def halves(m: Reader, h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    return m.first(a) * m.second(b)  # type: ignore[operator]


def even_channels(m: Reader, h: Tensor) -> Tensor:
    return m.first(h[..., ::2])  # type: ignore[operator]


def second_half(m: Reader, h: Tensor) -> Tensor:
    return m.first(h.narrow(-1, 8, 8).transpose(0, 1))  # type: ignore[operator]


def swapped(m: Reader, h: Tensor) -> Tensor:
    return h.roll(8, -1) @ m.matrix


def first_token(m: Reader, h: Tensor) -> Tensor:
    return functional.linear(h[:, 0], m.matrix.t())


def by_letters(m: Reader, h: Tensor) -> Tensor:
    return torch.einsum("co,btc->bto", m.matrix, h)


EIGHT = {"first": nn.Linear(8, 4), "second": nn.Linear(8, 4)}
READERS = [
    pytest.param(halves, EIGHT, [("first.weight", 1, range(8)), ("second.weight", 1, range(8, 16))], id="chunked"),
    pytest.param(even_channels, EIGHT, [("first.weight", 1, tuple(range(0, 16, 2)))], id="every second"),
    pytest.param(second_half, EIGHT, [("first.weight", 1, range(8, 16))], id="narrowed"),
    pytest.param(swapped, {}, [("matrix", 0, (*range(8, 16), *range(8)))], id="rolled"),
    pytest.param(first_token, {}, [("matrix", 0, None)], id="one token"),
    pytest.param(by_letters, {}, [("matrix", 0, None)], id="einsum"),
]


@pytest.mark.parametrize(("read", "weights", "expected"), READERS)
def test_a_use_names_the_channels_that_the_input_axis_meets(
    read: Callable[[Reader, Tensor], Tensor], weights: dict[str, nn.Module], expected: list[tuple[str, int, object]]
) -> None:
    model = Reader(read, **weights).eval()
    norm = read_norm(model)
    readers = tuple(use for use in norm.uses if use.is_weight)
    assert [(use.parameter, use.input_axis, use.slice) for use in readers] == expected
    assert {(use.output_axis, use.bias.replace("bias", "weight")) for use in readers} == {
        (1 - axis, name if name != "matrix" else "") for name, axis, _ in expected
    }
    assert all(use.foldable for use in readers)
    x = tokens().double()
    folded = fold_gain(model, "norm", readers)
    torch.testing.assert_close(folded(x), copy.deepcopy(model).double()(x), rtol=1e-12, atol=1e-12)


def test_tokens_flattened_into_channels_forbid_a_fold() -> None:
    norm = read_norm(Reader(lambda m, h: m.wide(h.flatten(1)), wide=nn.Linear(80, 3)))  # type: ignore[operator]
    use = next(use for use in norm.uses if use.is_weight)
    assert use.slice == tuple(range(16)) * 5
    assert use.via == ("view", "merge")
    assert not norm.foldable


def test_channels_joined_with_others_forbid_a_fold() -> None:
    joined = Reader(lambda m, h: m.wide(torch.cat([torch.ones(2, 5, 2), h], -1)), wide=nn.Linear(18, 3))  # type: ignore[operator]
    use = next(use for use in read_norm(joined).uses if use.is_weight)
    assert use.slice == (-1, -1, *range(16))
    assert not use.foldable


def test_tokens_joined_with_others_forbid_a_fold() -> None:
    joined = Reader(lambda m, h: m.wide(torch.cat([torch.ones(2, 1, 16), h], 1)), wide=nn.Linear(16, 3))  # type: ignore[operator]
    use = next(use for use in read_norm(joined).uses if use.is_weight)
    assert (use.module, use.input_axis, use.foldable) == ("wide", None, False)


def test_heads_split_before_a_batched_product_meet_no_single_axis() -> None:
    model = Reader(lambda m, h: torch.einsum("bthd,hde->bte", h.unflatten(-1, (4, 4)), m.heads.weight.view(4, 4, 6)))  # type: ignore[operator, union-attr]
    model.heads = nn.Linear(6, 16)
    use = next(use for use in read_norm(model).uses if use.is_weight)
    assert (use.parameter, use.input_axis) == ("heads.weight", None)


class Images(nn.Module):
    """A batch norm that a convolution reads."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.norm, self.reader = nn.BatchNorm2d(8), reader
        self.norm.weight = nn.Parameter(torch.linspace(0.5, 2.0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.norm(x))  # type: ignore[no-any-return]


def picture() -> Tensor:
    return torch.linspace(-3, 3, 8 * 6 * 6).sin().reshape(1, 8, 6, 6)


CONVOLUTIONS = [
    pytest.param(nn.Conv2d(8, 4, 3), 1, id="plain"),
    pytest.param(nn.Conv2d(8, 8, 3, padding=1, groups=8), 0, id="depthwise"),
    pytest.param(nn.ConvTranspose2d(8, 4, 2), 0, id="transposed"),
    pytest.param(nn.ConvTranspose2d(8, 8, 2, groups=8), 0, id="depthwise transposed"),
    pytest.param(nn.Conv2d(8, 8, 3, groups=2), None, id="grouped"),
    pytest.param(nn.Conv2d(8, 16, 3, groups=8), None, id="depthwise with a multiplier"),
]


@pytest.mark.parametrize(("convolution", "axis"), CONVOLUTIONS)
def test_the_axis_of_a_convolution_that_meets_the_channels(convolution: nn.Module, axis: int | None) -> None:
    model = Images(convolution).eval()
    norm = read_norm(model, picture())
    assert [use.input_axis for use in norm.uses if use.is_weight] == [axis]
    assert norm.uses[0].foldable == (axis is not None)
    if axis is not None:
        folded, x = fold_gain(model, "norm", norm.uses[:1]), picture().double()
        torch.testing.assert_close(folded(x), copy.deepcopy(model).double()(x), rtol=1e-12, atol=1e-12)


def test_pixels_flattened_into_channels_forbid_a_fold() -> None:
    norm = read_norm(Images(nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 3))).eval(), picture())
    use = next(use for use in norm.uses if use.is_weight)
    assert use.slice == tuple(channel for channel in range(8) for _ in range(36))
    assert not norm.foldable

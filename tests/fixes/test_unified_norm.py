from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.unified_norm import UnifiedFolding, UnifiedNorms
from setpoint.nn import UnifiedNorm

Make = Callable[..., tuple[nn.Module, Tensor]]


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def trained(model: nn.Module, batch: Tensor, steps: int = 5) -> nn.Module:
    """With statistics, gains and shifts at values of their own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(batch).square().mean().backward()
        optimizer.step()
    for module in model.modules():
        if isinstance(module, UnifiedNorm):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model.eval()


@pytest.mark.parametrize("family", ["vit", "encoder", "bert"])
def test_every_norm_is_replaced(make: Make, family: str) -> None:
    model, batch = make(family)
    norms = names_of(model, nn.LayerNorm)
    fixed = fix(model, "unified-norm:warmup_iters=10", [batch], timed=False).model
    assert names_of(fixed, UnifiedNorm) == norms
    assert all(m.warmup_iters == 10 for m in fixed.modules() if isinstance(m, UnifiedNorm))


def test_outliers_are_filtered_in_images_and_not_in_text(make: Make) -> None:
    for family, expected in (("vit", True), ("bert", False)):
        model, batch = make(family)
        fixed = fix(model, UnifiedNorms(), [batch], timed=False).model
        assert {m.outlier_filtration for m in fixed.modules() if isinstance(m, UnifiedNorm)} == {expected}
    model, batch = make("vit")
    fixed = fix(model, UnifiedNorms(outlier_filtration=False), [batch], timed=False).model
    assert not any(m.outlier_filtration for m in fixed.modules() if isinstance(m, UnifiedNorm))


def test_trained_model_folds_away_every_norm(make: Make) -> None:
    model, batch = make("encoder")
    model = trained(fix(model, "unified-norm", [batch], timed=False).model, batch)
    assert len(names_of(model, UnifiedNorm)) == 5
    fixed = fix(model, "unified-norm-fold", [batch], timed=False)
    assert not names_of(fixed.model, UnifiedNorm)
    assert fixed.change.exact is not None
    torch.testing.assert_close(fixed.model(batch), model(batch), atol=1e-5, rtol=1e-5)


def test_norm_in_front_of_a_tied_head_stays(make: Make) -> None:
    model, batch = make("decoder", norm=UnifiedNorm)
    model.head.weight = model.embedding.weight
    fixed = fix(model, UnifiedFolding(), [batch], timed=False).model
    assert names_of(fixed, UnifiedNorm) == ["stack.final_norm"]
    torch.testing.assert_close(fixed(batch), model(batch), atol=1e-5, rtol=1e-5)


def test_two_norms_that_one_weight_reads_fold_one_after_the_other() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = UnifiedNorm(8), UnifiedNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            memory = self.keys(x.flip(1) + 1.0)
            return self.attention(self.queries(x), memory, memory, need_weights=False)[0]

    batch = torch.randn(3, 5, 8)
    model = trained(Cross(), batch)
    fixed = fix(model, UnifiedFolding(), [batch], timed=False).model
    assert not names_of(fixed, UnifiedNorm)
    torch.testing.assert_close(fixed(batch), model(batch), atol=1e-5, rtol=1e-5)


def test_norm_that_is_added_to_something_is_refused_with_the_place() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = UnifiedNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return h + self.linear(h)

    with pytest.raises(InputError, match="norm: its output is read by add"):
        fix(Skip().eval(), UnifiedFolding(), [torch.randn(3, 4)])


def test_model_without_such_norms_has_nothing_to_fold(make: Make) -> None:
    model, batch = make("encoder")
    with pytest.raises(InputError, match="no UnifiedNorm; there is nothing to fold"):
        fix(model, UnifiedFolding(), [batch], timed=False)


def test_decoders_are_refused(make: Make) -> None:
    model, batch = make("gpt2")
    with pytest.raises(InputError, match="a decoder, where statistics over tokens would show it those yet to come"):
        fix(model, UnifiedNorms(), [batch], timed=False)


def test_window_below_one_is_refused() -> None:
    for make in (partial(UnifiedNorms, window_size=0), partial(UnifiedNorms, warmup_iters=-1)):
        with pytest.raises(InputError, match="window_size above 0 and warmup_iters of at least 0"):
            make()


def test_batch_norms_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(InputError, match="batch norms"):
        fix(model, UnifiedNorms(), [torch.randn(2, 3, 8, 8)])

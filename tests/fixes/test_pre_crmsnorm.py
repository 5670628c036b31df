from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixing import Refused
from setpoint.models import ClassToken, VisionConfig, VisionTransformer
from setpoint.nn import CRMSNorm
from setpoint.running import evaluated
from setpoint.testing.tiny import shaken

Make = Callable[..., tuple[nn.Module, Tensor]]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluated(model):
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


def test_a_vit_with_a_class_token_computes_the_same_in_every_form() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model.to(dtype)
        batch = torch.randn(2, 3, 16, 16, dtype=dtype)
        plain = logits(model, batch)
        for spec in ("pre-rmsnorm", "pre-crmsnorm"):
            moved = logits(fix(model, spec, [batch], timed=False).model, batch) - plain
            assert moved.abs().max() < bound * plain.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit"])
def test_the_stream_is_one_feature_narrower(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model, "pre-crmsnorm" if family == "vit" else "pre-crmsnorm:untie=true", [batch], timed=False).model
    assert [m.dim for m in fixed.modules() if isinstance(m, CRMSNorm)] == [15] * 5
    assert not any(isinstance(m, nn.LayerNorm) for m in fixed.modules())


def test_parameters_fall_by_the_rows_of_writers_the_columns_of_readers_and_the_gains(make: Make) -> None:
    model, batch = make("vit")
    change = fix(model, "pre-crmsnorm", [batch], timed=False).change
    d, hidden, patch, places, classes = 16, 32, 3 * 16, 17, 5
    start = (patch + 1) + 1 + places  # patch convolution with bias, class token, positions
    branch_writers = 2 * ((d + 1) + (hidden + 1))
    readers = 2 * (3 * d + hidden) + classes
    gains = 5 * 2 * d
    assert change.parameters[0] - change.parameters[1] == start + branch_writers + readers + gains


def test_sizes_that_modules_keep_follow_their_weights(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "pre-crmsnorm:untie=true", [batch], timed=False).model.transformer
    assert fixed.wte.embedding_dim == 15
    assert (fixed.h[0].attn.c_proj.nf, fixed.h[0].mlp.c_fc.nx) == (15, 15)
    assert model.transformer.wte.embedding_dim == 16
    assert model.transformer.h[0].attn.c_proj.nf == 16


def test_a_tied_head_is_refused_with_the_way_out(make: Make) -> None:
    model, batch = make("gpt2")
    with pytest.raises(InputError, match=r"transformer\.wte.*untie=true"):
        fix(model, "pre-crmsnorm", [batch])
    fixed = fix(model, "pre-crmsnorm:untie=true", [batch], timed=False).model
    assert fixed.lm_head.weight is not fixed.transformer.wte.weight
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_norm_whose_output_is_returned_is_refused_by_name() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    with pytest.raises(InputError, match="layernorm: its output is read by output"):
        fix(model, "pre-crmsnorm", [torch.randn(1, 3, 16, 16)])


def test_torch_attention_is_refused_by_name(make: Make) -> None:
    model, batch = make("encoder")
    with pytest.raises(InputError, match=r"layers\.0\.self_attn: is torch's MultiheadAttention"):
        fix(model, "pre-crmsnorm", [batch])


def test_the_own_vision_backbone_converts_in_both_forms() -> None:
    config = VisionConfig(dim=16, depth=2, num_heads=2, image_size=8, patch_size=4, channels=1, num_classes=3)
    model = VisionTransformer(config, norm=nn.LayerNorm, pooling=ClassToken()).eval()
    batch = torch.randn(2, 1, 8, 8)
    for spec in ("pre-rmsnorm", "pre-crmsnorm"):
        assert fix(model, spec, [batch], timed=False).change.exact is not None


def test_converting_twice_is_converting_once(make: Make) -> None:
    model, batch = make("vit")
    once = fix(model, "pre-crmsnorm", [batch], timed=False).model
    assert fix(once, "pre-crmsnorm", [batch], timed=False).edits == ()


class Product(nn.Module):
    """A weight with no place for a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class AcrossTokens(nn.Conv1d):
    """Reads neighbouring tokens, and zeros behind the ends."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class SameWidth(nn.Linear):
    """A model's own code may insist on the width that it was written for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 5, 8))


class Block(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), up, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        (Product, r"1\.norm: can't be folded .* give the module a parameter 'bias'"),
        (AcrossTokens, r"1\.norm: can't be folded .* zeros around a feature map"),
        (SameWidth, "does not run afterwards, so the change was undone"),
    ],
)
def test_a_model_that_can_not_be_narrowed_is_refused(reader: type[nn.Module], why: str) -> None:
    model = shaken(nn.Sequential(nn.Linear(4, 8), Block(reader(8, 16)), nn.LayerNorm(8), nn.Linear(8, 3)))
    parts = list(model.modules()), list(model.parameters())
    with pytest.raises(Refused, match=why):
        fix(model, "pre-crmsnorm", [torch.randn(2, 5, 4)], inplace=True)
    assert all(a is b for a, b in zip(parts[0], model.modules(), strict=True))
    assert all(a is b for a, b in zip(parts[1], model.parameters(), strict=True))


class FixedWidth(nn.Module):
    """An attention whose heads have a quarter of the width that comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 4, x.shape[2] // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class FixedWidthBlock(nn.Module):
    """Pre-LN, with attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), FixedWidth()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def test_a_module_whose_code_rests_on_the_width_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 32), FixedWidthBlock(), nn.LayerNorm(32), nn.Linear(32, 3))
    with pytest.raises(Refused, match=r"does not run afterwards.*its code may rest on a size that changed") as caught:
        fix(model, "pre-crmsnorm", [torch.randn(2, 16, 4)], timed=False)
    assert caught.value.refusal.path == "1.attention"

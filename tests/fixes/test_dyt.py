from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.dyt import DynamicTanh, starts
from setpoint.nn import DyT
from setpoint.surgery.inserts import ScaledEmbedding

Make = Callable[..., tuple[nn.Module, Tensor]]


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit", "encoder", "bert"])
def test_no_norm_is_left(make: Make, family: str) -> None:
    model, batch = make(family)
    norms = names_of(model, nn.LayerNorm)
    fixed = fix(model, "dyt", [batch], timed=False)
    assert names_of(fixed.model, DyT) == norms
    assert not names_of(fixed.model, nn.LayerNorm)


def test_a_dyt_for_an_rms_norm_has_no_bias_and_one_for_a_layer_norm_has(make: Make) -> None:
    llama, batch = make("llama")
    assert all(m.bias is None for m in fix(llama, "dyt", [batch], timed=False).model.modules() if isinstance(m, DyT))
    gpt2, batch = make("gpt2")
    assert fix(gpt2, "dyt", [batch], timed=False).model.transformer.ln_f.bias is not None


def test_what_the_norms_had_learned_is_not_kept(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "dyt", [batch], timed=False).model
    assert fixed.transformer.ln_f.weight.tolist() == [1.0] * 16


def test_a_language_model_gets_a_learnable_scale_of_root_width_on_its_token_table(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "dyt", [batch], timed=False).model
    assert isinstance(fixed.transformer.wte, ScaledEmbedding)
    assert fixed.transformer.wte.scale.item() == pytest.approx(math.sqrt(16))
    assert not isinstance(fixed.transformer.wpe, ScaledEmbedding)
    assert fixed.lm_head.weight is fixed.transformer.wte.weight
    plain = fix(model, "dyt:embedding_scale=false", [batch], timed=False).model
    assert not isinstance(plain.transformer.wte, ScaledEmbedding)


def test_alpha_is_higher_in_front_of_attention_and_lower_for_wide_models() -> None:
    assert starts(4096) == (0.8, 0.2)
    assert starts(8192) == (0.2, 0.05)
    assert starts(64) == (1.0, 1.0)
    assert all(attention >= elsewhere for attention, elsewhere in map(starts, (64, 1024, 2048, 5120, 30000)))


def test_alpha_can_be_given_by_place(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "dyt:attention_alpha=0.9:other_alpha=0.3", [batch], timed=False).model.transformer
    alphas = [fixed.h[0].ln_1.alpha, fixed.h[0].ln_2.alpha, fixed.ln_f.alpha]
    assert [round(a.item(), 4) for a in alphas] == [0.9, 0.3, 0.3]


def test_other_models_start_at_a_half(make: Make) -> None:
    model, batch = make("vit")
    assert fix(model, "dyt", [batch], timed=False).model.vit.layernorm.alpha.item() == 0.5


def test_norms_on_queries_and_keys_are_replaced_too() -> None:
    from setpoint.models import Attention, Transformer, TransformerConfig
    from setpoint.nn import RMSNorm

    class Normed(Attention):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs, qk_norm=RMSNorm)

    model = Transformer(TransformerConfig(vocab_size=32, dim=16, depth=1, num_heads=2), attention=Normed).eval()
    fixed = fix(model, "dyt", [torch.randint(0, 32, (2, 7))], timed=False).model
    assert isinstance(fixed.stack.blocks[0].attention.sublayer.q_norm, DyT)
    assert not names_of(fixed, RMSNorm)


def test_batch_norms_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(InputError, match="batch norms"):
        fix(model, "dyt", [torch.randn(2, 3, 8, 8)])


class Mixer(nn.Module):
    """Attention over the positions of a feature map, behind a norm over channels and positions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = norm, nn.Conv2d(6, 18, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(2).mT for part in self.qkv(self.norm(x)).chunk(3, 1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.mT.reshape(x.shape))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("side", [6, 5])
def test_a_group_norm_becomes_a_dyt_over_channels_whatever_the_map_measures(side: int, affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Mixer(nn.GroupNorm(1, 6, affine=affine)), nn.Conv2d(6, 2, 1))
    fixed = fix(model, "dyt", [torch.randn(2, 3, side, side)], timed=False).model
    dyt = fixed[1].norm
    with torch.no_grad():
        dyt.weight.copy_(torch.arange(6.0))
    rows = dyt(torch.ones(1, 6, side, side))
    assert rows.amax((0, 2, 3)).tolist() == rows.amin((0, 2, 3)).tolist()
    assert rows[0, :, 0, 0].tolist() == pytest.approx([i * math.tanh(0.5) for i in range(6)])


def test_the_original_is_not_trained_along_with_the_copy(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "dyt", [batch], timed=False).model
    held = {id(p) for p in model.parameters()}
    assert not any(id(p) in held for p in fixed.parameters())


def test_alpha_must_be_positive() -> None:
    with pytest.raises(InputError, match="alpha above 0"):
        DynamicTanh(alpha=0.0)


def test_a_checkpoint_is_not_left_untrained_by_accident(make: Make, tmp_path: object) -> None:
    from pathlib import Path

    model, batch = make("gpt2")
    folder = Path(str(tmp_path)) / "gpt2"
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="untrained"):
        fix(folder, "dyt", [batch])
    assert "train it before use" in fix(folder, "dyt", [batch], untrained_ok=True, timed=False).notes[0]


def test_retraining_happens_after_the_edits_and_is_measured(make: Make) -> None:
    model, batch = make("gpt2")
    seen: list[list[str]] = []

    def train(changed: nn.Module) -> None:
        seen.append(names_of(changed, DyT))
        with torch.no_grad():
            changed.lm_head.weight.zero_()

    fixed = fix(model, "dyt", [batch], retrain=train, timed=False)
    assert len(seen[0]) == 5
    assert fixed.change.perplexity is not None
    assert fixed.change.perplexity[1] == pytest.approx(64, rel=1e-4)
    assert not fixed.notes

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.models import Transformer, TransformerConfig
from setpoint.nn import PeriNorm
from setpoint.surgery import Anatomy

Make = Callable[..., tuple[nn.Module, Tensor]]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "vit", "encoder"])
def test_every_branch_has_norms_on_both_sides_afterwards(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model, "peri-ln", [batch], timed=False).model
    anatomy = Anatomy.trace(fixed, batch)
    assert [block.placement for block in anatomy.blocks] == ["peri", "peri"]
    names = {name for block in anatomy.blocks for b in block.branches for name in (*b.input_norms, *b.output_norms)}
    assert len(names) == 8


@pytest.mark.parametrize(("embed", "count"), [("true", 2 + 4 * 2), ("false", 1 + 4 * 2)])
def test_the_norms_count_as_published(make: Make, embed: str, count: int) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, f"peri-ln:embed_norm={embed}", [batch], timed=False).model
    assert sum(isinstance(module, nn.LayerNorm) for module in fixed.modules()) == count


def test_it_makes_the_model_that_the_placement_makes() -> None:
    config = TransformerConfig(vocab_size=32, dim=16, depth=2, num_heads=2)
    plain, peri = Transformer(config).eval(), Transformer(config, block=PeriNorm()).eval()
    batch = torch.randint(0, 32, (2, 7))
    peri.load_state_dict(plain.state_dict(), strict=False)
    fixed = fix(plain, "peri-ln", [batch], timed=False).model
    with torch.no_grad():
        torch.testing.assert_close(fixed(batch), peri(batch))


def test_what_a_branch_adds_is_of_unit_size_whatever_its_weights(make: Make) -> None:
    model, batch = make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.mul_(1000)
    fixed = fix(model, "peri-ln", [batch], timed=False).model
    added: list[Tensor] = []
    fixed.transformer.h[0].mlp.register_forward_hook(lambda _, __, output: added.append(output))
    with torch.no_grad():
        fixed(batch)
    torch.testing.assert_close(added[0].square().mean(-1), torch.ones(2, 9), rtol=1e-3, atol=1e-3)


def test_the_output_gain_starts_where_asked(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "peri-ln:out_gain=0.5", [batch], timed=False).model
    assert fixed.transformer.h[1].mlp.norm.weight.tolist() == [0.5] * 16
    assert fixed.transformer.h[1].ln_1.weight is not None


def test_the_weights_are_kept(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "peri-ln", [batch], timed=False).model
    assert torch.equal(fixed.transformer.h[0].attn.c_proj.weight, model.transformer.h[0].attn.c_proj.weight)


def test_adding_twice_is_adding_once(make: Make) -> None:
    model, batch = make("gpt2")
    once = fix(model, "peri-ln", [batch], timed=False).model
    assert fix(once, "peri-ln", [batch], timed=False).edits == ()


def test_a_post_norm_model_is_refused(make: Make) -> None:
    model, batch = make("bert")
    with pytest.raises(InputError, match="its branch is post-norm"):
        fix(model, "peri-ln", [batch])

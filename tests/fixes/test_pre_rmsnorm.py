from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixing import Refused
from setpoint.models import Learned, Transformer, TransformerConfig
from setpoint.nn import LayerNorm, RMSNorm
from setpoint.running import evaluated, tensors_of
from setpoint.surgery import Anatomy
from setpoint.surgery.editing import commit
from setpoint.surgery.inserts import CentredEmbedding, CentredInput, CentredLinear
from setpoint.testing.tiny import shaken
from setpoint.types import Build, Edit

Make = Callable[..., tuple[nn.Module, Tensor]]


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with evaluated(model):
        output = model(batch)
    return output if isinstance(output, Tensor) else output.logits


def norms_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit", "encoder"])
def test_every_layer_norm_of_a_pre_norm_model_becomes_an_rms_norm_with_the_same_outputs(
    make: Make, family: str
) -> None:
    model, batch = make(family)
    norms = norms_of(model, nn.LayerNorm)
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    assert norms_of(fixed.model, RMSNorm) == norms
    assert not norms_of(fixed.model, nn.LayerNorm)
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-12
    torch.testing.assert_close(logits(fixed.model, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit", "encoder"])
def test_the_stream_has_no_mean_anywhere_afterwards(make: Make, family: str) -> None:
    model, batch = make(family)
    fixed = fix(model.double(), "pre-rmsnorm", [batch if family in ("gpt2", "opt") else batch.double()], timed=False)
    seen: list[float] = []
    for block in Anatomy.trace(fixed.model, batch if family in ("gpt2", "opt") else batch.double()).blocks:
        fixed.model.get_submodule(block.name).register_forward_hook(
            lambda _, __, output: seen.append(float(tensors_of(output)[0].mean(-1).abs().max()))
        )
    with torch.no_grad():
        fixed.model(batch if family in ("gpt2", "opt") else batch.double())
    assert len(seen) == 2
    assert max(seen) < 1e-12


def test_without_centring_the_writers_the_outputs_change(make: Make) -> None:
    model, batch = make("encoder")
    before = logits(model, batch)
    norms = norms_of(model, nn.LayerNorm)
    commit(model, [Edit(n, Build("setpoint.nn:RMSNorm", {"normalized_shape": 8, "bias": True})) for n in norms])
    assert not torch.allclose(logits(model, batch), before, rtol=1e-2)


def test_a_tied_head_stays_tied_and_keeps_its_table(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    assert isinstance(fixed.model.transformer.wte, CentredEmbedding)
    assert fixed.model.lm_head.weight is fixed.model.transformer.wte.weight
    assert fixed.model.lm_head.weight is model.lm_head.weight
    assert fixed.change.parameters == (sum(p.numel() for p in model.parameters()),) * 2


def test_an_untied_table_is_centred_itself(make: Make) -> None:
    model, batch = make("gpt2", tie_word_embeddings=False)
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    assert not isinstance(fixed.model.transformer.wte, CentredEmbedding)
    assert fixed.model.transformer.wte.weight.mean(-1).abs().max() < 1e-6


def test_a_stream_that_no_weight_starts_is_centred_where_it_enters(make: Make) -> None:
    model, batch = make("encoder", start=False)
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    assert isinstance(fixed.model[1].layers[0], CentredInput)
    assert fixed.change.exact is not None


def test_layer_scale_is_multiplied_in_before_centring() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
            self.gamma = nn.Parameter(torch.linspace(0.1, 2.0, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.down(torch.relu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Linear(4, 6), Scaled(), Scaled(), nn.LayerNorm(6), nn.Linear(6, 2)).eval()
    fixed = fix(model, "pre-rmsnorm", [torch.randn(3, 5, 4)], timed=False)
    assert fixed.model[1].gamma.tolist() == [1.0] * 6
    assert fixed.change.exact is not None


def test_converting_twice_is_converting_once(make: Make) -> None:
    model, batch = make("gpt2")
    once = fix(model, "pre-rmsnorm", [batch], timed=False)
    twice = fix(once.model, "pre-rmsnorm", [batch], timed=False)
    assert twice.edits == ()
    assert "nothing to convert" in twice.notes[0]
    assert all(a is b for a, b in zip(once.model.parameters(), twice.model.parameters(), strict=True))


def test_a_post_norm_model_is_refused_by_the_place_of_its_norm(make: Make) -> None:
    model, batch = make("bert")
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.\S*LayerNorm: a norm behind the addition"):
        fix(model, "pre-rmsnorm", [batch])


def test_a_stream_that_is_returned_is_refused(make: Make) -> None:
    model, batch = make("encoder", final=False)
    with pytest.raises(InputError, match=r"1\.layers\.1: no norm stands behind the last block"):
        fix(model[:2], "pre-rmsnorm", [batch])


def test_a_model_without_residual_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(InputError, match="no residual blocks"):
        fix(model, "pre-rmsnorm", [torch.randn(2, 3, 4)])


def test_a_branch_that_reads_the_stream_bare_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.down = norm, nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.norm(x)))

    model = nn.Sequential(nn.Linear(4, 6), Bare(nn.LayerNorm(6)), Bare(nn.Identity()), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(InputError, match=r"2\.down: its branch reads the stream with no norm"):
        fix(model, "pre-rmsnorm", [torch.randn(2, 3, 4)])


def test_a_refused_model_is_as_it_was(make: Make) -> None:
    model, batch = make("bert")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(InputError):
        fix(model, "pre-rmsnorm", [batch], inplace=True)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: k for name, (k, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_bfloat16_is_held_to_its_own_rounding(make: Make) -> None:
    model, batch = make("gpt2")
    fixed = fix(model.bfloat16(), "pre-rmsnorm", [batch], timed=False)
    assert fixed.change.exact is not None
    assert fixed.model.transformer.h[0].ln_1.weight.dtype == torch.bfloat16


def test_the_fused_encoder_path_does_not_go_on_using_the_old_norms(make: Make) -> None:
    model, batch = make("encoder")
    fixed = fix(model, "pre-rmsnorm", [batch], timed=False)
    with torch.no_grad():
        for module in fixed.model.modules():
            if isinstance(module, RMSNorm):
                module.weight.zero_()
                module.bias.zero_()
        assert torch.allclose(fixed.model(batch), fixed.model[2].bias.expand(2, 5, 3))


@pytest.mark.parametrize("tied", [True, False])
def test_the_own_backbone_converts_tied_and_untied(tied: bool) -> None:
    config = TransformerConfig(vocab_size=32, dim=16, depth=2, num_heads=2, bias=True, tie_embeddings=tied)
    model = shaken(Transformer(config, norm=LayerNorm, position=Learned()))
    fixed = fix(model, "pre-rmsnorm", [torch.randint(0, 32, (2, 7))], timed=False)
    assert not norms_of(fixed.model, nn.LayerNorm)
    assert fixed.change.exact is not None


def gpt(embedding: type[nn.Embedding], linear: type[nn.Linear], norm: str) -> nn.Module:
    torch.manual_seed(0)
    make_norm = nn.LayerNorm if norm == "layer" else lambda d: RMSNorm(d, bias=True)

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down, self.drop = make_norm(8), nn.Linear(8, 16), linear(16, 8), nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))

    return nn.Sequential(embedding(11, 8), Branch(), Branch(), make_norm(8), nn.Linear(8, 11)).double()


def train(model: nn.Module, *, dropout: float = 0.0) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(20):
        batch = torch.randint(0, 11, (4, 7), generator=generator)
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_with_centred_writers_takes_the_steps_of_the_layer_norm_model() -> None:
    plain = gpt(nn.Embedding, nn.Linear, "layer")
    centred = gpt(CentredEmbedding, CentredLinear, "rms")
    centred.load_state_dict(plain.state_dict())
    assert max(abs(a - b) for a, b in zip(train(plain), train(centred), strict=True)) < 1e-12


def test_dropout_on_a_branch_breaks_the_equivalence_in_training() -> None:
    plain = gpt(nn.Embedding, nn.Linear, "layer")
    centred = gpt(CentredEmbedding, CentredLinear, "rms")
    centred.load_state_dict(plain.state_dict())
    losses = zip(train(plain, dropout=0.3), train(centred, dropout=0.3), strict=True)
    assert max(abs(a - b) for a, b in losses) > 1e-4


def test_norms_whose_output_is_scaled_are_folded_first(make: Make) -> None:
    model, batch = make("gpt2")
    scaled = fix(model, "lns", [batch], timed=False).model
    with pytest.raises(Refused, match=r"h\.1\.ln_1: does more than normalize.*lns-fold"):
        fix(scaled, "pre-rmsnorm", [batch])
    assert fix(scaled, "lns-fold,pre-rmsnorm", [batch], timed=False).change.exact is not None

"""The control of the conversion, and what the timed runs compare."""

from __future__ import annotations

import torch
from torch import nn

from setpoint.nn import LayerNorm, RMSNorm
from setpoint.studies import Budget, Context
from setpoint.studies import _language as language
from setpoint.studies.pre_rmsnorm import GPT, TIMES, compiled_speed, continued, in_turn, norms_only, trained

SMALL = Budget(2, 0.1, {**language.SMOKE, "steps": 1})


def fresh(seed: int = 0) -> nn.Module:
    return language.model_for(SMALL, Context(), seed, GPT, bias=True, tie_embeddings=False, embedding_std=0.2).eval()


def test_control_has_no_layer_norm_left_and_is_another_function() -> None:
    model, tokens = fresh(), torch.arange(8)[None]
    changed = norms_only(model)
    kinds = {type(m) for m in changed.modules() if isinstance(m, LayerNorm | RMSNorm)}
    assert kinds == {RMSNorm}
    assert not torch.allclose(changed(tokens), model(tokens), atol=1e-3)
    assert any(isinstance(module, LayerNorm) for module in model.modules())


def test_arms_of_a_seed_train_to_the_same_weights() -> None:
    first, second = (trained(3, SMALL, Context()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_continuation_keeps_the_prompt_and_takes_the_likeliest_token() -> None:
    model, prompt = fresh(), torch.tensor([[1, 2, 3]])
    tokens = continued(model, prompt, 2)
    assert tokens.shape == (1, 5)
    assert torch.equal(tokens[:, :3], prompt)
    assert tokens[0, 3] == model(prompt)[0, -1].argmax()


def test_both_models_are_prepared_before_they_are_timed() -> None:
    prepared: list[nn.Module] = []

    def prepare(model: nn.Module) -> nn.Module:
        prepared.append(model)
        return model

    in_turn(compiled_speed.arm("pre-rmsnorm"), 0, TIMES["smoke"], Context(), prepare)
    assert len(prepared) == 2
    old, new = prepared
    assert any(isinstance(module, LayerNorm) for module in old.modules())
    assert not any(isinstance(module, LayerNorm) for module in new.modules())

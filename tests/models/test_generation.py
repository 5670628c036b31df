from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from setpoint.errors import InputError
from setpoint.models import Attention, Learned, Position, Rotary, Sinusoidal, Transformer, TransformerConfig
from setpoint.models.generation import choose

CONFIG = TransformerConfig(vocab_size=23, context=128, dim=16, depth=2, num_heads=4, num_kv_heads=2)


@pytest.fixture
def model() -> Transformer:
    return Transformer(replace(CONFIG, embedding_std=0.5)).eval()


@pytest.mark.parametrize("position", [Rotary(), Learned(), Sinusoidal()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kv_bias", [False, True], ids=["plain", "kv-bias"])
@pytest.mark.parametrize("steps", [[100], [1] * 100, [7, 1, 1, 60, 31]], ids=["whole", "ones", "chunks"])
def test_cache_gives_the_logits_of_one_pass(position: Position, kv_bias: bool, steps: list[int]) -> None:
    model = Transformer(CONFIG, position=position, attention=partial(Attention, kv_bias=kv_bias)).double().eval()
    tokens, cache = torch.randint(23, (2, 100)), model.cache()
    with torch.no_grad():
        wanted = model(tokens)
        found = torch.cat([model(part, cache=cache) for part in tokens.split(steps, dim=1)], dim=1)
    assert cache.length == 100
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_cache_with_padding_gives_the_logits_of_one_pass(model: Transformer) -> None:
    tokens, cache = torch.randint(23, (2, 10)), model.cache()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask)
        parts = [
            model(tokens[:, start:stop], cache=cache, attention_mask=mask[:, :stop])
            for start, stop in ((0, 5), (5, 6), (6, 10))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:], wanted[:, 3:], atol=1e-5, rtol=1e-4)


def test_greedy_text_is_that_of_repeated_whole_passes(model: Transformer) -> None:
    prompt = torch.randint(23, (2, 4))
    tokens = prompt
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 12), tokens)


def test_generation_leaves_every_module_in_its_mode(model: Transformer) -> None:
    model.train()
    model.stack.blocks[0].eval()
    model.generate(torch.tensor([[1]]), 2)
    assert model.training
    assert not model.stack.blocks[0].training


def test_draws_repeat_under_a_generator_and_leave_the_global_one_alone(model: Transformer) -> None:
    before = torch.get_rng_state()
    draws = [
        model.generate(torch.tensor([[1, 2]]), 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (5, 5, 6)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_row_that_ended_is_filled_with_the_end_and_text_stops_when_all_have(model: Transformer) -> None:
    prompt = torch.randint(23, (3, 4))
    free = model.generate(prompt, 30)[:, 4:]
    eos = int(free[0, 2])
    found = model.generate(prompt, 30, eos=eos)[:, 4:]
    for ours, unbound in zip(found, free, strict=True):
        ends = (unbound == eos).nonzero()
        stop = int(ends[0]) + 1 if len(ends) else 30
        assert torch.equal(ours[:stop], unbound[: min(stop, len(ours))])
        assert bool((ours[stop:] == eos).all())
    one = model.generate(prompt[:1], 30, eos=eos)
    assert one[0, -1] == eos
    assert one.shape[1] <= 4 + 3


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)


def shares(**options: float | int) -> list[float]:
    drawn = choose(LOGITS, generator=torch.Generator().manual_seed(0), **options)  # type: ignore[arg-type]
    return [float((drawn == token).float().mean()) for token in range(4)]


def test_draws_follow_the_probabilities() -> None:
    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_temperature_sharpens() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert shares(temperature=0.5) == pytest.approx((weights / weights.sum()).tolist(), abs=0.03)


def test_top_k_keeps_the_best() -> None:
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0.0, 0.0], abs=0.03)
    assert shares(temperature=1.0, top_k=99) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_the_mass() -> None:
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.625, 0.375, 0.0, 0.0], abs=0.03)
    assert shares(temperature=1.0, top_p=1e-9) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str, model: Transformer) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(torch.tensor([[1]]), 1, **options)


def test_generation_refuses_what_it_cannot_continue(model: Transformer) -> None:
    with pytest.raises(InputError, match="causal"):
        Transformer(replace(CONFIG, causal=False)).generate(torch.tensor([[1]]), 1)
    with pytest.raises(InputError, match="at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(InputError, match="at most 128 tokens"):
        Transformer(CONFIG, position=Learned()).generate(torch.tensor([[1]]), 128)
    with pytest.raises(InputError, match="no cache"):
        Transformer(replace(CONFIG, causal=False))(torch.tensor([[1]]), cache=model.cache())
    assert model.generate(torch.tensor([[1]]), 0).tolist() == [[1]]

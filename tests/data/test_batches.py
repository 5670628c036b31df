from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from setpoint.data import Batches, accuracy, label_loss, next_token_loss, run_inputs
from setpoint.errors import InputError


def stream(seed: int | None = 0, count: int = 10, batch_size: int = 3) -> Batches[list[int]]:
    return Batches(lambda items, epoch: items.tolist(), count=count, batch_size=batch_size, seed=seed)


def take(batches: Batches[list[int]], count: int) -> list[list[int]]:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def test_an_epoch_has_every_item_once_but_for_the_remainder() -> None:
    epoch = np.concatenate(take(stream(), 3)).tolist()
    assert len(set(epoch)) == 9
    assert set(epoch) < set(range(10))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, second = take(stream(), 6)[:3], take(stream(), 6)[3:]
    assert first != second
    assert take(stream(), 3) == first
    assert take(stream(seed=1), 3) != first


def test_a_stream_entered_late_gives_the_same_batches() -> None:
    assert take(stream().from_batch(4), 5) == take(stream(), 9)[4:]


def test_shards_together_are_the_stream() -> None:
    parts = [take(stream().shard(rank, 2), 4) for rank in range(2)]
    assert [batch for pair in zip(*parts, strict=True) for batch in pair] == take(stream(), 8)


def test_a_shard_entered_late_stays_in_its_shard() -> None:
    assert take(stream().shard(1, 2).from_batch(2), 2) == take(stream(), 8)[5::2]


def test_a_pass_is_in_order_and_whole() -> None:
    batches = stream(seed=None)
    assert len(batches) == 4
    assert list(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [len(batches.shard(rank, 3)) for rank in range(3)] == [2, 1, 1]
    assert list(batches.shard(0, 3)) == [[0, 1, 2], [9]]


def test_an_endless_stream_has_no_length() -> None:
    with pytest.raises(TypeError, match="endless"):
        len(stream())


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="10 items"):
        stream(batch_size=11)
    with pytest.raises(InputError, match="at least 1"):
        stream(batch_size=0)


def test_targets_never_reach_the_model() -> None:
    embedding = nn.Embedding(7, 2)
    tokens = torch.tensor([[1, 2]])
    assert torch.equal(run_inputs(embedding, {"tokens": tokens, "targets": tokens}), embedding(tokens))
    bilinear = nn.Bilinear(2, 2, 1)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.equal(run_inputs(bilinear, ((x, y), torch.zeros(3))), bilinear(x, y))
    assert torch.equal(run_inputs(bilinear, {"input1": x, "input2": y, "targets": x}), bilinear(x, y))
    assert torch.equal(run_inputs(bilinear.double().float(), ((x, y), None)), bilinear(x, y))


def test_losses_ignore_what_is_marked_and_agree_with_counting() -> None:
    targets = torch.tensor([[0, 1, -100]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 2] = math.nan  # the marked place may hold anything
    logits[0, 0, 0] = 9
    assert next_token_loss(logits, {"targets": targets}).item() == pytest.approx((0.00037 + math.log(4)) / 2, abs=1e-4)
    assert accuracy(logits, {"targets": targets}).item() == 0.5
    images = (None, torch.tensor([1, 0]))
    assert accuracy(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), images).item() == 0.5
    assert label_loss(torch.zeros(2, 8), images).item() == pytest.approx(math.log(8))

"""What the studies of transformers share, on models that take a second."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from setpoint import data
from setpoint.nn import PreNorm, ScaledPreNorm
from setpoint.studies import Budget, Context, Diverged, lns, peri_ln, pre_ln
from setpoint.studies import _language as language
from setpoint.train import History

SMALL = Budget(seeds=2, minutes=0.1, options=language.SMOKE)
QUIET = Context(split="valid")


def model(**config: Any) -> Any:
    return language.model_for(SMALL, QUIET, 0, {"block": PreNorm()}, **config)


def test_a_finite_loss_worse_than_a_uniform_guess_counts_as_diverged() -> None:
    with pytest.raises(Diverged, match=r"a uniform guess has 5\.545"):
        language.learn(model(embedding_std=3.0), 0, SMALL, QUIET, lr=1e-6)


def test_no_loss_that_learn_gives_is_above_what_a_diverged_run_counts_as() -> None:
    learned = language.learn(model(), 0, SMALL, QUIET, lr=1e-3)
    assert learned.loss <= log(256) == language.DIVERGED


def test_the_mean_over_rates_counts_a_rate_that_does_not_train_as_the_bar() -> None:
    losses = {1e-3: 2.0, 1e-2: 5.0, 1e-1: float("nan")}

    def run(rate: float, _index: int) -> float:
        if rate == 1e-1:
            raise Diverged("nan")
        return losses[rate]

    metrics, curve = language.largest_rate(list(losses), SMALL, QUIET, run)
    bar = language.unigram(SMALL["context"]) - language.STUCK
    assert metrics["mean_loss"] == pytest.approx((2.0 + 2 * bar) / 3)
    assert (metrics["largest_rate"], metrics["rates_that_train"]) == (1e-3, 1.0)
    assert curve.y == (2.0, 5.0, None)


def test_the_last_rate_is_far_beyond_the_grid_that_is_tuned() -> None:
    assert pre_ln.with_warmup.tuning is not None
    assert max(pre_ln.RATES) > 30 * max(pre_ln.with_warmup.tuning.grid["lr"])


def test_steps_grow_by_what_scaled_norms_lack() -> None:
    placement, depth = ScaledPreNorm(), 12
    norms = [
        placement.residual(torch.nn.Identity(), 8, norm=torch.nn.RMSNorm, layer=layer, depth=depth).norm
        for layer in range(1, depth + 1)
    ]
    inverse = [norm.scale**-2 for norm in norms]  # type: ignore[union-attr, operator]
    assert lns.larger(depth) == pytest.approx((sum(inverse) / depth) ** 0.5)


def test_leaving_a_block_out_costs_nothing_where_it_does_nothing() -> None:
    network = model()
    torch.nn.init.zeros_(network.stack.blocks[1].attention.sublayer.o_proj.weight)
    torch.nn.init.zeros_(network.stack.blocks[1].feed_forward.sublayer.down_proj.weight)
    whole = lns.held_out(network, SMALL, QUIET)
    assert lns.without(network, 1, SMALL, QUIET) == whole
    assert lns.without(network, 0, SMALL, QUIET) != whole
    assert lns.held_out(network, SMALL, QUIET) == whole


def mean_of_batches(network: Any, sizes: Budget, ctx: Context, batch: int) -> float:
    """Each batch counts as much as any other."""
    text = language.corpus(sizes["context"], ctx.data)
    with torch.no_grad():
        losses = [
            float(data.next_token_loss(data.run_inputs(network, given), given))
            for given in text.batches(ctx.split, batch, limit=sizes["held_out"] // 4)
        ]
    return sum(losses) / len(losses)


def test_the_loss_without_blocks_is_the_plain_mean_of_full_batches_to_the_bit() -> None:
    sizes = Budget(seeds=2, minutes=0.1, options={**language.SMOKE, "held_out": 512})
    assert lns.held_out(model(), sizes, QUIET) == mean_of_batches(model(), sizes, QUIET, 64)


def test_a_smaller_last_batch_weighs_less(tmp_path: Path) -> None:
    source = tmp_path / "short.txt"
    source.write_text("".join(f"{i * i % 97} " for i in range(8000)))
    ctx = Context(split="valid", data=source)
    sizes = Budget(seeds=2, minutes=0.1, options={**language.SMOKE, "held_out": 4 * 65})
    whole, found = mean_of_batches(model(), sizes, ctx, 65), lns.held_out(model(), sizes, ctx)
    assert found == pytest.approx(whole, rel=1e-6)
    assert mean_of_batches(model(), sizes, ctx, 64) != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("steps", "ends"), [(6, (2, 4, 6)), (35, (10, 20, 30)), (400, tuple(range(10, 401, 10)))])
def test_a_learning_curve_has_points_however_short_the_run(steps: int, ends: tuple[int, ...]) -> None:
    history = History(steps=list(range(1, steps + 1)), losses=[float(i) for i in range(steps)])
    curve = language.Learned(torch.nn.Identity(), history, 0.0).curve()
    assert curve.x == ends
    assert curve.y[0] == sum(range(ends[0])) / ends[0]


def test_a_run_that_learned_no_order_has_failed() -> None:
    arm = peri_ln.stress.arm("peri-ln")
    assert peri_ln.stress(arm, {}, 0, peri_ln.stress.budgets["smoke"], QUIET).metrics["failed"] == 1.0

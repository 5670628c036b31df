"""What the studies of transformers share, on models that take a second."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from setpoint.nn import PreNorm, ScaledPreNorm
from setpoint.studies import Budget, Context, Diverged, lns, peri_ln, pre_ln
from setpoint.studies import _language as language

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


def test_a_run_that_learned_no_order_has_failed() -> None:
    arm = peri_ln.stress.arm("peri-ln")
    assert peri_ln.stress(arm, {}, 0, peri_ln.stress.budgets["smoke"], QUIET).metrics["failed"] == 1.0

"""α-BN: batch norms that meet other data than they were trained on, and mix its statistics into their own.

A trained batch norm normalizes by running averages of its training data. Where test data have shifted, these are wrong;
statistics of the test batch alone are noisy when it is small, and no longer match gain and addend. You, Li and Zhao
(2021, arXiv 2110.04065) mix the two, without any training:

    ``mean = w mean_source + (1 - w) mean_batch``, and the same for the variance.

``w`` is the weight of the source: 1 is ordinary evaluation, 0 is test-time normalization. It is a mixture of variances
and not the variance of a mixture: the distance between the means does not enter. Nothing is stored, every batch is
adapted to afresh, and each layer sees what the layers before it made of the adapted batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import per_channel, wide

_BatchNorm = nn.modules.batchnorm._BatchNorm


class AlphaBatchNorm(nn.Module):
    """A trained batch norm that mixes the statistics of the batch into its running averages.

    It wraps the norm, which may be any of torch's or a subclass that does more (an activation in it stays). Training
    and evaluation are the same: running averages are read and never written. Gain and addend can be trained, with
    gradients through the batch's statistics. Each process mixes in its own batch.

    Args:
        norm: A batch norm with running averages.
        source_weight: Weight of the running averages, from 0 to 1.
        prior: Weigh by the size of the batch instead: the running averages count like that many examples, so their
            weight in a batch of n is ``prior / (prior + n)`` (Schneider et al., 2020, arXiv 2006.16971).
        unbiased: Divide the batch's squares by n - 1, as running variances are, instead of n.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        InputError: The norm keeps no running averages, a weight outside 0 to 1, a negative prior; on call, another
            number of channels.
        TypeError: It is no batch norm; on call, an input that is not floating-point.

    Warns:
        UserWarning: A batch of one value per channel, which has no variance.

    Reference:
        You, Li and Zhao, 2021, "Test-time Batch Statistics Calibration for Covariate Shift", arXiv 2110.04065.

    Example:
        >>> layer = AlphaBatchNorm(nn.BatchNorm1d(1, eps=0.0))
        >>> layer(torch.tensor([[2.0], [4.0]])).flatten().round(decimals=4)  # mean 0.1 * 3, variance 0.9 * 1 + 0.1 * 1
        tensor([1.7000, 3.7000], grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        norm: _BatchNorm,
        source_weight: float = 0.9,
        prior: float | None = None,
        unbiased: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(norm, _BatchNorm):
            raise TypeError(f"AlphaBatchNorm: expected a batch norm, got {type(norm).__name__}")
        if norm.running_mean is None or norm.running_var is None:
            raise InputError(
                "AlphaBatchNorm: expected a batch norm with running averages, got one made with "
                "track_running_stats=False, which has nothing to mix the batch's with"
            )
        expect_mixture(source_weight, prior)
        self.norm = norm
        self.source_weight = source_weight
        self.prior = prior
        self.unbiased = unbiased

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalize ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.norm.num_features, "AlphaBatchNorm")
        weight = self.source_weight if self.prior is None else self.prior / (self.prior + len(x))
        if weight < 1 and x.numel():
            x = self._shifted(x, weight)
        training, self.norm.training = self.norm.training, False
        try:
            normalized: Tensor = self.norm(x)
        finally:
            self.norm.training = training
        return normalized

    def _shifted(self, x: Tensor, weight: float) -> Tensor:
        """What the norm turns, by its own statistics, into x normalized by the mixture."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        source_mean, source_var = wide(self.norm.running_mean), wide(self.norm.running_var)
        batch_mean, batch_var = self._of_batch(x)
        mean = torch.lerp(batch_mean.to(source_mean), source_mean, weight)
        variance = torch.lerp(batch_var.to(source_var), source_var, weight)
        scale = torch.sqrt((source_var + self.norm.eps) / (variance + self.norm.eps))
        mean, scale, source_mean = (per_channel(t, x) for t in (mean, scale, source_mean))
        return ((wide(x) - mean) * scale + source_mean).to(x.dtype)

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel over batch and space."""
        count = x.numel() // x.shape[1]
        if count == 1 and not torch.compiler.is_compiling():
            warnings.warn(
                "AlphaBatchNorm: a batch of one value per channel has variance 0, which shrinks the mixed variance; "
                "use larger batches or source_weight=1",
                stacklevel=4,
            )
        variance, mean = torch.var_mean(wide(x), (0, *range(2, x.dim())), correction=0)
        return mean, variance * (count / max(count - 1, 1)) if self.unbiased else variance

    def extra_repr(self) -> str:
        """How the two are weighed."""
        weight = f"source_weight={self.source_weight}" if self.prior is None else f"prior={self.prior}"
        return f"{weight}, unbiased={self.unbiased}"


def adapt_batchnorm(
    model: nn.Module,
    source_weight: float | Mapping[str, float] = 0.9,
    *,
    prior: float | None = None,
    unbiased: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Put `AlphaBatchNorm` around every batch norm of a model.

    Args:
        model: A trained model. Its mode stays; batch norms behave as described in either.
        source_weight: Weight of the running averages; or name -> weight, where other batch norms stay as they are.
        prior: Weigh by the size of the batch instead, as in `AlphaBatchNorm`.
        unbiased: As in `AlphaBatchNorm`.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model. Batch norms that keep no running averages are left alone.

    Raises:
        InputError: There is no batch norm to adapt (they may have been folded), no batch norm of a given name, or a
            weight outside 0 to 1.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> adapt_batchnorm(model, 0.5)[1]
        AlphaBatchNorm(
          source_weight=0.5, unbiased=False
          (norm): BatchNorm2d(4, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        )
    """
    adapted = model if inplace else deepcopy(model)
    for path, wrapper in _wrappers(adapted, source_weight, prior, unbiased).items():
        if not path:
            return wrapper
        _place(adapted, path, wrapper)
    return adapted


@contextmanager
def batchnorm_adapted(
    model: nn.Module,
    source_weight: float | Mapping[str, float] = 0.9,
    *,
    prior: float | None = None,
    unbiased: bool = False,
) -> Iterator[nn.Module]:
    """Adapt a model for a while, in place: afterwards it is as it was, bit for bit.

    Args:
        model, source_weight, prior, unbiased: As in `adapt_batchnorm`.

    Yields:
        The model.

    Raises:
        InputError: As in `adapt_batchnorm`; and a model that is itself a batch norm.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> with batchnorm_adapted(model, 0.0):
        ...     inside = model(torch.tensor([[2.0], [4.0]])).flatten().round()
        >>> inside.tolist(), type(model[0]).__name__
        ([-1.0, 1.0], 'BatchNorm1d')
    """
    wrappers = _wrappers(model, source_weight, prior, unbiased)
    if "" in wrappers:
        raise InputError("expected a model with batch norms in it, got a batch norm; use AlphaBatchNorm(norm)")
    try:
        for path, wrapper in wrappers.items():
            _place(model, path, wrapper)
        yield model
    finally:
        for path, wrapper in wrappers.items():
            _place(model, path, wrapper.norm)


def expect_mixture(source_weight: float, prior: float | None) -> None:
    """A weight from 0 to 1, and a prior that is not negative.

    Raises:
        InputError: Another.
    """
    if not 0 <= source_weight <= 1:
        raise InputError(
            f"expected source_weight between 0 and 1, got {source_weight!r}; it is the weight of the running averages, "
            "1 for ordinary evaluation"
        )
    if prior is not None and not 0 < prior < inf:
        raise InputError(
            f"expected prior above 0 and finite, got {prior!r}; 16 counts the running averages like 16 examples"
        )


def adaptable(model: nn.Module) -> dict[str, _BatchNorm]:
    """Name -> batch norm that keeps running averages; one that is used under several names comes under each."""
    inside = {id(m.norm) for m in model.modules() if isinstance(m, AlphaBatchNorm)}
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.running_mean is not None and id(module) not in inside
    }


def _wrappers(
    model: nn.Module, source_weight: float | Mapping[str, float], prior: float | None, unbiased: bool
) -> dict[str, AlphaBatchNorm]:
    norms = adaptable(model)
    if not norms:
        raise InputError(
            "expected a model with batch norms that keep running averages, found none; were they folded into "
            "convolutions, or adapted already?"
        )
    given = source_weight if isinstance(source_weight, Mapping) else dict.fromkeys(norms, source_weight)
    for path in given.keys() - norms.keys():
        raise InputError(f"no batch norm is called {path!r}; the nearest names are {', '.join(nearest(path, norms))}")
    for weight in given.values():
        expect_mixture(weight, prior)
    made: dict[nn.Module, AlphaBatchNorm] = {}
    for path, weight in given.items():
        norm = norms[path]
        made.setdefault(norm, AlphaBatchNorm(norm, weight, prior, unbiased).train(norm.training))
    return {path: made[norm] for path, norm in norms.items() if norm in made}


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

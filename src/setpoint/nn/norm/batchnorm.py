"""Batch normalization: each channel by its mean and variance over the batch (Ioffe and Szegedy, 2015).

``y = weight * (x - mean) / sqrt(var + eps) + bias`` with the biased variance; for evaluation the layer keeps running
averages of the mean and of the *unbiased* variance, and is then an affine map (arXiv 1502.03167). The layers themselves
are torch's (`BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`). What torch does not have is here: padded sequences
(`MaskedBatchNorm1d`), statistics over parts of a large batch (`GhostBatchNorm`), and a layer that has stopped learning
(`FrozenBatchNorm`).
"""

from __future__ import annotations

import warnings
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import masked_moments, per_channel, wide

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "FrozenBatchNorm", "GhostBatchNorm", "MaskedBatchNorm1d"]


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """Batch normalization of padded sequences: padding stays out of the statistics and comes out as zero.

    What it computes for the real tokens is what `torch.nn.BatchNorm1d` computes for them laid end to end. Parameters
    and buffers have torch's names, so a checkpoint of either loads into the other. Statistics are those of one process.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        momentum: Weight of the new value in the running averages; None for the average over all batches seen.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0).
        track_running_stats: Keep running averages for evaluation; without, batch statistics serve there too.
        device, dtype: Of the parameters and buffers.

    Shape:
        Input and output ``(N, C, L)``, mask ``(N, L)``, true at real positions.

    Raises:
        InputError: On call, another number of channels or axes, a mask of another shape, or in training a single real
            position.
        TypeError: On call, an input that is not floating-point, a mask that is not boolean.

    Warns:
        UserWarning: A training batch that is all padding; the running averages stand in for its statistics.

    Reference:
        Ioffe and Szegedy, 2015, "Batch Normalization", arXiv 1502.03167.

    Example:
        >>> layer, mask = MaskedBatchNorm1d(1), torch.tensor([[True, True, False]])
        >>> layer(torch.tensor([[[1.0, 3.0, 99.0]]]), mask).detach().round(decimals=3)
        tensor([[[-1.,  1.,  0.]]])
    """

    def forward(
        self, x: Float[Tensor, "batch channels time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch channels time"]:
        """Normalize ``(N, C, L)``; without a mask every position is real."""
        expect_channels(x, self.num_features, "MaskedBatchNorm1d", dims=(3,))
        if mask is None:
            mask = x.new_ones((x.shape[0], x.shape[2]), dtype=torch.bool)
        self._expect_mask(x, mask)
        if self.training or self.running_mean is None:
            mean, variance = self._batch_statistics(x, mask)
        else:
            mean, variance = wide(self.running_mean), wide(cast(Tensor, self.running_var))
        y = (wide(x) - mean[:, None]) * torch.rsqrt(variance + self.eps)[:, None]
        if self.affine:
            y = torch.addcmul(self.bias[:, None], y, self.weight[:, None])
        return torch.where(mask.unsqueeze(1), y, 0.0).to(x.dtype)

    def _expect_mask(self, x: Tensor, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"MaskedBatchNorm1d: expected a boolean mask, true at real positions, got {mask.dtype}; use mask.bool()"
            )
        if mask.shape != (x.shape[0], x.shape[2]):
            raise InputError(
                f"MaskedBatchNorm1d: expected a mask of shape {(x.shape[0], x.shape[2])} for an input of shape "
                f"{tuple(x.shape)}, got {tuple(mask.shape)}; give one entry per example and position"
            )

    def _batch_statistics(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, count = masked_moments(x, mask)
        if not torch.compiler.is_compiling() and not mask.is_meta:  # contents are not there to look at
            self._warn_of_few(int(count))
        if self.running_mean is None or self.running_var is None:
            return mean, variance
        some = count > 0
        if self.training:
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1), some)
        return torch.where(some, mean, self.running_mean), torch.where(some, variance, self.running_var)

    def _warn_of_few(self, count: int) -> None:
        if count == 1 and self.training:
            raise InputError(
                "MaskedBatchNorm1d: expected more than one real position per batch in training, got 1, which is its "
                "own mean and has no variance; use larger batches, or eval()"
            )
        if count == 0:
            warnings.warn(
                "MaskedBatchNorm1d: the mask of this batch has no real position; the running averages stand in for its "
                "statistics and stay as they are",
                stacklevel=4,
            )

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, some: Tensor) -> None:
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None
        assert running_var is not None
        assert batches is not None
        batches.add_(some)
        new = 1.0 / batches.clamp_min(1) if self.momentum is None else torch.full_like(mean, self.momentum)
        new = torch.where(some, new, 0.0)
        running_mean.copy_(torch.lerp(running_mean, mean.to(running_mean.dtype), new.to(running_mean.dtype)))
        running_var.copy_(torch.lerp(running_var, variance.to(running_var.dtype), new.to(running_var.dtype)))


class GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization over parts of a batch, so that a large batch keeps the noise of a small one.

    In training the batch is cut into parts of about ``ghost_batch_size`` examples, each normalized by its own
    statistics; each part updates the running averages as a batch of its own. Evaluation is ordinary.

    Args:
        num_features: Number of channels C.
        ghost_batch_size: Examples in a part; the parts of one batch differ by at most one.
        eps: Added to the variance, inside the root.
        momentum: Weight of a part's statistics in the running averages; None for the average over all parts seen.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0).
        track_running_stats: Keep running averages for evaluation; without, batch statistics serve there too.
        device, dtype: Of the parameters and buffers.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        InputError: ``ghost_batch_size`` below 1; on call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Hoffer, Hubara and Soudry, 2017, "Train longer, generalize better", arXiv 1705.08741.

    Example:
        >>> layer = GhostBatchNorm(1, ghost_batch_size=2)
        >>> layer(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).detach().flatten().round()
        tensor([-1.,  1., -1.,  1.])
    """

    def __init__(
        self,
        num_features: int,
        ghost_batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if ghost_batch_size < 1:
            raise InputError(
                f"GhostBatchNorm: expected ghost_batch_size of at least 1, got {ghost_batch_size!r}; 32 is usual"
            )
        self.ghost_batch_size = ghost_batch_size

    def _check_input_dim(self, input: Tensor) -> None:
        expect_channels(input, self.num_features, "GhostBatchNorm")

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalize ``(N, C, *)``; shape and dtype stay."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        parts = max(1, -(-x.shape[0] // self.ghost_batch_size))
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in x.tensor_split(parts)])

    def extra_repr(self) -> str:
        """As torch's batch norms, and the size of a part."""
        return (
            f"{self.num_features}, ghost_batch_size={self.ghost_batch_size}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )


class FrozenBatchNorm(nn.Module):
    """A batch norm that has stopped learning: an affine map per channel, in training as in evaluation.

    All four tensors are buffers under torch's names, so a batch norm's checkpoint loads into it. No optimizer sees
    them.

    Args:
        num_features: Number of channels C.
        eps: Added to the variance, inside the root.
        device, dtype: Of the buffers.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        InputError: On call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Example:
        >>> layer = FrozenBatchNorm.of(BatchNorm1d(2))
        >>> layer.train()(torch.tensor([[1.0, 2.0]])).round(decimals=3)
        tensor([[1., 2.]])
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> FrozenBatchNorm:
        """The frozen form of a batch norm, with tensors of its own.

        Raises:
            InputError: It keeps no running averages, so there is nothing to freeze it at.
        """
        if norm.running_mean is None or norm.running_var is None:
            raise InputError(
                "expected a batch norm with running averages, got one made with track_running_stats=False, which has "
                "no fixed statistics; leave it out"
            )
        frozen = cls(norm.num_features, norm.eps, norm.running_mean.device, norm.running_mean.dtype)
        frozen.running_mean.copy_(norm.running_mean)
        frozen.running_var.copy_(norm.running_var)
        if norm.affine:
            frozen.weight.copy_(norm.weight.detach())
            frozen.bias.copy_(norm.bias.detach())
        return frozen.train(norm.training)

    def reset_parameters(self) -> None:
        """The identity but for ``eps``: gain and variance to 1, addend and mean to 0."""
        for one, zero in ((self.weight, self.bias), (self.running_var, self.running_mean)):
            one.fill_(1.0)
            zero.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # a batch norm counts its batches, this has none
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Scale and shift ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.num_features, "FrozenBatchNorm")
        scale = wide(self.weight) * torch.rsqrt(wide(self.running_var) + self.eps)
        shift = wide(self.bias) - wide(self.running_mean) * scale
        return (x * per_channel(scale, x) + per_channel(shift, x)).to(x.dtype)

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{self.num_features}, eps={self.eps}"

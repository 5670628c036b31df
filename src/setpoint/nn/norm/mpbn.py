"""Batch normalization of the membrane potential, right before a spiking neuron decides to fire.

The batch norm behind a convolution sets the scale of the current, but what is held against the threshold is the
potential, which carries over from step to step. Guo, Zhang, Chen, Peng, Liu, Zhang, Huang and Ma (2023, arXiv
2308.08359) normalize that too:

    ``u <- tau u + current``,  ``spike = 1[BN(u) > v_threshold]``,  ``u <- u (1 - spike)``.

The normalized potential is used for the decision alone and never carried on. In evaluation the norm is an affine map,
so it folds into the threshold (`MPBNLIF.fold`), exactly: per channel ``(v_threshold - bias) sqrt(var + eps) / weight +
mean``, with the comparison turned round where the weight is negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import shape_of
from setpoint.nn.spiking import LIF, Current, Neuron, Train, fire


class MPBNLIF(Neuron):
    """Leaky integrate-and-fire neurons that fire by their batch-normalized potential.

    The norm ``bn`` is torch's, shared by all time steps and called once in each, so its statistics are those of one
    step's batch and a training call updates its running averages T times. It stays in float32 when the model goes to
    half precision. For statistics of all processes use `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.

    Args:
        num_features: Number of channels C; or the sizes ``(C, H, W)`` for a norm of every element by itself.
        tau: Share of the potential that is left after a step.
        v_threshold: What the normalized potential must exceed.
        k: Steepness of the surrogate gradient.
        eps: Added to the variance, inside the root.
        momentum: Weight of the new value in the running averages.
        device, dtype: Of the norm's parameters.

    Shape:
        Input and output ``(T, N, C, *)``.

    Raises:
        InputError: ``tau`` outside 0 to 1; on call, no time step, another number of channels, or in training a single
            value per channel.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Guo et al., 2023, "Membrane Potential Batch Normalization for Spiking Neural Networks", arXiv 2308.08359.

    Example:
        >>> layer = MPBNLIF(1)
        >>> layer(torch.tensor([[[1.0], [5.0]]])).flatten()  # one step, normalized to -1 and 1
        tensor([0., 1.], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        tau: float = 0.25,
        v_threshold: float = 0.5,
        k: float = 3.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tau, k)
        self.feature_shape = shape_of(num_features, type(self).__name__)
        self.v_threshold = v_threshold
        # Of one axis beside channels, whatever the maps have: statistics are the same, and elements need no other norm.
        self.bn = nn.BatchNorm1d(prod(self.feature_shape), eps, momentum, device=device, dtype=dtype)

    def _spikes(self, potential: Current) -> Current:
        features = prod(self.feature_shape)
        rest = potential.shape[1:].numel() // features
        charged = potential.to(self.bn.weight.dtype)  # half where somebody cast the parameters one by one
        normalized: Tensor = self.bn(charged.reshape(len(potential), features, rest))
        return fire(normalized.reshape(potential.shape), self.v_threshold, self.k)

    def _expect(self, x: Train) -> None:
        super()._expect(x)
        if tuple(x.shape[2 : 2 + len(self.feature_shape)]) != self.feature_shape:
            wanted = ", ".join(map(str, self.feature_shape))
            raise InputError(f"MPBNLIF: expected currents of shape (T, N, {wanted}, *), got {tuple(x.shape)}")
        if self.training and x.shape[1:].numel() == prod(self.feature_shape):
            raise InputError(
                "MPBNLIF: expected more than one value per channel and time step in training, got one, which has no "
                "variance; use larger batches, or eval()"
            )

    @torch.no_grad()
    def fold(self) -> LIF:
        """The same neurons without a norm: its statistics, gain and addend are in their thresholds.

        Returns:
            Neurons in eval mode with a threshold per channel or element; one that the norm sets to a constant (gain 0)
            fires always or never.

        Raises:
            InputError: The layer is in training mode, where there is no one norm to fold.

        Example:
            >>> layer = MPBNLIF(1).eval()
            >>> _ = layer.bn.running_mean.fill_(3.0)
            >>> layer.fold().v_threshold
            tensor([3.5000])
        """
        if self.training:
            raise InputError("MPBNLIF: expected eval mode to fold in, got training mode; call eval() first")
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        weight, bias = bn.weight.double(), bn.bias.double()
        deviation = (bn.running_var.double() + bn.eps).sqrt()
        threshold = (self.v_threshold - bias) * deviation / weight + bn.running_mean
        constant = torch.where(bias > self.v_threshold, -torch.inf, torch.inf)
        threshold = torch.where(weight == 0, constant, threshold)
        folded = LIF(self.feature_shape, self.tau, k=self.k, device=bn.weight.device, dtype=bn.weight.dtype)
        folded.v_threshold.copy_(threshold.reshape(self.feature_shape))
        folded.sign.copy_(torch.where(weight < 0, -1.0, 1.0).reshape(self.feature_shape))
        return folded.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bn.weight.dtype in (torch.float16, torch.bfloat16):
            self.bn.float()
        return self

    def extra_repr(self) -> str:
        """Decay, threshold and steepness."""
        return f"tau={self.tau}, v_threshold={self.v_threshold}, k={self.k}"

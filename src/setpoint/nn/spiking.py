"""Spiking neurons: leaky integrate-and-fire over time steps, trained through a surrogate for the step of firing.

Sequences have the time axis in front, ``(T, N, ...)``. A neuron keeps a potential ``u``, which starts at 0, decays and
takes up the input current; where it exceeds a threshold the neuron fires and ``u`` goes back to 0:

    ``u <- tau u + current``,  ``spike = 1[u > v_threshold]``,  ``u <- u (1 - spike)``.

The step has no useful derivative. Backward, `fire` takes that of a ramp around the threshold (a tanh over a window of
width 1, as in the code of Guo et al., 2023, arXiv 2308.08359), and gradients flow through the reset as well. Layers
without a notion of time go into `OverTime`; ``OverTime(nn.BatchNorm2d(C))`` normalizes over time and batch together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import tanh

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_floating
from setpoint.nn.norm.functional import wide

Current = Float[Tensor, "batch ..."]
Train = Float[Tensor, "time batch ..."]


def fire(potential: Float[Tensor, "*shape"], threshold: float = 0.5, k: float = 3.0) -> Float[Tensor, "*shape"]:
    """1 where the potential exceeds the threshold, else 0, with the gradient of a smooth ramp.

    With ``x`` the potential minus the threshold, the gradient is ``k (1 - tanh²(k x)) / (2 tanh(k / 2))`` for x between
    -1/2 and 1/2, whose integral is 1, and 0 outside.

    Args:
        potential: Any tensor.
        threshold: What must be exceeded.
        k: Steepness of the ramp.

    Returns:
        A tensor of zeros and ones of the shape of ``potential``.

    Example:
        >>> u = torch.tensor([0.5, 0.6, 2.0], requires_grad=True)
        >>> spikes = fire(u)
        >>> spikes.tolist(), torch.autograd.grad(spikes.sum(), u)[0].tolist()
        ([0.0, 1.0, 1.0], [1.657..., 1.516..., 0.0])
    """
    spikes = (potential > threshold).to(potential.dtype)
    window = (potential - threshold + 0.5).clamp(0, 1) - 0.5
    ramp = (torch.tanh(k * window) + tanh(k / 2)) / (2 * tanh(k / 2))
    return (spikes - ramp).detach() + ramp  # exactly 0 or 1: above the threshold the ramp is at least 1/2


class Neuron(nn.Module, ABC):
    """What neurons share: potentials that leak, take up a current, and are reset by a spike.

    A subclass says by ``_spikes(potential)`` which fire. Potentials are kept in at least float32.

    Args:
        tau: Share of the potential that is left after a step.
        k: Steepness of the surrogate.
    """

    def __init__(self, tau: float, k: float) -> None:
        super().__init__()
        if not 0 <= tau <= 1 or not k > 0:
            raise InputError(
                f"{type(self).__name__}: expected tau between 0 and 1 and k above 0, got {tau} and {k}; tau is the "
                "share of the potential that is left after a step"
            )
        self.tau = tau
        self.k = k

    @abstractmethod
    def _spikes(self, potential: Current) -> Current:
        """Zeros and ones, one per potential ``(N, ...)``."""

    def step(self, current: Current, potential: Current | None = None) -> tuple[Current, Current]:
        """One time step.

        Args:
            current: Input ``(N, ...)``.
            potential: What the last step returned; None at the start.

        Returns:
            Spikes in the dtype of the current, and the potential to pass on.
        """
        taken = wide(current)
        charged = taken if potential is None else self.tau * potential + taken
        spikes = self._spikes(charged)
        return spikes.to(current.dtype), charged * (1 - spikes)

    def forward(self, x: Train) -> Train:
        """Spikes for currents ``(T, N, ...)``, from potentials of 0; shape and dtype stay."""
        self._expect(x)
        potential: Tensor | None = None
        trains = []
        for current in x.unbind(0):
            spikes, potential = self.step(current, potential)
            trains.append(spikes)
        return torch.stack(trains)

    def _expect(self, x: Train) -> None:
        expect_floating(x, type(self).__name__)
        if x.dim() < 2 or not len(x):
            raise InputError(
                f"{type(self).__name__}: expected currents of shape (T, N, ...) with at least one time step, got "
                f"{tuple(x.shape)}; put the time axis in front, as in x.unsqueeze(0) for a single step"
            )


class LIF(Neuron):
    """Leaky integrate-and-fire neurons with one threshold for all, or one for each channel or element.

    Thresholds are a buffer, so a checkpoint holds them. Where ``sign`` is -1 a neuron fires *below* its threshold,
    which is what folding a norm with a negative gain leaves (`MPBNLIF.fold`).

    Args:
        threshold_shape: Sizes of the thresholds: ``()`` for one, ``(C,)`` for channels, ``(C, H, W)`` for elements.
        tau: Share of the potential that is left after a step.
        v_threshold: Where they start.
        k: Steepness of the surrogate.
        device, dtype: Of the thresholds.

    Shape:
        Input and output ``(T, N, *)``; with thresholds of shape ``(C, ...)``, ``(T, N, C, ..., *)``.

    Raises:
        InputError: ``tau`` outside 0 to 1; on call, no time step, or sizes that do not match the thresholds.
        TypeError: On call, an input that is not floating-point.

    Example:
        >>> LIF()(torch.full((4, 1, 1), 0.4)).flatten()  # potentials 0.4, 0.5, 0.525 (it fires), 0.4
        tensor([0., 0., 1., 0.])
    """

    v_threshold: Tensor
    sign: Tensor

    def __init__(
        self,
        threshold_shape: Sequence[int] = (),
        tau: float = 0.25,
        v_threshold: float = 0.5,
        k: float = 3.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tau, k)
        self.threshold_shape = tuple(threshold_shape)
        filled = torch.full(self.threshold_shape, v_threshold, device=device, dtype=dtype)
        self.register_buffer("v_threshold", filled)
        self.register_buffer("sign", torch.ones_like(filled))

    def _spikes(self, potential: Current) -> Current:
        shape = (*self.threshold_shape, *(1,) * (potential.dim() - 1 - len(self.threshold_shape)))
        above = self.sign.view(shape) * (potential - wide(self.v_threshold).view(shape))
        return fire(above, 0.0, self.k)

    def _expect(self, x: Train) -> None:
        super()._expect(x)
        if tuple(x.shape[2 : 2 + len(self.threshold_shape)]) != self.threshold_shape:
            wanted = ", ".join(map(str, self.threshold_shape))
            raise InputError(f"LIF: expected currents of shape (T, N, {wanted}, *), got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        """Shape of the thresholds, decay and steepness."""
        return f"{self.threshold_shape}, tau={self.tau}, k={self.k}"


class OverTime(nn.Module):
    """Apply a layer to every time step at once, by taking time steps for examples.

    Args:
        layer: Any module of ``(N, ...)``: a convolution, a pooling, a batch norm (its statistics are then those of all
            steps and examples together).

    Shape:
        Input ``(T, N, ...)``, output ``(T, N, ...)``.

    Raises:
        InputError: On call, fewer than two axes.

    Example:
        >>> OverTime(nn.Conv2d(3, 8, 3))(torch.zeros(4, 2, 3, 9, 9)).shape
        torch.Size([4, 2, 8, 7, 7])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Train) -> Train:
        """What the layer makes of every step."""
        if x.dim() < 2:
            raise InputError(f"OverTime: expected an input of shape (T, N, ...), got {tuple(x.shape)}")
        y: Tensor = self.layer(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

"""Generalized divisive normalization: each channel over a learned pool of all channels' magnitudes.

At one position, over its channels (Ballé, Laparra and Simoncelli, 2016, arXiv 1511.06281):

    ``y_i = z_i / (beta_i + sum_j gamma_ij |z_j|^alpha)^epsilon``

It makes the responses of a linear transform to photographs nearly Gaussian and nearly independent, which neither a
linear transform nor a function of each channel alone can do. As a layer (`GDN`, and ``inverse=True`` to go back) it is
the activation of learned image compression, with ``alpha = 2`` and ``epsilon = 1/2``; `GDN1` has 1 and 1. It is
differentiable and invertible, so it makes a density model too (`setpoint.nn.GDNDensity`).

``beta`` and ``gamma`` must not become negative. Each is stored as a root, ``value = max(raw, bound)² - 2^-36``, and
below its bound a raw value gets only gradients that would raise it: what was clipped can come back. The gradient of a
root near 0 is small, so train with an optimizer that rescales gradients, such as Adam, and without weight decay.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import wide
from setpoint.optim.decay import no_weight_decay

Positions = Float[Tensor, "batch channels ..."]

PEDESTAL = 2.0**-36
EPSILON_MIN = 1e-6


class GDN(nn.Module):
    """Generalized divisive normalization over channels, or one step of its inversion.

    ``inverse=True`` multiplies by the pool instead of dividing, with parameters of its own: what decoders use, and not
    the exact inverse of another GDN, which is that layer's `invert`. Checkpoints of CompressAI load. Those of
    tensorflow/compression hold gamma transposed. Weight decay leaves the parameters alone.

    Args:
        num_features: Number of channels C.
        inverse: Multiply instead of dividing.
        alpha: Exponent of the magnitudes, at least 1, one for all pairs.
        epsilon: Exponent of the pool, above 0, one for all channels.
        beta_min: Lower bound of beta.
        gamma_init: Initial gamma of a channel on itself; on others it starts at 0, and beta at 1.
        learn_alpha, learn_epsilon: Train the exponent; the argument is where it starts.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, C, *)``.

    Raises:
        InputError: An exponent or an initial value out of range; on call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Ballé, Laparra and Simoncelli, 2016, "Density Modeling of Images using a Generalized Normalization
        Transformation", arXiv 1511.06281.

    Example:
        >>> GDN(1)(torch.tensor([[1.0], [3.0], [100.0]])).flatten().tolist()  # sqrt(10) is the limit
        [0.953..., 2.176..., 3.160...]
    """

    raw_alpha: nn.Parameter | None
    raw_epsilon: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        inverse: bool = False,
        alpha: float = 2.0,
        epsilon: float = 0.5,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        learn_alpha: bool = False,
        learn_epsilon: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or alpha < 1 or epsilon < EPSILON_MIN or not 0 < beta_min <= 1 or gamma_init < 0:
            raise InputError(
                f"{type(self).__name__}: expected num_features and alpha of at least 1, epsilon above 0, beta_min over "
                f"0 and at most 1, and gamma_init of at least 0, got {num_features}, {alpha}, {epsilon}, {beta_min} "
                f"and {gamma_init}"
            )
        self.num_features = num_features
        self.inverse = inverse
        self.beta_min = beta_min
        self.gamma_init = gamma_init
        self._alpha, self._epsilon = float(alpha), float(epsilon)
        self.raw_beta = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.raw_gamma = nn.Parameter(torch.empty(num_features, num_features, device=device, dtype=dtype))
        for name, learned in (("raw_alpha", learn_alpha), ("raw_epsilon", learn_epsilon)):
            made = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learned else None
            self.register_parameter(name, made)
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Beta to 1, gamma to ``gamma_init`` times the identity, exponents to where they start."""
        identity = torch.eye(self.num_features, device=self.raw_gamma.device)
        self.assign(torch.ones_like(identity[0]), self.gamma_init * identity)
        for raw, start in ((self.raw_alpha, self._alpha), (self.raw_epsilon, self._epsilon)):
            if raw is not None:
                nn.init.constant_(raw, start)

    @torch.no_grad()
    def assign(self, beta: Float[Tensor, " channels"], gamma: Float[Tensor, "channels channels"]) -> None:
        """Give beta and gamma values; what is below its bound is raised to it.

        Args:
            beta: Constants.
            gamma: Weights; row i is the pool of channel i.
        """
        self.raw_beta.copy_((beta.clamp_min(self.beta_min) + PEDESTAL).sqrt())
        self.raw_gamma.copy_((gamma.clamp_min(0) + PEDESTAL).sqrt())

    @property
    def beta(self) -> Float[Tensor, " channels"]:
        """Constant of each channel's pool, at least ``beta_min``."""
        return _value(self.raw_beta, self.beta_min)

    @property
    def gamma(self) -> Float[Tensor, "channels channels"]:
        """Weight of channel j in the pool of channel i, not negative."""
        return _value(self.raw_gamma, 0.0)

    @property
    def alpha(self) -> float | Tensor:
        """Exponent of the magnitudes."""
        return self._alpha if self.raw_alpha is None else lower_bound(wide(self.raw_alpha), 1.0)

    @property
    def epsilon(self) -> float | Tensor:
        """Exponent of the pool."""
        return self._epsilon if self.raw_epsilon is None else lower_bound(wide(self.raw_epsilon), EPSILON_MIN)

    @property
    def _power(self) -> float | Tensor:
        """The exponent with which the pool multiplies the input."""
        return self.epsilon if self.inverse else -self.epsilon

    def forward(self, z: Positions) -> Positions:
        """Normalize ``(N, C, *)``, every position by itself; shape and dtype stay."""
        expect_channels(z, self.num_features, type(self).__name__)
        values = wide(z)
        return (values * self._pool(values).pow(self._power)).to(z.dtype)

    def _pool(self, z: Positions) -> Positions:
        """``beta_i + sum_j gamma_ij |z_j|^alpha``, in full precision under autocast too."""
        alpha = self.alpha
        magnitudes = z.square() if isinstance(alpha, float) and alpha == 2 else z.abs().pow(alpha)
        rows = magnitudes.reshape(*z.shape[:2], z.shape[2:].numel())
        with full_precision(z):
            return (self.gamma @ rows + self.beta[:, None]).reshape(z.shape)

    def jacobian(self, z: Positions) -> Float[Tensor, "batch ... channels channels"]:
        """``d y_i / d z_k`` at every position, of shape ``(N, *, C, C)``.

        Args:
            z: Input ``(N, C, *)``.
        """
        expect_channels(z, self.num_features, type(self).__name__)
        values = wide(z)
        alpha, power, pool = self.alpha, self._power, self._pool(values).movedim(1, -1)
        values = values.movedim(1, -1)
        inner = alpha * values.abs().pow(alpha - 1) * values.sign()
        factors = (power * values * pool.pow(power - 1)).unsqueeze(-1) * self.gamma * inner.unsqueeze(-2)
        return factors + torch.diag_embed(pool.pow(power))

    def log_abs_det_jacobian(self, z: Positions) -> Float[Tensor, "batch ..."]:
        """Logarithm of the volume change at every position, of shape ``(N, *)``.

        Args:
            z: Input ``(N, C, *)``.

        Example:
            >>> GDN(2, gamma_init=0.0).log_abs_det_jacobian(torch.randn(1, 2)).abs() < 1e-6  # the identity
            tensor([True])
        """
        found: Tensor = torch.linalg.slogdet(self.jacobian(z)).logabsdet
        return found

    @torch.no_grad()
    def invert(self, y: Positions, tol: float = 1e-6, max_iter: int = 1000) -> Positions:
        """The exact inverse: what the layer makes ``y`` of.

        By fixed point, ``z <- y / pool(z)^power``. A GDN's outputs are bounded, so not every ``y`` is one.

        Args:
            y: Outputs ``(N, C, *)``.
            tol: Largest change in the last step, relative where values are above 1; 1e-12 suits float64.
            max_iter: Steps at most; the closer to the bound, the more it takes.

        Returns:
            Inputs of the shape and dtype of ``y``.

        Raises:
            InputError: No convergence; the message has the residual. Also what a call raises.

        Example:
            >>> layer = GDN(1)
            >>> layer.invert(layer(torch.tensor([[3.0]]))).round(decimals=4)
            tensor([[3.]])
        """
        expect_channels(y, self.num_features, type(self).__name__)
        z, converged = self._fixed_point(wide(y), tol, max_iter)
        if not bool(converged.all()):
            residual = float((self(z) - wide(y)).abs().max())
            raise InputError(
                f"{type(self).__name__}: expected values that the layer can give, got some that it does not reach: "
                f"after {max_iter} steps the residual is {residual:.1e}; keep to its own outputs, or raise max_iter "
                "near the bound"
            )
        return z.to(y.dtype)

    def _fixed_point(self, y: Positions, tol: float, max_iter: int) -> tuple[Positions, Tensor]:
        """Where the iteration ends, and at which positions ``(N, *)`` it has converged."""
        power = self._power
        beta = self.beta.reshape(-1, *(1,) * (y.dim() - 2))
        z = y * beta.pow(-power)
        settled = torch.zeros_like(y[:, 0], dtype=torch.bool)
        for _ in range(max_iter):
            moved = y * self._pool(z).pow(-power)
            near = (moved - z).abs() <= tol * moved.abs().clamp_min(1.0)
            settled = (near & moved.isfinite()).all(1)
            z = moved
            if bool((settled | ~z.isfinite().all(1)).all()):
                break
        return z, settled

    def extra_repr(self) -> str:
        """Channels, direction and exponents."""
        shown = "" if not self.inverse else ", inverse=True"
        return f"{self.num_features}{shown}, alpha={float(self.alpha):g}, epsilon={float(self.epsilon):g}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """CompressAI keeps the same roots under the names of the values, and its bounds as buffers."""
        for name in ("beta", "gamma"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}raw_{name}"] = state_dict.pop(prefix + name)
            for key in ("pedestal", "lower_bound.bound"):
                state_dict.pop(f"{prefix}{name}_reparam.{key}", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class GDN1(GDN):
    """The cheap form, ``y_i = z_i / (beta_i + sum_j gamma_ij |z_j|)``: a `GDN` with both exponents 1.

    Args:
        num_features: Number of channels C.
        inverse: Multiply instead of dividing.
        beta_min: Lower bound of beta.
        gamma_init: Initial gamma of a channel on itself.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, C, *)``.

    Reference:
        Johnston, Eban, Gordon and Ballé, 2019, "Computationally Efficient Neural Image Compression",
        arXiv 1912.08771.

    Example:
        >>> GDN1(1)(torch.tensor([[10.0]]))
        tensor([[5.]], grad_fn=<MulBackward0>)
    """

    def __init__(
        self,
        num_features: int,
        inverse: bool = False,
        beta_min: float = 1e-6,
        gamma_init: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, inverse, 1.0, 1.0, beta_min, gamma_init, device=device, dtype=dtype)


# parameters with a floor ---------------------------------------------------------------------------------------------


def lower_bound(x: Float[Tensor, "*shape"], bound: float) -> Float[Tensor, "*shape"]:
    """``max(x, bound)``, through which a gradient passes where x is at least the bound, or where it would raise x.

    Args:
        x: Any tensor.
        bound: The least value.

    Returns:
        A tensor of the shape of ``x``.

    Example:
        >>> x = torch.tensor([-1.0, -1.0, 2.0], requires_grad=True)
        >>> torch.autograd.grad(lower_bound(x, 0.0), x, torch.tensor([1.0, -1.0, 1.0]))
        (tensor([ 0., -1.,  1.]),)
    """
    apply = _LowerBound.apply if torch.compiler.is_compiling() else _LowerBoundEager.apply
    bounded: Tensor = apply(x, bound)  # type: ignore[no-untyped-call]
    return bounded


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off where a tensor is, if there is any (the meta device has none).

    >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.ones(1)):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _value(raw: Tensor, minimum: float) -> Tensor:
    """What a stored root stands for."""
    return lower_bound(wide(raw), (minimum + PEDESTAL) ** 0.5).square() - PEDESTAL


class _LowerBound(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, ctx.bound = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * ((x >= ctx.bound) | (gradient < 0)), None


class _LowerBoundEager(_LowerBound):
    """With a rule for forward mode, which a compiler does not accept and does not need."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _bound: None) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = dx * (x >= ctx.bound)
        return passed

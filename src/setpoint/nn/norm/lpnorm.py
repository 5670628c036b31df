"""Lp layer normalization that stays within the range of the numbers it is given, float16 above all.

``y = weight * u / (mean(|u|^p) + eps)^(1/p) + bias`` with ``u = x - mean(x)``: for p = 2 that is LayerNorm, and RMSNorm
where the mean stays in. On a device that has nothing wider than float16, squares overflow beyond 256 and vanish below
2e-4. But the norm does not depend on the length of ``u``: dividing by any positive ``f(u)`` of degree 1 first changes
nothing, and brings what is raised to a power to about 1 (Xu, Jin et al., 2023, arXiv 2312.10359). ``f`` is

* ``"mad"``, the mean of ``|u|``, the paper's. Entries of any usual distribution are then of order 1. A single spike
  among n entries is n (n/2 if the mean is taken off), and its square overflows float16 beyond n = 255 (511).
* ``"max"``, the largest ``|u|``: nothing overflows, but entries far below the largest lose bits.
* ``"guaranteed"``, the first times ``max(1, n (2/M)^(1/p))``, M the largest finite number (half of that if the mean is
  taken off): by the bound on a spike, nothing overflows, whatever comes in, up to n = M entries. The bound is this
  library's derivation.

Unlike other layers here this one computes in the type of its input: staying in it is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_floating, expect_trailing, shape_of
from setpoint.optim.decay import no_weight_decay

Prenorm = Literal["mad", "max", "guaranteed"]
EpsMode = Literal["scaled", "fixed"]
KINDS: tuple[Prenorm, ...] = get_args(Prenorm)


def prenormalize(
    x: Float[Tensor, "*shape"], kind: Prenorm = "mad", dim: int = -1, p: float = 2.0, *, centred: bool = False
) -> Float[Tensor, "*shape"]:
    """Divide vectors by a size of theirs, so that sums of their p-th powers neither overflow nor vanish.

    Args:
        x: Any tensor.
        kind: ``"mad"``, ``"max"`` or ``"guaranteed"``, as the module explains.
        dim: The axis along which vectors run.
        p: The power that ``"guaranteed"`` is to bear.
        centred: The vectors have no mean, so that ``"guaranteed"`` may be half as careful.

    Returns:
        ``x / f(x)`` in the shape and dtype of ``x``; a vector of zeros stays one.

    Raises:
        InputError: An unknown kind.
        TypeError: ``x`` is not floating-point.

    Reference:
        Xu, Jin et al., 2023, arXiv 2312.10359.

    Example:
        >>> prenormalize(torch.tensor([-6.0, 2.0, 1.0]))
        tensor([-2.0000,  0.6667,  0.3333])
    """
    expect_floating(x, "prenormalize")
    _expect_kind(kind, "prenormalize")
    size = _SIZES[kind](x, dim)
    v = x / _nonzero(size)
    return v / _spread(x.shape[dim], p, x.dtype, centred) if kind == "guaranteed" else v


def lp_norm(
    x: Float[Tensor, "... dim"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, " dim"] | None = None,
    bias: Float[Tensor, " dim"] | None = None,
    p: float = 2.0,
    eps: float = 1e-5,
    center: bool = True,
    prenorm: Prenorm | None = "mad",
    eps_mode: EpsMode = "scaled",
) -> Float[Tensor, "... dim"]:
    """Lp layer normalization over the last axes, in the type of its input.

    Args:
        x: Input ``(*, *normalized_shape)``.
        normalized_shape: The sizes normalized over, the last ones of ``x``.
        weight, bias: Gain and addend of shape ``normalized_shape``, None for 1 and 0.
        p: The power.
        eps, center, prenorm, eps_mode: As `LpNorm` explains them.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Reference:
        Xu, Jin et al., 2023, arXiv 2312.10359.

    Example:
        >>> lp_norm(torch.tensor([300.0, 100.0], dtype=torch.float16), 2, eps=0.0)
        tensor([ 1., -1.], dtype=torch.float16)
    """
    shape = shape_of(normalized_shape, "lp_norm")
    expect_trailing(x, shape, "lp_norm")
    if prenorm is not None:
        _expect_kind(prenorm, "lp_norm")
    u = x.flatten(-len(shape))
    if center:
        if prenorm is not None:  # a difference of two numbers may be twice as large as the largest there is
            u, eps = u / 2, eps / 2**p if eps_mode == "scaled" else eps
        u = u - _mean(u)
    y = _plain(u, p, eps) if prenorm is None else _prenormalized(u, p, eps, prenorm, eps_mode, centred=center)
    y = y.reshape(x.shape)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _plain(u: Tensor, p: float, eps: float) -> Tensor:
    return u / _root(_mean_power(u, p) + eps, p)


def _prenormalized(u: Tensor, p: float, eps: float, kind: Prenorm, eps_mode: EpsMode, *, centred: bool) -> Tensor:
    size = _SIZES[kind](u, -1)
    spread = _spread(u.shape[-1], p, u.dtype, centred) if kind == "guaranteed" else 1.0
    if eps_mode == "fixed":
        v = u / _nonzero(size) / spread
        return v / _root(_mean_power(v, p) + eps, p)
    # The result is the same for every f, so it may be kept above eps^(1/p) and be a constant for the gradient.
    least = eps ** (1 / p)
    f = _nonzero(size.detach().clamp_min(least))
    v = u / f / spread
    return v / _root(_mean_power(v, p) + (least / f / spread) ** p, p)


def _mean(x: Tensor) -> Tensor:
    """Divided before it is summed: the sum alone may overflow."""
    return (x / x.shape[-1]).sum(-1, keepdim=True)


def _mean_power(x: Tensor, p: float) -> Tensor:
    return _mean(x * x if p == 2 else x.abs().pow(p))


def _root(x: Tensor, p: float) -> Tensor:
    x = _nonzero(x)  # zero only if all entries are; the root has no slope there
    return x.sqrt() if p == 2 else x.pow(1 / p)


def _nonzero(x: Tensor) -> Tensor:
    """One where a number that is not negative is zero, itself elsewhere; in arithmetic, which an anatomy can read."""
    return x + (-x.sign() + 1)


def _spread(n: int, p: float, dtype: torch.dtype, centred: bool) -> float:
    """By how much more n entries are divided, so that ``|v|^p`` is at most half the largest number even for a spike."""
    bound: float = n * (2 / torch.finfo(dtype).max) ** (1 / p)
    return max(1.0, bound / 2 if centred else bound)


def _mean_absolute(u: Tensor, dim: int) -> Tensor:
    return (u.abs() / u.shape[dim]).sum(dim, keepdim=True)


_SIZES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "mad": _mean_absolute,
    "max": lambda u, dim: u.abs().amax(dim, keepdim=True),
    "guaranteed": _mean_absolute,
}


class LpNorm(nn.Module):
    """Layer normalization by the p-th power, kept in range by a pre-normalizer; computed in the type of its input.

    Args:
        normalized_shape: Sizes of the axes normalized over, or one size for the last axis.
        p: The power, at least 1. With 2 it is LayerNorm, or RMSNorm without ``center``.
        eps: Added to the mean of the powers.
        elementwise_affine: Have ``weight`` (initially 1) and ``bias``.
        bias: Have ``bias`` (initially 0).
        center: Take the mean off first.
        prenorm: What vectors are divided by before their powers are taken: ``"mad"``, ``"max"``, ``"guaranteed"``, or
            None for nothing, which overflows where plain float16 code does.
        eps_mode: ``"scaled"`` divides ``eps`` as the powers are divided, so that outputs are those of a LayerNorm;
            ``"fixed"`` adds it as it is, so that outputs do not depend on the length of the input at all.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(*, *normalized_shape)``.

    Raises:
        InputError: ``p`` below 1, a negative ``eps``, an unknown ``prenorm`` or ``eps_mode``, a size below 1; on call,
            other trailing sizes than ``normalized_shape``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Xu, Jin et al., 2023, "Conformer-Based Speech Recognition On Extreme Edge-Computing Devices", arXiv 2312.10359.

    Example:
        >>> LpNorm(2, dtype=torch.float16)(torch.tensor([300.0, 100.0], dtype=torch.float16)).detach()
        tensor([ 1., -1.], dtype=torch.float16)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        p: float = 2.0,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        center: bool = True,
        prenorm: Prenorm | None = "mad",
        eps_mode: EpsMode = "scaled",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape_of(normalized_shape, "LpNorm")
        if not p >= 1 or eps < 0:
            raise InputError(f"LpNorm: expected p of at least 1 and eps of at least 0, got {p!r} and {eps!r}")
        if prenorm is not None:
            _expect_kind(prenorm, "LpNorm")
        if eps_mode not in get_args(EpsMode):
            raise InputError(f"LpNorm: expected eps_mode to be 'scaled' or 'fixed', got {eps_mode!r}")
        self.p, self.eps = p, eps
        self.elementwise_affine, self.center = elementwise_affine, center
        self.prenorm, self.eps_mode = prenorm, eps_mode
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        addend = torch.empty_like(weight) if weight is not None and bias else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if addend is None else nn.Parameter(addend))
        no_weight_decay(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gain to 1, addend to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Normalize ``(*, *normalized_shape)``; shape and dtype stay."""
        expect_trailing(x, self.normalized_shape, "LpNorm")
        return lp_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.p,
            self.eps,
            self.center,
            self.prenorm,
            self.eps_mode,
        )

    def extra_repr(self) -> str:
        """What it was made with."""
        return (
            f"{self.normalized_shape}, p={self.p}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}, center={self.center}, prenorm={self.prenorm!r}, eps_mode={self.eps_mode!r}"
        )


def _expect_kind(kind: str, layer: str) -> None:
    if kind not in KINDS:
        raise InputError(f"{layer}: expected a pre-normalizer out of {', '.join(KINDS)}, got {kind!r}")

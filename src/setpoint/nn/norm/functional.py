"""Norms as functions, and the pieces that they share.

A norm moves far more bytes than it computes, so what counts is how often its input is read. Under `torch.compile` each
function here becomes one kernel forward and one backward. Three things need a hand:

* The gradient of a gain is, for each channel, a sum over all rows. Written as ``(g * x).sum(0)``, compiled code walks
  down the columns, each step a page of memory further; summed by eights, it walks along the rows (`column_sum`).
* RMS normalization has no kernel on a CPU, where torch runs it as a chain of small operations. Its backward differs
  from that of layer normalization, which has a kernel, by a constant per row (`_backward_by_layer_norm`).
* A vectorized tanh on a CPU costs three times as much as moving its numbers; compiled code takes a quotient of two
  polynomials, which costs little beside the memory (`tanh`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from setpoint.nn.norm.checks import expect_trailing, shape_of

_HALF = (torch.float16, torch.bfloat16)

_TANH_END = 7.8
_TANH_OVER = (0.134567027, 0.00358634778, 2.21517925e-05, 1.5627349e-08)
_TANH_UNDER = (0.467900313, 0.0262198605, 0.000343596876, 8.67540992e-07)
"""Up to `_TANH_END`, where float32 has it at 1, ``tanh(x) = x over(x²) / under(x²)``. Both polynomials start at 1 and
have these coefficients from x² on; they were fitted for the smallest largest relative error (5e-9, then rounding)."""
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_dynamo_compiling)
# Before torch 2.7 nobody says whether a program is kept, and the plain operation is never wrong.


def per_channel(values: Float[Tensor, " channels"], like: Tensor) -> Tensor:
    """A view of one number per channel that goes with maps ``(N, channels, *)``.

    >>> per_channel(torch.ones(3), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([3, 1, 1])
    """
    return values.view(-1, *(1,) * (like.dim() - 2))


def layer_norm(
    x: Float[Tensor, "... dim"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, " dim"] | None = None,
    bias: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... dim"]:
    """`torch.nn.functional.layer_norm`; trained in compiled code on a CPU, twice as fast.

    Args:
        x: Input ``(*, *normalized_shape)``.
        normalized_shape: The sizes normalized over, the last ones of ``x``.
        weight, bias: Gain and addend of shape ``normalized_shape``, None for 1 and 0.
        eps: Added to the variance, inside the root.

    Returns:
        A tensor of the shape of ``x``.

    Example:
        >>> layer_norm(torch.tensor([1.0, 3.0]), 2, eps=0.0)
        tensor([-1.,  1.])
    """
    shape = shape_of(normalized_shape, "layer_norm")
    if (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not _is_exporting()  # a program that is kept had better say layer_norm
        and x.device.type == "cpu"
        and weight is not None
        and weight.dim() == 1
        and x.dtype == weight.dtype
        and x.dtype not in _HALF
    ):
        return scale_shift(F.layer_norm(x, shape, None, None, eps), weight, bias)
    return F.layer_norm(x, shape, weight, bias, eps)


def rms_norm(
    x: Float[Tensor, "... dim"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, " dim"] | None = None,
    bias: Float[Tensor, " dim"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "... dim"]:
    """Divide by the root mean square over the last axes: ``x / sqrt(mean(x²) + eps) * weight + bias``.

    Args:
        x: Input ``(*, *normalized_shape)``. Half precision is computed in float32 and cast back.
        normalized_shape: The sizes normalized over, the last ones of ``x``.
        weight: Gain of shape ``normalized_shape``, None for 1.
        bias: Addend of shape ``normalized_shape``, None for 0; only together with ``weight``.
        eps: Added to the mean square, inside the root.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        InputError: The last axes of ``x`` are not ``normalized_shape``.
        TypeError: ``x`` is not floating-point.

    Reference:
        Zhang and Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), 2, eps=0.0)
        tensor([0.8485, 1.1314])
    """
    shape = shape_of(normalized_shape, "rms_norm")
    expect_trailing(x, shape, "rms_norm")
    gain, shift = (None if p is None else p.flatten() for p in (weight, bias))
    y: Tensor = _entry(_RMSNorm, _RMSNormEager)(x.flatten(-len(shape)), gain, shift, eps)
    return y.reshape(x.shape)


def crms_norm(c: Float[Tensor, "... dim"], eps: float = 1e-5) -> Float[Tensor, "... dim"]:
    """RMS normalization of a zero-mean vector of which the last entry is left out.

    A vector of d entries whose mean is zero ends in minus the sum of the others, so its root mean square is known from
    d - 1 of them: ``c / sqrt((sum(c²) + sum(c)²) / d + eps)``.

    Args:
        c: The first d - 1 entries ``(*, d - 1)``. Half precision is computed in float32 and cast back.
        eps: Added to the mean square, inside the root.

    Returns:
        The first d - 1 entries of the normalized vector, shape and dtype of ``c``.

    Reference:
        Jiang, Gu, Zhu and Pan, 2023, arXiv 2305.14858.

    Example:
        >>> crms_norm(torch.tensor([1.0, 2.0]), eps=0.0)  # of [1, 2, -3]
        tensor([0.4629, 0.9258])
    """
    c32 = wide(c)
    squares = c32.square().sum(-1, keepdim=True) + c32.sum(-1, keepdim=True).square()
    return (c32 * torch.rsqrt(squares / (c.shape[-1] + 1) + eps)).to(c.dtype)


def scale_shift(
    x: Float[Tensor, "... dim"], weight: Float[Tensor, " dim"], bias: Float[Tensor, " dim"] | None = None
) -> Float[Tensor, "... dim"]:
    """``x * weight + bias`` along the last axis, with parameter gradients by `column_sum`.

    Args:
        x: Input ``(*, dim)``.
        weight: Multiplier ``(dim,)``.
        bias: Addend ``(dim,)`` or None.

    Returns:
        A tensor of the shape of ``x``.

    Example:
        >>> scale_shift(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]))
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """
    y: Tensor = _entry(_ScaleShift, _ScaleShiftEager)(x, weight, bias)
    return y


def tanh(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The hyperbolic tangent; in compiled code for a CPU within 5e-7 relative of it, and many times as fast as torch's.

    Args:
        x: Any tensor.

    Returns:
        A tensor of the shape of ``x``.

    Example:
        >>> tanh(torch.tensor([0.0, 0.5, float("inf")]))
        tensor([0.0000, 0.4621, 1.0000])
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype != torch.float64:
        return _RationalTanh.apply(x)  # type: ignore[no-untyped-call, no-any-return]
    return torch.tanh(x)


def masked_moments(
    x: Float[Tensor, "batch channels time"], mask: Bool[Tensor, "batch time"]
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"], Tensor]:
    """Mean and biased variance of each channel over the positions where ``mask`` is true.

    Two passes: the variance is taken around the mean, as ``E[x²] - E[x]²`` cancels where the mean is large.

    Args:
        x: Values ``(batch, channels, time)``.
        mask: True at real positions ``(batch, time)``.

    Returns:
        Mean ``(channels,)``, variance ``(channels,)`` in at least float32, and the number of real positions. Without
        any, mean and variance are zero.

    Example:
        >>> x, mask = torch.tensor([[[1.0, 3.0, 99.0]]]), torch.tensor([[True, True, False]])
        >>> [t.tolist() for t in masked_moments(x, mask)]
        [[2.0], [1.0], 2]
    """
    real = mask.unsqueeze(1)
    count = mask.sum()
    values = torch.where(real, wide(x), 0.0)
    mean = values.sum((0, 2)) / count.clamp_min(1)
    centred = torch.where(real, values - mean[:, None], 0.0)
    return mean, centred.square().sum((0, 2)) / count.clamp_min(1), count


def wide(x: Tensor) -> Tensor:
    """The tensor in at least float32, in which statistics are taken.

    >>> wide(torch.ones(2, dtype=torch.float16)).dtype, wide(torch.ones(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in _HALF else x


def column_sum(x: Float[Tensor, "... dim"]) -> Float[Tensor, " dim"]:
    """Sum over all axes but the last, in compiled code by eights where they divide evenly.

    >>> column_sum(torch.ones(4, 32, 3))
    tensor([128., 128., 128.])
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if torch.compiler.is_compiling() and rows.shape[0] >= 128 and rows.shape[0] % 64 == 0:
        for _ in range(2):
            rows = rows.view(-1, 8, rows.shape[-1]).sum(1)  # so few that the compiler writes them out in a row
    return rows.sum(0)


class _ScaleShift(torch.autograd.Function):
    """``x * weight + bias``; the backward is made of differentiable operations and so can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            gradient * weight,
            column_sum(gradient * x).to(weight.dtype),
            column_sum(gradient).to(weight.dtype) if ctx.has_bias else None,
        )


class _ScaleShiftEager(_ScaleShift):
    """With a rule for forward mode, which a compiler does not accept and does not need."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dweight: Tensor, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        dy: Tensor = dx * weight + x * dweight
        return dy if dbias is None else dy + dbias


class _RationalTanh(torch.autograd.Function):
    """Two polynomials and a division, in at least float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        z = wide(x).clamp(-_TANH_END, _TANH_END)
        square = z * z
        return (z * _one_and(square, _TANH_OVER) / _one_and(square, _TANH_UNDER)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t: Tensor = _RationalTanh.forward(x)  # computing it again is cheaper than storing it
        # A slope that is no more than t's rounding error would count where a large x multiplies it.
        return gradient * torch.where(x.abs() < _TANH_END, 1 - t * t, 0.0)


class _RMSNorm(torch.autograd.Function):
    """RMS normalization over the last axis. It keeps its input and nothing else for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        xhat = wide(x) * _reciprocal_rms(wide(x), eps)
        if weight is None:
            return xhat.to(x.dtype)
        y = xhat * weight if bias is None else torch.addcmul(bias, xhat, weight)
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, weight, bias, eps = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        ctx.has_bias, ctx.eps = bias is not None, eps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if _kernel_fits(x, weight, gradient):
            dx, dweight = _backward_by_layer_norm(gradient, x, weight, ctx.eps)
        else:
            dx, dweight = _backward(gradient, x, weight, ctx.eps)
        dbias = column_sum(wide(gradient)).to(weight.dtype) if ctx.has_bias else None
        return dx, dweight, dbias, None


class _RMSNormEager(_RMSNorm):
    """With a rule for forward mode, which a compiler does not accept and does not need."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dweight: Tensor, dbias: Tensor | None, _eps: None) -> Tensor:
        x, weight = ctx.saved_tensors
        r = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + ctx.eps)
        xhat = wide(x) * r
        dy = r * (dx - xhat * (xhat * dx).mean(-1, keepdim=True))
        if weight is not None:
            dy = dy * weight + xhat * dweight
        return (dy if dbias is None else dy + dbias).to(x.dtype)


def _one_and(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial ``1 + c₁ x + c₂ x² + …``."""
    y = coefficients[-1] * x
    for coefficient in reversed(coefficients[:-1]):
        y = (y + coefficient) * x
    return y + 1


def _entry(compiled: type[torch.autograd.Function], eager: type[torch.autograd.Function]) -> Callable[..., Any]:
    """How to call a function where it runs; without gradients as plain operations, which a tracer can read."""
    if not torch.is_grad_enabled():
        return compiled.forward
    return compiled.apply if torch.compiler.is_compiling() else eager.apply


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass over x where square().mean() takes three
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


def _backward(gradient: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """With ``x̂ = r x`` and ``h = g · weight``: ``dx = r (h - x̂ mean(h x̂))`` and ``dweight = Σ g x̂``."""
    g, x32 = wide(gradient), wide(x)
    r = torch.rsqrt(
        x32.square().mean(-1, keepdim=True) + eps
    )  # not by a norm, whose second derivative at 0 is undefined
    xhat = x32 * r
    h = g if weight is None else g * weight
    dx = r * (h - xhat * (h * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), None if weight is None else column_sum(g * xhat).to(weight.dtype)


def _backward_by_layer_norm(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """The same by the kernel of layer normalization, told that the mean is zero.

    That kernel computes ``r (h - mean(h) - x̂ mean(h x̂))``; ``r mean(h)`` is added back.
    """
    dim = x.shape[-1]
    r = _reciprocal_rms(x, eps)
    dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, x, [dim], torch.zeros_like(r), r, weight, None, [True, True, False]
    )
    dx.add_((gradient @ weight).unsqueeze(-1).mul_(r).div_(dim))
    return dx, dweight


def _kernel_fits(x: Tensor, weight: Tensor | None, gradient: Tensor) -> bool:
    """Where the kernel may stand in: eager CPU code in one full precision.

    Compiled code fuses the formula by itself. A backward pass that is to be differentiated again needs the formula: the
    kernel's own derivative takes mean and scale for those of a layer norm.
    """
    return (
        weight is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == gradient.dtype
        and x.dtype not in _HALF
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )

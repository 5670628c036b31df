"""Online normalization: channels by running statistics, sample by sample, so that a batch of one will do.

Sample t is normalized by the mean and variance that the samples before it left behind (Chiley, Sharapov, Kosson,
Koster, Reece, Samaniego de la Fuente, Subbiah and James, 2019, arXiv 1905.05894). With ``a = alpha_fwd`` and the mean
``mu`` and variance ``var`` of a sample over space:

    ``y = (x - m) / sqrt(s2 + eps)``,  then
    ``s2 <- a s2 + (1 - a) var + a (1 - a) (mu - m)²``  and  ``m <- m + (1 - a) (mu - m)``.

Two control variables keep the gradient orthogonal to y and to the ones on average over time, as a batch norm's is.
With ``b = alpha_bkw`` and ``g`` the gradient at y, samples again in order:

    ``g' = g - (1 - b) v y``,  ``v <- v + mean(g' y)``,
    ``dx = g' / sqrt(s2 + eps) - (1 - b) u``,  ``u <- u + mean(dx)``.

All four are linear recurrences, ``state <- decay * state + term``, so that a batch takes log2(N) vectorized steps
(`_recur`) instead of N. Statistics lag behind by a sample, so outputs can blow up in deep nets; a guard behind gain and
addend prevents it: layer scaling, or clamping.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import rms_norm, wide
from setpoint.nn.norm.stateful import (
    Controlled,
    StatefulNorm,
    expect_decays,
    expect_first_pass,
    expect_one_backward,
)


class _OnlineNorm(StatefulNorm):
    dims: ClassVar[tuple[int, ...]]
    m: Tensor
    var: Tensor
    u: Tensor
    v: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        ecm: Literal["ls", "ac"] | None = "ls",
        ls_eps: float = 1e-5,
        clamp_val: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        expect_decays(type(self).__name__, alpha_fwd=alpha_fwd, alpha_bkw=alpha_bkw)
        if ecm not in ("ls", "ac", None):
            raise InputError(
                f"{type(self).__name__}: expected ecm to be 'ls' (layer scaling), 'ac' (clamping) or None, got {ecm!r}"
            )
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.ecm = ecm
        self.ls_eps = ls_eps
        self.clamp_val = clamp_val
        for name in ("m", "var", "u", "v"):
            self._add_state(name, num_features)
        self.reset_parameters()

    def reset_state(self) -> None:
        """Mean and control variables to 0, variance to 1."""
        for buffer in (self.m, self.u, self.v):
            buffer.zero_()
        self.var.fill_(1.0)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalize ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.num_features, type(self).__name__, self.dims)
        values = wide(x).reshape(*x.shape[:2], x.shape[2:].numel())
        if self.training and x.numel():
            expect_first_pass(type(self).__name__)
            y: Tensor = _Online.apply(values, *self._advance(values.detach()), self.u, self.v, 1 - self.alpha_bkw)  # type: ignore[no-untyped-call]
        else:
            y = (values - self.m[:, None]) * torch.rsqrt(self.var + self.eps)[:, None]
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias[:, None], y, self.weight[:, None])
        return self._guard(y.reshape(x.shape)).to(x.dtype)

    @torch.no_grad()
    def _advance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation that each sample ``(N, C, space)`` is normalized by; the state moves on."""
        a = torch.full_like(x[..., 0], self.alpha_fwd)
        variance, mean = torch.var_mean(x, -1, correction=0)
        before, after = _recur(a, (1 - a) * mean, self.m)
        variances, last = _recur(a, (1 - a) * variance + a * (1 - a) * (mean - before).square(), self.var)
        self.m.copy_(after)
        self.var.copy_(last)
        return before, torch.rsqrt(variances + self.eps)

    def _guard(self, y: Tensor) -> Tensor:
        if self.ecm == "ls":
            return rms_norm(y.flatten(1), y.shape[1:].numel(), eps=self.ls_eps).view_as(y) if y.numel() else y
        return y if self.ecm is None else y.clamp(-self.clamp_val, self.clamp_val)

    @torch.no_grad()
    def average_state(self) -> None:
        """Give every process of `torch.distributed` the state of all samples together, for instance before saving.

        Each process normalizes by its own samples until then. The variance becomes that of the pooled samples, the
        spread of the processes' means included. (DistributedDataParallel copies the buffers of process 0 to the others
        before every call; with ``broadcast_buffers=False`` each keeps its own.) Without processes nothing happens.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        moments = torch.stack([self.m, self.var + self.m.square(), self.u, self.v])
        dist.all_reduce(moments)
        mean, square, u, v = moments / dist.get_world_size()
        self.m.copy_(mean)
        self.var.copy_(square - mean.square())
        self.u.copy_(u)
        self.v.copy_(v)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in ("m", "var", "u", "v"):  # the official layers keep them in a part of their own
            if f"{prefix}norm.{name}" in state_dict:
                state_dict[prefix + name] = state_dict.pop(f"{prefix}norm.{name}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Channels, decays, eps and the guard."""
        return (
            f"{self.num_features}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, eps={self.eps}, "
            f"affine={self.affine}, ecm={self.ecm!r}"
        )


class OnlineNorm1d(_OnlineNorm):
    """Online normalization of vectors or sequences; its backward pass is a rule with a memory.

    Decays count samples, whatever the batch size, and samples are taken in the order of the batch. A sample whose
    statistics overflow leaves them as they are; control variables that overflow start again at 0. Each process of
    `torch.distributed` has a state of its own; see ``average_state``. With a gradient scaler the control variables hold
    scaled gradients; prefer bfloat16, which needs none.

    A recipe for batch norm with batches of B moves to B' by ``momentum' = momentum ** (B' / B)`` and
    ``lr' = lr * (B' / B) * (1 - momentum') / (1 - momentum)``.

    Args:
        num_features: Number of channels C.
        alpha_fwd: Weight of the old value in mean and variance, per sample; 0.999 forgets over a thousand samples.
        alpha_bkw: The same for the control variables; 1 switches the control off.
        eps: Added to the variance, inside the root.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0).
        ecm: What guards against outliers, in evaluation too: ``"ls"`` divides each example by the root mean square of
            its features (the paper's choice), ``"ac"`` clamps (what the official layers do unless told otherwise),
            None does nothing.
        ls_eps: Added to the mean square for ``"ls"``, inside the root.
        clamp_val: Largest absolute output for ``"ac"``.
        device, dtype: Of the parameters; the state stays in float32.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)``.

    Raises:
        InputError: A decay outside 0 to 1, another word for ``ecm``; on call, another number of channels or axes, a
            call from activation checkpointing; in the backward pass, a second one through a call, or
            ``create_graph=True``.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Chiley et al., 2019, "Online Normalization for Training Neural Networks", arXiv 1905.05894.

    Example:
        >>> layer = OnlineNorm1d(1, alpha_fwd=0.9, eps=0.0, ecm=None)
        >>> layer(torch.tensor([[1.0], [3.0], [2.0]])).detach().flatten()
        tensor([1.0000, 2.9146, 1.2542])
    """

    dims = (2, 3)


class OnlineNorm2d(_OnlineNorm):
    """Online normalization of images ``(N, C, H, W)``; arguments as for `OnlineNorm1d`.

    Reference:
        Chiley et al., 2019, "Online Normalization for Training Neural Networks", arXiv 1905.05894.

    Example:
        >>> OnlineNorm2d(3)(torch.randn(1, 3, 4, 4)).shape
        torch.Size([1, 3, 4, 4])
    """

    dims = (4,)


class OnlineNorm3d(_OnlineNorm):
    """Online normalization of volumes ``(N, C, D, H, W)``; arguments as for `OnlineNorm1d`.

    Reference:
        Chiley et al., 2019, "Online Normalization for Training Neural Networks", arXiv 1905.05894.

    Example:
        >>> OnlineNorm3d(3)(torch.randn(1, 3, 2, 4, 4)).shape
        torch.Size([1, 3, 2, 4, 4])
    """

    dims = (5,)


class _Online(Controlled):
    """``(x - mean) * scale`` sample by sample; its backward pass is the paper's control process."""

    @staticmethod
    def forward(x: Tensor, mean: Tensor, scale: Tensor, _u: Tensor, _v: Tensor, _new: float) -> Tensor:
        return (x - mean[..., None]) * scale[..., None]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, scale, ctx.u, ctx.v, ctx.new = inputs
        ctx.save_for_backward(output, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        expect_one_backward(ctx, "OnlineNorm")
        y, scale = ctx.saved_tensors
        v, last_v = _recur(1 - ctx.new * y.square().mean(-1), (g * y).mean(-1), ctx.v)
        g = g - ctx.new * v[..., None] * y
        u, last_u = _recur(torch.full_like(scale, 1 - ctx.new), g.mean(-1) * scale, ctx.u)
        ctx.v.copy_(last_v)
        ctx.u.copy_(last_u)
        return g * scale[..., None] - ctx.new * u[..., None], None, None, None, None, None


def _recur(decay: Tensor, term: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The states of ``state <- decay * state + term`` before each sample, and the last one.

    After k steps each entry stands for the composition of 2**k neighbouring updates. What is not finite is left out.

    >>> half = torch.full((3, 1), 0.5)
    >>> before, last = _recur(half, torch.ones(3, 1), torch.zeros(1))
    >>> before.flatten().tolist(), last.tolist()
    ([0.0, 1.0, 1.5], [1.75])
    """
    good = decay.isfinite() & term.isfinite()
    decay, term = torch.where(good, decay, 1.0), torch.where(good, term, 0.0)
    term = torch.cat([term[:1] + decay[:1] * start, term[1:]])
    reach = 1
    while reach < term.shape[0]:
        term = torch.cat([term[:reach], term[reach:] + decay[reach:] * term[:-reach]])
        decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
        reach *= 2
    states = torch.where(term.isfinite(), term, 0.0)
    return torch.cat([start[None], states[:-1]]), states[-1]

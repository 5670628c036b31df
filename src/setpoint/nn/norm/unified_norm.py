"""Unified normalization: channels by smoothed quadratic means, so that it folds into the next layer for inference.

In evaluation it is an affine map per channel, like batch norm, without batch norm's collapse in transformers (Yang,
Zhang, Lan, Yang, Li, Tan, Xiao and Pu, 2022, arXiv 2208.01313):

* no mean is taken off; ``z = x / sqrt(s + eps)`` and ``y = weight * z + bias``;
* ``s`` is the geometric mean of the quadratic means of the last few batches, and the gradient's correction an
  arithmetic mean over as many;
* where the window is too uneven for that (arithmetic minus geometric mean beyond ``window * theta``, with ``theta`` the
  variance of the window's roots), an outlier filter falls back to the batch's own value;
* where ``s`` and the running average of evaluation differ, by ``r = sqrt(s + eps) / sqrt(running_var + eps)``, the
  gradient is scaled by ``r``.

With ``g = dL/dy * weight * r``: ``dx = (g - z * ema_gz) / sqrt(s + eps)``, ``ema_gz`` the smoothed mean of ``g * z``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.functional import column_sum, wide
from setpoint.nn.norm.stateful import (
    Controlled,
    StatefulNorm,
    expect_decays,
    expect_first_pass,
    expect_one_backward,
    fold_into_linear,
    mean_over_positions,
    real_positions,
)

LOCKED = 1000
"""Calls during which ``r`` is 1 at least, however short the warm-up; a constant of the official code."""
LARGEST = 5.0
"""The most by which ``r`` scales a gradient up or down."""


class UnifiedNorm(StatefulNorm):
    """Unified normalization of tokens; its backward pass is a rule with a memory.

    Under `torch.distributed` its statistics are those of all processes (the official code keeps them apart). A batch
    that is all padding, or whose squares overflow, leaves the state as it is, and the running average stands in for
    its statistics.

    Args:
        num_features: Number of channels C.
        window_size: Batches to smooth over, or a pair for the forward and the backward pass; 1 for none.
        warmup_iters: Training calls before anything is smoothed.
        outlier_filtration: Skip the smoothing where the window is uneven; advised for images, not for text.
        eps: Added to the quadratic mean, inside the root.
        momentum: Weight of the *old* value in the running averages.
        device, dtype: Of the parameters; the state stays in float32.

    Shape:
        Input and output ``(N, C)`` or ``(N, *, C)``, ``pad_mask`` ``(N, *)``, true at padding. The mask keeps padding
        out of the forward statistics; the gradient's average is over all positions, as in the official code.

    Raises:
        InputError: A window below 1 or of more than two sizes, a momentum outside 0 to 1; on call, another number of
            channels, a mask of another shape, a call from activation checkpointing; in the backward pass, a second one
            through a call, or ``create_graph=True``.
        TypeError: On call, an input that is not floating-point, a mask that is not boolean.

    Reference:
        Yang, Zhang, Lan, Yang, Li, Tan, Xiao and Pu, 2022, "Unified Normalization for Accelerating and Stabilizing
        Transformers", arXiv 2208.01313.

    Example:
        >>> layer = UnifiedNorm(1)
        >>> layer(torch.tensor([[3.0], [4.0]])).flatten().tolist()  # divided by sqrt(12.5), their quadratic mean
        [0.848..., 1.131...]
        >>> layer.running_var  # 0.9 * 1 + 0.1 * 12.5
        tensor([2.1500])
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    iters: Tensor
    skip_counter: Tensor

    left_behind: ClassVar[str] = ""
    """Name of the part that stays in its place once its affine map is in the weights that read it; none does."""

    def __init__(
        self,
        num_features: int,
        window_size: int | Sequence[int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, True, device, dtype)
        expect_decays("UnifiedNorm", momentum=momentum)
        windows = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if len(windows) != 2 or min(windows) < 1:
            raise InputError(
                "UnifiedNorm: expected window_size to be a positive whole number or a pair of them (forward, "
                f"backward), got {window_size!r}; the paper uses 4"
            )
        self.window_size = windows
        self.warmup_iters = warmup_iters
        self.outlier_filtration = outlier_filtration
        self.momentum = momentum
        for name in ("running_var", "ema_gz"):
            self._add_state(name, num_features)
        for name, window in zip(("buffer_x2", "buffer_gz"), windows, strict=True):
            self._add_state(name, window, num_features)
        for name in ("iters", "skip_counter"):
            self._add_count(name)
        self.reset_parameters()

    def reset_state(self) -> None:
        """Running quadratic mean to 1, everything else to 0."""
        for buffer in (self.ema_gz, self.buffer_x2, self.buffer_gz, self.iters, self.skip_counter):
            buffer.zero_()
        self.running_var.fill_(1.0)

    def reset_warmup(self) -> None:
        """Go through the warm-up again, as its authors advise for fine-tuning; the averages stay."""
        self.iters.zero_()

    def forward(
        self, x: Float[Tensor, "batch ... channels"], pad_mask: Bool[Tensor, "batch ..."] | None = None
    ) -> Float[Tensor, "batch ... channels"]:
        """Normalize ``(N, *, C)``; without a mask every position is real."""
        real = real_positions(x, pad_mask, self.num_features, "UnifiedNorm")
        if not self.training:
            scale = torch.rsqrt(self.running_var + self.eps) * self.weight
            return torch.addcmul(self.bias, wide(x), scale).to(x.dtype)
        expect_first_pass("UnifiedNorm")
        with torch.no_grad():
            x2, count = mean_over_positions(wide(x).square(), real)
            s, r, calls, skip, usable = self._smooth(x2, count)
        y: Tensor = _Unified.apply(  # type: ignore[no-untyped-call]
            wide(x), self.weight, self.bias, torch.rsqrt(s + self.eps), r, calls, skip, usable, self
        )
        return y.to(x.dtype)

    def _smooth(self, x2: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Move the forward state by one batch.

        Returns:
            The quadratic mean to divide by, the gradient's scale, the number of this call, whether the smoothing was
            skipped, and whether the batch could be used at all.
        """
        usable = (count > 0).squeeze() & x2.isfinite().all()
        calls = self.iters + usable
        window, floor = self.window_size[0], torch.finfo(x2.dtype).tiny  # the logarithm of a dead channel is finite
        slot = torch.arange(window, device=x2.device)[:, None] == calls % window
        ring = torch.where(slot, x2.clamp_min(floor), self.buffer_x2)
        geometric = ring.log().mean(0).exp()
        skip = outlier = torch.zeros_like(usable)
        if window == 1:
            skip = ~skip
        elif self.outlier_filtration:
            theta = self.buffer_x2.sqrt().var()  # one number, over all channels and the window before this batch
            outlier = (calls >= self.warmup_iters) & (ring.mean(0) - geometric > window * theta).any()
            ring = torch.where(slot & outlier, self.running_var, ring)
            skip = outlier
        own = (calls <= window) | (calls < self.warmup_iters) | skip
        s = torch.where(usable, torch.where(own, x2, geometric), self.running_var)
        r = torch.sqrt((s + self.eps) / (self.running_var + self.eps)).clamp(1 / LARGEST, LARGEST)
        r = torch.where((calls <= max(LOCKED, self.warmup_iters)) | skip, 1.0, r)
        running = self.momentum * self.running_var + (1 - self.momentum) * s
        self.running_var.copy_(torch.where(usable, running, self.running_var))
        self.buffer_x2.copy_(torch.where(usable, ring, self.buffer_x2))
        self.skip_counter.add_(outlier & usable)
        self.iters.copy_(calls)
        return s, r, calls, skip, usable

    def inference_affine(self) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """``(scale, shift)`` of the affine map that it is in evaluation."""
        scale = torch.rsqrt(self.running_var + self.eps) * self.weight.detach()
        return scale, self.bias.detach().to(scale)

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """The linear layer to put in place of this norm and the one behind it, for evaluation.

        Args:
            linear: The layer that reads this norm and nothing else.

        Returns:
            A new layer with a bias.

        Raises:
            TypeError: Not an `nn.Linear`.
            InputError: It reads another number of channels.

        Example:
            >>> norm, linear, x = UnifiedNorm(4).eval(), nn.Linear(4, 2), torch.randn(3, 4)
            >>> bool(torch.allclose(norm.fold_into(linear)(x), linear(norm(x)), atol=1e-6))
            True
        """
        return fold_into_linear(*self.inference_affine(), linear)

    def extra_repr(self) -> str:
        """Channels, window, length of the warm-up and the rest of the arguments."""
        return (
            f"{self.num_features}, window_size={self.window_size}, warmup_iters={self.warmup_iters}, "
            f"outlier_filtration={self.outlier_filtration}, eps={self.eps}, momentum={self.momentum}"
        )


class _Unified(Controlled):
    """``weight * x * scale + bias``, and the corrected gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, *_: Any) -> Tensor:
        return torch.addcmul(bias, x * scale, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        x, weight, _, scale, r, calls, skip, usable, ctx.layer = inputs
        ctx.save_for_backward(x, weight, scale, r, calls, skip, usable)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        expect_one_backward(ctx, "UnifiedNorm")
        x, weight, scale, r, calls, skip, usable = ctx.saved_tensors
        layer: UnifiedNorm = ctx.layer
        z, ema, ring, window = x * scale, layer.ema_gz, layer.buffer_gz, layer.window_size[1]
        g = gradient * (weight * r)
        gz, _ = mean_over_positions(g * z, None)
        gz = torch.where(gz.isfinite(), gz, ema)
        slot = torch.arange(window, device=x.device)[:, None] == calls % window
        ring = torch.where(slot & usable, torch.where(skip, ema, gz), ring)
        own = (calls <= window) | (calls < layer.warmup_iters) | skip
        mean = torch.where(own, gz, ring.mean(0))
        moved = torch.where(usable, layer.momentum * ema + (1 - layer.momentum) * mean, ema)
        layer.ema_gz.copy_(moved)
        layer.buffer_gz.copy_(ring)
        dx = (g - z * torch.where(skip, mean, moved)) * scale
        dweight = column_sum(gradient * z) * r
        return dx, dweight.to(weight.dtype), column_sum(gradient).to(weight.dtype), *(None,) * 6

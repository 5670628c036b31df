"""Power normalization: each channel by a running quadratic mean, in training as in evaluation.

Batch statistics of text vary so much from batch to batch that batch norm computes one function in training and another
in evaluation. Power normalization leaves the mean in, and divides by a running average already in training (Shen, Yao,
Gholami, Mahoney and Keutzer, 2020, arXiv 2003.07845):

1. `GroupScaling` divides each token by its root mean square, in groups of channels.
2. ``z = x / sqrt(phi + eps)`` and ``y = weight * z + bias``, with the quadratic mean ``q`` of the batch for ``phi``
   during warm-up, and after it the running average as it was before the call.

The running average is no function of the batch, so the gradient lacks what batch norm's has: to be orthogonal to z. An
average over earlier calls takes its place: with ``h`` the gradient at z,

    ``a = h - (1 - alpha_bkw) * ema_gz * z``,  ``ema_gz += mean(a * z)``,  ``dx = a / sqrt(q + eps)``.

Evaluation is an affine map, which folds into the weight behind it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing
from setpoint.nn.norm.functional import rms_norm, wide
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


class GroupScaling(nn.Module):
    """Divide each group of a token's channels by its root mean square.

    Args:
        num_features: Number of channels C.
        group_num: Number of groups; the number of attention heads in the paper.
        eps: Added to the mean square, inside the root.

    Shape:
        Input and output ``(*, C)``.

    Raises:
        InputError: ``num_features`` does not divide into ``group_num`` groups; on call, another number of channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Shen, Yao, Gholami, Mahoney and Keutzer, 2020, "PowerNorm", arXiv 2003.07845.

    Example:
        >>> GroupScaling(4, 2)(torch.tensor([1.0, 1.0, 3.0, -3.0])).round(decimals=3)
        tensor([ 1.,  1.,  1., -1.])
    """

    def __init__(self, num_features: int, group_num: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        if num_features < 1 or group_num < 1 or num_features % group_num:
            raise InputError(
                f"GroupScaling: expected num_features to divide into group_num equal groups, got {num_features} and "
                f"{group_num}; use the number of attention heads, or 1"
            )
        self.num_features = num_features
        self.group_num = group_num
        self.eps = eps

    def forward(self, x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
        """Scale ``(*, C)``; shape and dtype stay."""
        expect_trailing(x, (self.num_features,), "GroupScaling")
        size = self.num_features // self.group_num
        groups = x.reshape(*x.shape[:-1], self.group_num, size)
        return rms_norm(groups, size, eps=self.eps).flatten(-2)

    def extra_repr(self) -> str:
        """Channels, groups and eps."""
        return f"{self.num_features}, group_num={self.group_num}, eps={self.eps}"


class PowerNorm(StatefulNorm):
    """Power normalization of tokens; its backward pass is a rule with a memory.

    The paper has it in encoders and keeps layer norm in decoders. Under `torch.distributed` its statistics are those
    of all processes. A batch that is all padding, or whose squares overflow, leaves the state as it is, and the
    running average stands in for its statistics. ``iters`` counts calls: load it with a checkpoint, and zero it
    (`reset_warmup`) for a warm-up in fine-tuning. With a gradient scaler the control variable holds scaled gradients;
    prefer bfloat16, which needs none.

    Args:
        num_features: Number of channels C.
        eps: Added to the quadratic mean, inside the root.
        alpha_fwd: Weight of the old value in the running quadratic mean.
        alpha_bkw: The same for the gradient's correction; 1 switches that off.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0).
        warmup_iters: Training calls that use the batch's own quadratic mean; the paper's nets use the length of the
            learning rate's warm-up.
        group_num: Groups of the scaling in front, None to leave it out.
        exact_backward_scale: Divide the gradient by what the input was divided by, as in the paper's algorithm, instead
            of always by the batch's own value, as in its code.
        official_padding: Let padding into the gradient's average, as the official code does.
        device, dtype: Of the parameters; the state stays in float32.

    Shape:
        Input and output ``(N, C)`` or ``(N, *, C)``, ``pad_mask`` ``(N, *)``, true at padding.

    Raises:
        InputError: ``num_features`` does not divide into ``group_num`` groups, a decay outside 0 to 1; on call, another
            number of channels, a mask of another shape, a call from activation checkpointing; in the backward pass, a
            second one through a call, or ``create_graph=True``.
        TypeError: On call, an input that is not floating-point, a mask that is not boolean.

    Reference:
        Shen, Yao, Gholami, Mahoney and Keutzer, 2020, "PowerNorm: Rethinking Batch Normalization in Transformers",
        arXiv 2003.07845.

    Example:
        >>> layer = PowerNorm(1, group_num=None)
        >>> layer(torch.tensor([[3.0], [4.0]])).flatten().tolist()  # divided by sqrt(12.5), their quadratic mean
        [0.848..., 1.131...]
        >>> layer.running_phi
        tensor([12.5000])
    """

    running_phi: Tensor
    ema_gz: Tensor
    iters: Tensor

    left_behind: ClassVar[str] = "scaling"
    """Name of the part that stays in its place once its affine map is in the weights that read it."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        affine: bool = True,
        warmup_iters: int = 4000,
        group_num: int | None = 1,
        exact_backward_scale: bool = False,
        official_padding: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        expect_decays(type(self).__name__, alpha_fwd=alpha_fwd, alpha_bkw=alpha_bkw)
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.warmup_iters = warmup_iters
        self.exact_backward_scale = exact_backward_scale
        self.official_padding = official_padding
        self.scaling = nn.Identity() if group_num is None else GroupScaling(num_features, group_num, eps)
        self._add_state("running_phi", num_features)
        self._add_state("ema_gz", num_features)
        self._add_count("iters")
        self.reset_parameters()

    def reset_state(self) -> None:
        """Running quadratic mean to 1, the gradient's average and the count of calls to 0."""
        self.running_phi.fill_(1.0)
        self.ema_gz.zero_()
        self.iters.zero_()

    def reset_warmup(self) -> None:
        """Go through the warm-up again, for instance to fine-tune; the averages stay."""
        self.iters.zero_()

    def forward(
        self, x: Float[Tensor, "batch ... channels"], pad_mask: Bool[Tensor, "batch ..."] | None = None
    ) -> Float[Tensor, "batch ... channels"]:
        """Normalize ``(N, *, C)``; without a mask every position is real."""
        real = real_positions(x, pad_mask, self.num_features, type(self).__name__)
        values = wide(self.scaling(x))
        if self.training:
            expect_first_pass(type(self).__name__)
            z = self._normalize(values, real)
        else:
            z = values * torch.rsqrt(self.running_phi + self.eps)
        if self.weight is not None and self.bias is not None:
            z = torch.addcmul(self.bias, z, self.weight)
        return z.to(x.dtype)

    def _normalize(self, x: Tensor, real: Tensor | None) -> Tensor:
        with torch.no_grad():
            q, some = self._quadratic_mean(x, real)
            warm = self.iters + some <= self.warmup_iters
            divided_by = torch.where(warm, q, self.running_phi)
            backward = torch.rsqrt((divided_by if self.exact_backward_scale else q) + self.eps)
            self._track(q, some)
        counted = None if self.official_padding else real
        forward = torch.rsqrt(divided_by + self.eps)
        z: Tensor = _Power.apply(x, forward, backward, self.ema_gz, counted, 1 - self.alpha_bkw)  # type: ignore[no-untyped-call]
        return z

    def _quadratic_mean(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the batch, or the running one where that has none; and whether the batch has any real position."""
        q, count = mean_over_positions(x.square(), real)
        some = count > 0
        return torch.where(some & q.isfinite(), q, self.running_phi), some.squeeze()

    @torch.no_grad()
    def _track(self, q: Tensor, some: Tensor) -> None:
        self.iters.add_(some)
        calls, phi = self.iters.clamp_min(1).to(q), self.running_phi
        # The official code averages in two ways at once while it warms up, plainly over all calls and exponentially.
        plain = phi * ((calls - 1) / calls) + q / calls
        phi = torch.where(self.iters < self.warmup_iters, plain, phi)
        new = self.alpha_fwd * phi + (1 - self.alpha_fwd) * q
        self.running_phi.copy_(torch.where(some, new, self.running_phi))

    def inference_affine(self) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """``(scale, shift)`` of the affine map that it is in evaluation, behind the group scaling."""
        scale = torch.rsqrt(self.running_phi + self.eps)
        if self.weight is None or self.bias is None:
            return scale, torch.zeros_like(scale)
        return scale * self.weight.detach(), self.bias.detach().to(scale)

    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """The linear layer to put in place of this norm and the one behind it, for evaluation.

        The group scaling can't fold; keep ``layer.scaling`` in front.

        Args:
            linear: The layer that reads this norm and nothing else.

        Returns:
            A new layer with a bias.

        Raises:
            TypeError: Not an `nn.Linear`.
            InputError: It reads another number of channels.

        Example:
            >>> norm, linear, x = PowerNorm(4).eval(), nn.Linear(4, 2), torch.randn(3, 4)
            >>> folded = nn.Sequential(norm.scaling, norm.fold_into(linear))
            >>> bool(torch.allclose(folded(x), linear(norm(x)), atol=1e-6))
            True
        """
        return fold_into_linear(*self.inference_affine(), linear)

    def extra_repr(self) -> str:
        """Channels, eps, decays and the length of the warm-up."""
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, "
            f"affine={self.affine}, warmup_iters={self.warmup_iters}"
        )


class PowerNormV(PowerNorm):
    """The paper's PN-V: training always divides by the batch's own quadratic mean, with its exact gradient.

    Quadratic-mean batch norm, with a running average for evaluation. It has no rule of its own for the backward pass,
    so ``alpha_bkw`` and ``ema_gz`` have no effect. Arguments as for `PowerNorm`.

    Reference:
        Shen, Yao, Gholami, Mahoney and Keutzer, 2020, arXiv 2003.07845.

    Example:
        >>> PowerNormV(1, group_num=None)(torch.tensor([[3.0], [4.0]])).flatten().tolist()
        [0.848..., 1.131...]
    """

    def _normalize(self, x: Tensor, real: Tensor | None) -> Tensor:
        q, some = self._quadratic_mean(x, real)
        self._track(q.detach(), some)
        return x * torch.rsqrt(q + self.eps)


class _Power(Controlled):
    """``x * forward``; its backward pass keeps the gradient orthogonal to the result on average over calls."""

    @staticmethod
    def forward(
        x: Tensor, forward: Tensor, _backward: Tensor, _ema_gz: Tensor, _real: Tensor | None, _new: float
    ) -> Tensor:
        return x * forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, backward, ctx.ema_gz, real, ctx.new = inputs
        ctx.save_for_backward(output, backward, real)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
        expect_one_backward(ctx, "PowerNorm")
        z, scale, real = ctx.saved_tensors
        a = h - ctx.new * ctx.ema_gz * z
        gradient = a * scale
        mean, _ = mean_over_positions(a * z, real)
        ctx.ema_gz.add_(torch.where(mean.isfinite(), mean, 0.0))
        return gradient, None, None, None, None, None

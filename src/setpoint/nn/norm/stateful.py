"""What the norms share whose state moves in training, and in the backward pass too.

Online, power and unified normalization divide by statistics of earlier calls and correct the gradient by running
averages of earlier gradients. So their backward pass is a rule with a memory and no derivative: it runs once for each
forward pass, can't be differentiated, and a forward pass may not be computed again. Where that is asked of them they
refuse in words (`expect_first_pass`, `expect_one_backward`). Statistics over a batch are taken over all processes of
`torch.distributed` (`mean_over_positions`), so that the state stays the same in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_trailing
from setpoint.nn.norm.functional import column_sum, wide

_HALF = (torch.float16, torch.bfloat16)


class StatefulNorm(nn.Module):
    """A norm with gain and addend per channel, whose buffers stay in float32 when the model goes to half precision.

    Running averages move by thousandths of themselves, which bfloat16 and float16 round away.

    Args:
        num_features: Number of channels C.
        eps: Added to the statistic, inside the root.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0).
        device, dtype: Of the parameters; the state is in float32, or float64 for float64.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_features, int) or num_features < 1:
            raise InputError(
                f"{type(self).__name__}: expected num_features to be a positive whole number, got {num_features!r}; "
                "give the number of channels"
            )
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)
        self._device, self._dtype = device, wide(torch.empty(0, dtype=dtype)).dtype

    def _add_state(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.empty(shape, device=self._device, dtype=self._dtype))

    def _add_count(self, name: str) -> None:
        self.register_buffer(name, torch.empty((), device=self._device, dtype=torch.long))

    def reset_state(self) -> None:
        """The state as before the first call."""
        raise TypeError(f"{type(self).__name__} has no reset_state(); write one")

    def reset_parameters(self) -> None:
        """Gain to 1, addend to 0, the state as before the first call."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        self.reset_state()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in _HALF:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Official checkpoints hold the same numbers with axes of size one around them."""
        for name, own in self._buffers.items():
            given = state_dict.get(prefix + name)
            if own is not None and given is not None and given.numel() == own.numel():
                state_dict[prefix + name] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def real_positions(
    x: Float[Tensor, "*positions channels"], pad_mask: Bool[Tensor, "*positions"] | None, channels: int, layer: str
) -> Bool[Tensor, "*positions"] | None:
    """Check an input ``(*, channels)`` and its padding mask ``(*)``, true at padding; the mask of what is real.

    Raises:
        InputError: Another number of channels, fewer than two axes, or a mask of another shape.
        TypeError: An input that is not floating-point, a mask that is not boolean.
    """
    expect_trailing(x, (channels,), layer)
    if x.dim() < 2:
        raise InputError(
            f"{layer}: expected an input of shape (N, *, {channels}), got {tuple(x.shape)}; the statistics are taken "
            "over a batch, so add an axis for it in front"
        )
    if pad_mask is None:
        return None
    if pad_mask.dtype != torch.bool:
        raise TypeError(
            f"{layer}: expected a boolean pad_mask, true at padding, got {pad_mask.dtype}; use pad_mask.bool()"
        )
    if pad_mask.shape != x.shape[:-1]:
        raise InputError(
            f"{layer}: expected a pad_mask of shape {tuple(x.shape[:-1])} for an input of shape {tuple(x.shape)}, got "
            f"{tuple(pad_mask.shape)}; give one entry per position"
        )
    return ~pad_mask


def mean_over_positions(
    values: Float[Tensor, "*positions channels"], real: Bool[Tensor, "*positions"] | None
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " one"]]:
    """Mean of each channel over the positions where ``real`` is true, on all processes, and their number.

    Without any position the mean is zero.

    >>> mean_over_positions(torch.tensor([[1.0], [3.0], [99.0]]), torch.tensor([True, True, False]))
    (tensor([2.]), tensor([2.]))
    """
    if real is None:
        total = column_sum(values)
        count = values.new_full((1,), values.shape[:-1].numel())
    else:
        total = column_sum(torch.where(real.unsqueeze(-1), values, 0.0))
        count = real.sum().reshape(1).to(values.dtype)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce  # not there in a build without processes

        summed: Tensor = all_reduce(torch.cat([total, count]))  # type: ignore[no-untyped-call]
        total, count = summed[:-1], summed[-1:]
    return total / count.clamp_min(1), count


def mean_over_examples(
    values: Float[Tensor, "batch ..."], together: bool
) -> tuple[Float[Tensor, ...], Float[Tensor, " one"] | int]:
    """Mean over the first axis, with ``together`` over the examples of all processes, and their number.

    Without any example the mean is zero.

    >>> mean_over_examples(torch.tensor([[1.0], [3.0]]), together=False)
    (tensor([2.]), 2)
    """
    if together:
        mean, examples = mean_over_positions(values.flatten(1), None)
        return mean.view(values.shape[1:]), examples
    return values.sum(0) / max(len(values), 1), len(values)


def fold_into_linear(scale: Float[Tensor, " in"], shift: Float[Tensor, " in"], linear: nn.Linear) -> nn.Linear:
    """The linear layer that does to ``x`` what ``linear`` does to ``scale * x + shift``.

    ``W' = W diag(scale)`` and ``b' = b + W shift``, computed in float64.

    Raises:
        TypeError: Not an `nn.Linear`.
        InputError: It reads another number of channels.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected the torch.nn.Linear that reads the norm, got {type(linear).__name__}")
    if linear.in_features != scale.numel():
        raise InputError(
            f"expected a linear layer that reads {scale.numel()} features, got one that reads {linear.in_features}; "
            "give the layer right behind the norm"
        )
    weight = linear.weight
    folded = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype)
    exact = weight.detach().double()
    with torch.no_grad():
        folded.weight.copy_(exact * scale.double())
        added = exact @ shift.double()
        folded.bias.copy_(added if linear.bias is None else added + linear.bias.double())
    return folded.train(linear.training)


def expect_decays(layer: str, **decays: float) -> None:
    """Decay factors between 0 and 1.

    Raises:
        InputError: One that isn't.
    """
    for name, value in decays.items():
        if not 0 <= value <= 1:
            raise InputError(f"{layer}: expected {name} between 0 and 1, the weight of the old value, got {value!r}")


# a backward pass with a memory ---------------------------------------------------------------------------------------


class Controlled(torch.autograd.Function):
    """A function whose backward pass moves state."""

    @staticmethod
    def vmap(*_: Any) -> Any:
        """Refused: each example would move the one state by itself."""
        raise InputError(
            "expected a call on a whole batch, got one under torch.func.vmap, where every example would move the state "
            "of the norm; use eval(), or vmap over what lies outside it"
        )


def expect_first_pass(layer: str) -> None:
    """A training call that isn't made from a backward pass.

    Raises:
        InputError: It is, as activation checkpointing makes it.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise InputError(
            f"{layer}: expected a call outside the backward pass, got one within it; activation checkpointing computes "
            "calls again, which would move the state of this norm twice: leave it out of what is checkpointed"
        )


def expect_one_backward(ctx: Any, layer: str) -> None:
    """The first backward pass through a call, not itself to be differentiated.

    Raises:
        InputError: It is the second, or comes with ``create_graph=True``.
    """
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise InputError(
            f"{layer}: expected a backward pass without create_graph, got one that is to be differentiated again; its "
            "rule has a memory and no second derivative: use another norm for gradient penalties"
        )
    if getattr(ctx, "spent", False):
        raise InputError(
            f"{layer}: expected one backward pass for each call, got a second, which would move its state twice; sum "
            "the losses and go backward once"
        )
    ctx.spent = True

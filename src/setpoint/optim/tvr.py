"""Target Variance Rescaling: shrink a weight matrix whenever its spread has outgrown a target.

Every few optimizer steps, for each matrix in a block: if ``std(W) > threshold * target``, then

    W  <-  (W - mean) / std * target + mean        and its bias becomes 0.

Nothing is ever scaled up. Embeddings, head and norms are not in blocks and stay; the optimizer's state is not touched.
With depth scaling the target of layer l is ``target / sqrt(l)``. It works against weight decay and schedules, so look
at how often it fires (``fired``).

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setpoint.errors import InputError

if TYPE_CHECKING:
    from setpoint.train import Run


class TargetVarianceRescaler:
    """Keeps the spread of the weight matrices in a model's blocks at or below a target, as it trains.

    Call `step` after each optimizer step, or pass the object to `setpoint.train.train` among the callbacks.

    Args:
        blocks: The model, whose blocks are its longest list of equal modules; or the blocks themselves, first to last.
            None for the model that a training loop brings.
        target_std: Spread that a matrix is brought to. 0.02 as published, 0.01 for a Llama of 1 B parameters.
        ratio_threshold: How far above the target the spread must be, as a factor.
        interval: Optimizer steps between looks.
        scale_with_depth: Whether the target of layer l (counted from 1) is divided by sqrt(l).

    Raises:
        InputError: A setting that makes no sense, or no blocks to be found.

    Reference:
        Owen et al., 2025, arXiv 2503.22329.

    Example:
        >>> block = nn.Linear(32, 32)
        >>> with torch.no_grad():
        ...     _ = block.weight.normal_(std=0.1)
        >>> rescaler = TargetVarianceRescaler([block], target_std=0.02, interval=1)
        >>> rescaler.step(), round(block.weight.std().item(), 6), rescaler.step()
        (1, 0.02, 0)
    """

    def __init__(
        self,
        blocks: nn.Module | Sequence[nn.Module] | None = None,
        target_std: float = 0.02,
        ratio_threshold: float = 1.2,
        interval: int = 50,
        scale_with_depth: bool = False,
    ) -> None:
        if not target_std > 0:
            raise InputError(f"expected target_std above 0, got {target_std}")
        if not ratio_threshold >= 1:
            raise InputError(f"expected ratio_threshold from 1 on (it only ever shrinks), got {ratio_threshold}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise InputError(f"expected interval to be a whole number of steps from 1 on, got {interval!r}")
        self.blocks = None if blocks is None else _blocks(blocks)
        self.target_std = target_std
        self.ratio_threshold = ratio_threshold
        self.interval = interval
        self.scale_with_depth = scale_with_depth
        self.steps = 0
        self.fired = 0

    def step(self) -> int:
        """Count an optimizer step, and look at the weights if it is one of every ``interval``.

        Returns:
            How many matrices were rescaled.
        """
        self.steps += 1
        return self.rescale() if self.steps % self.interval == 0 else 0

    @torch.no_grad()
    def rescale(self) -> int:
        """Look at the weights now.

        Returns:
            How many matrices were rescaled.
        """
        if self.blocks is None:
            raise InputError("no model yet: give TargetVarianceRescaler its model, or pass it to a training loop")
        count, seen = 0, set[int]()
        for layer, block in enumerate(self.blocks, start=1):
            target = self.target_std / layer**0.5 if self.scale_with_depth else self.target_std
            for weight, bias in _matrices(block):
                if id(weight) not in seen and self._shrink(weight, bias, target):
                    count += 1
                seen.add(id(weight))
        self.fired += count
        return count

    def _shrink(self, weight: Tensor, bias: Tensor | None, target: float) -> bool:
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        std, mean = wide.std(), wide.mean()
        if not bool(std / target > self.ratio_threshold):
            return False
        weight.copy_((wide - mean) / std * target + mean)
        if bias is not None:
            bias.zero_()
        return True

    # as a callback ---------------------------------------------------------------------------------------------------

    def on_start(self, run: Run) -> None:
        """Take the loop's model, unless blocks were given."""
        if self.blocks is None:
            self.blocks = _blocks(run.model)

    def on_step(self, run: Run) -> None:
        """Count with the loop, so that a resumed run looks at the steps at which an uninterrupted one would."""
        self.steps = run.step - 1
        self.step()


def _blocks(given: nn.Module | Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    if isinstance(given, nn.ModuleList):
        return tuple(given)
    if not isinstance(given, nn.Module):
        blocks = tuple(given)
        wrong = next((b for b in blocks if not isinstance(b, nn.Module)), None)
        if not blocks or wrong is not None:
            raise InputError(f"expected blocks (modules), got {type(wrong).__name__ if blocks else 'none'}")
        return blocks
    lists: list[list[nn.Module]] = [
        list(module.children())
        for module in given.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(c) for c in module.children()}) == 1
    ]
    if not lists:
        raise InputError(
            f"{type(given).__name__} has no list of equal modules that could be its blocks; give them: "
            "TargetVarianceRescaler([block, block, …])"
        )
    longest: list[nn.Module] = max(lists, key=len)
    return tuple(longest)


def _matrices(block: nn.Module) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Weight matrices with the bias that goes with each."""
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and name.endswith("weight"):
                bias = getattr(module, name.removesuffix("weight") + "bias", None)
                yield parameter, bias if isinstance(bias, Tensor) else None

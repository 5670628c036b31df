"""Target Variance Rescaling: shrink a weight matrix whenever its spread has outgrown a target.

Every few optimizer steps, for each matrix in a block: if ``std(W) > threshold * target``, then

    W  <-  (W - mean) / std * target + mean        and its bias becomes 0.

Nothing is ever scaled up. Embeddings, head and norms stay; the optimizer's state is not touched. With depth scaling the
target of layer l is ``target / sqrt(l)``. It works against weight decay and schedules, so look at how often it fires
(``fired``).

The paper has one target for all matrices. They end training at different spreads, though, and at another width at
others; `matrix_spreads` measures what each kind of matrix of a trained model came to, and a share of that can be the
target: ``target_std={name: 0.5 * std for name, std in matrix_spreads(trained).items()}``.

Reference: Owen et al., 2025, "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.optim.decay import is_decayed

if TYPE_CHECKING:
    from setpoint.train import Run


class TargetVarianceRescaler:
    """Keeps the spread of the weight matrices in a model's blocks at or below a target, as it trains.

    Call `step` after each optimizer step, or pass the object to `setpoint.train.train` among the callbacks.

    Args:
        blocks: The model, whose blocks are its longest list of equal modules outside any other such list (both, where
            an encoder and a decoder are equally deep); or the blocks themselves, first to last. None for the model
            that a training loop brings.
        target_std: Spread that a matrix is brought to. 0.02 as published, 0.01 for a Llama of 1 B parameters. A mapping
            gives each kind of matrix its own, by its name within a block (``"attention.query.weight"``); kinds that
            it does not name are left alone.
        ratio_threshold: How far above the target the spread must be, as a factor.
        interval: Optimizer steps between looks.
        scale_with_depth: Whether the target of layer l (counted from 1) is divided by sqrt(l).

    Raises:
        InputError: A setting that makes no sense, no blocks to be found, or a name that no matrix in them has.

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
        target_std: float | Mapping[str, float] = 0.02,
        ratio_threshold: float = 1.2,
        interval: int = 50,
        scale_with_depth: bool = False,
    ) -> None:
        targets = target_std.values() if isinstance(target_std, Mapping) else (target_std,)
        if not targets or not all(target > 0 for target in targets):
            raise InputError(f"expected target_std above 0, got {target_std}")
        if not ratio_threshold >= 1:
            raise InputError(f"expected ratio_threshold from 1 on (it only ever shrinks), got {ratio_threshold}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise InputError(f"expected interval to be a whole number of steps from 1 on, got {interval!r}")
        self._layers: list[tuple[int, nn.Module]] | None = None
        self.target_std = target_std
        self.ratio_threshold = ratio_threshold
        self.interval = interval
        self.scale_with_depth = scale_with_depth
        self.steps = 0
        self.fired = 0
        if blocks is not None:
            self._take(blocks)

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
        if self._layers is None:
            raise InputError("no model yet: give TargetVarianceRescaler its model, or pass it to a training loop")
        count, seen = 0, set[int]()
        for layer, block in self._layers:
            share = 1 / layer**0.5 if self.scale_with_depth else 1.0
            for name, weight, bias in _matrices(block):
                target = self.target_std.get(name) if isinstance(self.target_std, Mapping) else self.target_std
                if target is None or id(weight) in seen:
                    continue
                seen.add(id(weight))
                count += self._shrink(weight, bias, target * share)
        self.fired += count
        return count

    def _take(self, given: nn.Module | Iterable[nn.Module]) -> None:
        layers = _layers(given)
        if isinstance(self.target_std, Mapping):
            known = {name for _, block in layers for name, _, _ in _matrices(block)}
            for name in self.target_std:
                if name not in known:
                    listed = ", ".join(nearest(name, known)) or "none"
                    raise InputError(f"no matrix in a block is called {name!r}; there is {listed}")
        self._layers = layers

    def _shrink(self, weight: Tensor, bias: Tensor | None, target: float) -> bool:
        exact = _wide(weight)
        std, mean = exact.std(), exact.mean()
        if not bool(std / target > self.ratio_threshold):
            return False
        weight.copy_((exact - mean) / std * target + mean)
        if bias is not None:
            bias.zero_()
        return True

    # as a callback ---------------------------------------------------------------------------------------------------

    def on_start(self, run: Run) -> None:
        """Take the loop's model, unless blocks were given."""
        if self._layers is None:
            self._take(run.model)

    def on_step(self, run: Run) -> None:
        """Count with the loop, so that a resumed run looks at the steps at which an uninterrupted one would."""
        self.steps = run.step - 1
        self.step()


@torch.no_grad()
def matrix_spreads(blocks: nn.Module | Sequence[nn.Module]) -> dict[str, float]:
    """How far the matrices in a model's blocks are spread, by their names within a block.

    Args:
        blocks: A model or its blocks, as for `TargetVarianceRescaler`.

    Returns:
        Name of a matrix in a block -> standard deviation of its entries, the mean over the blocks that have it.

    Raises:
        InputError: No blocks to be found.

    Example:
        >>> blocks = [nn.Linear(32, 32, bias=False) for _ in range(2)]
        >>> for block, std in zip(blocks, (0.1, 0.3)):
        ...     _ = nn.init.normal_(block.weight, std=std)
        >>> {name: round(std, 1) for name, std in matrix_spreads(blocks).items()}
        {'weight': 0.2}
    """
    found: dict[str, list[float]] = {}
    for _, block in _layers(blocks):
        for name, weight, _ in _matrices(block):
            found.setdefault(name, []).append(float(_wide(weight).std()))
    return {name: sum(spreads) / len(spreads) for name, spreads in found.items()}


def _layers(given: nn.Module | Iterable[nn.Module]) -> list[tuple[int, nn.Module]]:
    """Blocks with their numbers, from 1."""
    if isinstance(given, nn.ModuleList) or not isinstance(given, nn.Module):
        blocks = tuple(given)
        wrong = next((b for b in blocks if not isinstance(b, nn.Module)), None)
        if not blocks or wrong is not None:
            raise InputError(f"expected blocks (modules), got {type(wrong).__name__ if blocks else 'none'}")
        return list(enumerate(blocks, start=1))
    lists = list(_outermost_lists(given))
    if not lists:
        raise InputError(
            f"{type(given).__name__} has no list of equal modules that could be its blocks; give them: "
            "TargetVarianceRescaler([block, block, …])"
        )
    # Blocks have parts; a list of plain layers is blocks only if there is no other (else it is heads, say).
    lists = [blocks for blocks in lists if any(blocks[0].children())] or lists
    longest = max(map(len, lists))
    return [layer for blocks in lists if len(blocks) == longest for layer in enumerate(blocks, start=1)]


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Lists of equal modules that hold matrices; not those inside the modules of another (experts, heads)."""
    children = tuple(module.children())
    inner = [found for child in children for found in _outermost_lists(child)]
    listed = isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in children}) == 1
    wraps = isinstance(module, nn.Sequential) and len(children) == 1 and inner
    if listed and not wraps and any(True for child in children for _ in _matrices(child)):
        yield children
    else:
        yield from inner


def _matrices(block: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Weight matrices by their names in the block, with the bias that goes with each; no tables and no norms."""
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            table = isinstance(module, nn.Embedding) or not is_decayed(module, name)
            if parameter.dim() == 2 and name.endswith("weight") and not table:
                bias = getattr(module, name.removesuffix("weight") + "bias", None)
                yield f"{path}.{name}".lstrip("."), parameter, bias if isinstance(bias, Tensor) else None


def _wide(weight: Tensor) -> Tensor:
    """In at least float32."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))

"""Membrane potential batch normalization: give every spiking neuron one, and fold it into the thresholds when trained.

`PotentialNorms` puts `setpoint.nn.MPBNLIF` in the place of every `setpoint.nn.LIF`, to be trained from there.
`PotentialFolding` turns the trained ones back into plain neurons, whose thresholds hold the norm; they fire alike, at
the cost of plain ones.

Reference: Guo, Zhang, Chen, Peng, Liu, Zhang, Huang and Ma, 2023, "Membrane Potential Batch Normalization for Spiking
Neural Networks", arXiv 2308.08359.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from setpoint.fixes.norm_sites import needs
from setpoint.fixing.base import Refused
from setpoint.nn import LIF, MPBNLIF
from setpoint.running import untouched
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class PotentialNorms:
    """Normalize the potential of every LIF neuron before it fires; the model must be trained afterwards.

    Reference:
        Guo et al., 2023, arXiv 2308.08359.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Linear(4, 8), LIF(), nn.Linear(8, 2))
        >>> fix(model, PotentialNorms(), [torch.randn(3, 5, 4)]).model[1].bn
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    id: ClassVar[str] = "mpbn"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs LIF neurons; a model of MPBNLIF neurons is done."""
        if anatomy.has(MPBNLIF) and not anatomy.has(LIF):
            return Refusal("", "its LIF neurons are normalized already; there is nothing to do", done=True)
        return needs(anatomy, LIF, "LIF neurons", "normalize")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Neurons with a norm of as many channels as came in."""
        neurons = {path: module for path, module in ctx.model.named_modules() if isinstance(module, LIF)}
        channels = _channels(ctx, neurons)
        sample = next((p for p in ctx.model.parameters() if p.is_floating_point()), torch.empty(0))
        edits: list[Edit] = []
        for path, neuron in neurons.items():
            if neuron.threshold_shape:
                raise Refused(self.id, Refusal(path, "has a threshold for each channel, which a norm would take over"))
            if len(channels[path]) != 1:
                seen = ", ".join(map(str, sorted(channels[path]))) or "none"
                raise Refused(self.id, Refusal(path, f"needs one number of channels on axis 2, and saw {seen}"))
            arguments: dict[str, Any] = {
                "num_features": channels[path].pop(),
                "tau": neuron.tau,
                "v_threshold": float(neuron.v_threshold),
                "k": neuron.k,
            }
            edits.append(Edit(path, Build("setpoint.nn:MPBNLIF", arguments), "the potential is normalized"))
            # A plain neuron has no parameter whose dtype the new ones could take.
            fresh = nn.BatchNorm1d(arguments["num_features"], device=sample.device, dtype=sample.dtype)
            edits += [
                Edit(f"{path}.bn.{name}", tensor, "in the dtype of the model")
                for name, tensor in fresh.state_dict().items()
                if tensor.is_floating_point()
            ]
        return edits


@dataclass(frozen=True)
class PotentialFolding:
    """Fold the norm of every MPBNLIF neuron into its thresholds; exact.

    Reference:
        Guo et al., 2023, arXiv 2308.08359.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Linear(4, 8), MPBNLIF(8), nn.Linear(8, 2)).eval()
        >>> fix(model, PotentialFolding(), [torch.randn(3, 5, 4)]).model[1]
        LIF((8,), tau=0.25, k=3.0)
    """

    id: ClassVar[str] = "mpbn-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs MPBNLIF neurons."""
        return needs(anatomy, MPBNLIF, "MPBNLIF neurons", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Plain neurons, with a threshold and a sign for each channel."""
        neurons = {path: module for path, module in ctx.model.named_modules() if isinstance(module, MPBNLIF)}
        edits: list[Edit] = []
        for path, neuron in neurons.items():
            folded = deepcopy(neuron).eval().fold()
            arguments = {"threshold_shape": list(folded.threshold_shape), "tau": folded.tau, "k": folded.k}
            edits += [
                Edit(path, Build("setpoint.nn:LIF", arguments), "its norm is in the thresholds"),
                Edit(f"{path}.v_threshold", folded.v_threshold, "folded"),
                Edit(f"{path}.sign", folded.sign, "folded"),
            ]
        return edits


def _channels(ctx: FixContext, neurons: dict[str, LIF]) -> dict[str, set[int]]:
    """The sizes of axis 2 that come to each neuron."""
    seen: dict[str, set[int]] = {path: set() for path in neurons}

    def noted(path: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].dim() > 2:
                seen[path].add(inputs[0].shape[2])

        return hook

    hooks = [neuron.register_forward_pre_hook(noted(path)) for path, neuron in neurons.items()]
    try:
        with untouched(ctx.model):
            ctx.forward(ctx.model, ctx.batches[0])
    finally:
        for handle in hooks:
            handle.remove()
    return seen

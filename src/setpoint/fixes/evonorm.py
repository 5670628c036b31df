"""EvoNorm in the place of every pair of a batch norm and an activation, to be trained from there.

Where an activation follows a `torch.nn.BatchNorm2d`, a layer of `setpoint.nn.EvoNorm2dS0`'s family takes the place of
both. Where none does, as at the end of a residual branch, gain and addend are all that the method leaves; they start as
the affine map that the norm was in evaluation.

Reference: Liu, Brock, Simonyan and Le, 2020, "Evolving Normalization-Activation Layers", arXiv 2004.02967.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from torch import Tensor, nn

import setpoint.nn
from setpoint.errors import InputError
from setpoint.fixes.norm_sites import needs_batch_norms
from setpoint.fixing.base import Refused
from setpoint.nn.norm.functional import wide
from setpoint.running import untouched
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy
    from setpoint.surgery.graph import Graph

Version = Literal["B0", "B1", "B2", "S0", "S1", "S2"]


@dataclass(frozen=True)
class EvoNorms:
    """Replace every batch norm of images, with the activation behind it; the model must be trained afterwards.

    Args:
        version: The layer: S0 for small batches, B0 for large ones.
        group_size: Channels in a group of the S series; 8 are the paper's 32 groups of 256 channels.

    Reference:
        Liu, Brock, Simonyan and Le, 2020, arXiv 2004.02967.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> fix(model, EvoNorms(), [torch.randn(2, 3, 8, 8)]).model[1:]
        Sequential(
          (1): EvoNorm2dS0(16, groups=2, apply_act=True, eps=1e-05)
          (2): Identity()
        )
    """

    version: Version = "S0"
    group_size: int = 8

    id: ClassVar[str] = "evonorm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if self.version not in get_args(Version) or self.group_size < 1:
            raise InputError(
                f"expected version to be one of {', '.join(get_args(Version))} and group_size of at least 1, got "
                f"{self.version!r} and {self.group_size}"
            )

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs batch norms."""
        return needs_batch_norms(anatomy, "replace", getattr(setpoint.nn, f"EvoNorm2d{self.version}"))

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A layer for every norm, and the identity for the activation behind it."""
        norms = {path: m for path, m in ctx.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        if not norms:
            raise Refused(self.id, Refusal("", "none of its batch norms is a BatchNorm2d, and EvoNorm takes images"))
        graph = _graph(ctx)
        edits: list[Edit] = []
        for path, norm in norms.items():
            activation = self._activation_behind(graph, path, norm)
            edits += self._layer(path, norm, activation is not None)
            if activation is not None:
                edits.append(Edit(activation, Build("torch.nn:Identity"), "the activation is in the norm"))
        return edits

    def _activation_behind(self, graph: Graph, path: str, norm: nn.BatchNorm2d) -> str | None:
        """Name of the module that activates what a norm gives, None if nothing does.

        Raises:
            Refused: It can't be taken away alone.
        """
        from setpoint.surgery.activations import activation_behind
        from setpoint.surgery.ops import ACTIVATIONS

        if type(norm) is not nn.BatchNorm2d:
            raise Refused(self.id, Refusal(path, f"is a {type(norm).__name__}, and torch's BatchNorm2d is replaced"))
        runs = [call for call in graph.tape.calls if call.name == path]
        if len(runs) != 1:
            raise Refused(self.id, Refusal(path, f"ran {len(runs)} times, and what follows one use can be replaced"))
        value = runs[0].outputs[0]
        readers = graph.readers[value.index]
        behind = activation_behind(graph, value)
        if behind is None:
            if any(node.op in ACTIVATIONS for node in readers):
                raise Refused(self.id, Refusal(path, "is read by an activation and by something else"))
            return None
        call = readers[0].call
        alone = [value] == call.inputs and [behind[1]] == call.outputs and not call.children
        if not call.name or not alone:
            reason = f"has a {behind[0]} behind it that is no module; make it one in your code, as nn.ReLU is"
            raise Refused(self.id, Refusal(path, reason))
        if sum(other.name == call.name for other in graph.tape.calls) != 1:
            reason = (
                f"has {call.name} behind it, which activates elsewhere too; give each norm an activation of its own"
            )
            raise Refused(self.id, Refusal(path, reason))
        return call.name

    def _layer(self, path: str, norm: nn.BatchNorm2d, activated: bool) -> list[Edit]:
        arguments: dict[str, Any] = {"num_features": norm.num_features, "apply_act": activated}
        if self.version.startswith("S"):
            if norm.num_features % self.group_size:
                reason = f"has {norm.num_features} channels, which are no multiple of group_size={self.group_size}"
                raise Refused(self.id, Refusal(path, reason))
            arguments["group_size"] = self.group_size
        elif norm.momentum is not None:
            arguments["momentum"] = norm.momentum
        edits = [Edit(path, Build(f"setpoint.nn:EvoNorm2d{self.version}", arguments), "norm and activation in one")]
        if not activated:
            scale, shift = _affine(norm)
            edits += [
                Edit(f"{path}.weight", scale, "as in evaluation"),
                Edit(f"{path}.bias", shift, "as in evaluation"),
            ]
        elif self.version.startswith("B") and norm.running_var is not None:
            edits.append(Edit(f"{path}.running_var", wide(norm.running_var).clone(), "the batch norm's"))
        return edits


def _graph(ctx: FixContext) -> Graph:
    from setpoint.surgery.graph import Graph
    from setpoint.surgery.tape import record

    with untouched(ctx.model):
        return Graph(record(ctx.model, ctx.batches[0], ctx.forward))


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and addend of what a norm does in evaluation, in the dtype of its parameters."""
    some = next((t for t in (norm.weight, norm.running_mean) if t is not None), None)
    like = nn.BatchNorm2d(norm.num_features).weight if some is None else some.detach()
    mean = like.new_zeros(norm.num_features) if norm.running_mean is None else norm.running_mean
    variance = like.new_ones(norm.num_features) if norm.running_var is None else norm.running_var
    scale = (wide(variance) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -wide(mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach()
    return scale.to(like), shift.to(like)

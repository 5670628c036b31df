"""Fold weights: a plain tensor where a model computes a weight from others at every use; for inference, exact.

Weight normalization, weight conditioning, weight standardization, spectral norm: whatever `torch.nn.utils.parametrize`
holds, of setpoint or of others. Speech models often come with it (the positional convolution of Wav2Vec2, vocoders).
The layer gets back its plain class, so that it can be quantized, exported and pickled. Weights that are shared stay
shared.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from setpoint.fixes.norm_sites import needs
from setpoint.fixing.base import Refused
from setpoint.nn.weight.reparametrize import parametrized, plain
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@dataclass(frozen=True)
class FoldWeights:
    """Replace every parametrized weight by the tensor that it stands for in evaluation; exact.

    Reference:
        Salimans and Kingma, 2016, "Weight Normalization", arXiv 1602.07868.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> from setpoint.nn import weight_norm
        >>> model = nn.Sequential(weight_norm(nn.Linear(8, 4)), nn.ReLU())
        >>> fix(model, FoldWeights(), [torch.randn(3, 8)]).model[0]
        Linear(in_features=8, out_features=4, bias=True)
    """

    id: ClassVar[str] = "fold-weights"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs such weights."""
        return needs(anatomy, ParametrizationList, "parametrized weight", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """For every layer with such a weight one of its plain class, and its tensors."""
        paths = {module: path for path, module in ctx.model.named_modules()}
        values: dict[nn.Module, Tensor] = {}
        folded: dict[nn.Module, dict[str, Tensor]] = {}
        for module, name in parametrized(ctx.model):
            original = _original(module, name)
            folded.setdefault(module, {})[name] = values.setdefault(original, plain(module, name))
        edits: list[Edit] = []
        for module, tensors in folded.items():
            path = paths[module]
            if not path:
                reason = "is the whole model, which can't be replaced; use setpoint.nn.fold_weights"
                raise Refused(self.id, Refusal(path, reason))
            edits.append(Edit(path, _plain_layer(self.id, path, module), "its weight is a plain tensor"))
            kept = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            edits += [
                Edit(f"{path}.{name}", tensor, "folded" if name in tensors else "kept")
                for name, tensor in {**kept, **tensors}.items()
            ]
        return edits


def _original(module: Any, name: str) -> nn.Module:
    found: nn.Module = module.parametrizations[name]
    return found


def _plain_layer(fix: str, path: str, module: nn.Module) -> Build:
    """The layer that it was before, described by the arguments that it keeps as attributes."""
    own: type[Any] = type(module).__bases__[0]
    # torch's own layers have private subclasses that compute the same, such as the output projection of its attention
    public = [k for k in own.__mro__ if getattr(nn, k.__name__, None) is k and k.forward is own.forward]
    takes = inspect.signature(own).parameters
    known = [name for name in takes if name not in ("device", "dtype") and not name.startswith("_")]
    if not (own.__module__.startswith("torch.nn.") and public and all(hasattr(module, name) for name in known)):
        reason = f"is of the class {own.__name__}, which is not torch.nn's own; use setpoint.nn.fold_weights"
        raise Refused(fix, Refusal(path, reason))
    arguments = {name: getattr(module, name) for name in known}
    if "bias" in arguments:
        arguments["bias"] = arguments["bias"] is not None
    return Build(f"torch.nn:{public[0].__name__}", arguments)

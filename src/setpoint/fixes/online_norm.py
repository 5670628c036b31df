"""Online normalization in the place of every batch norm, for training with batches that are too small for one.

Where a batch norm stands, a `setpoint.nn.OnlineNorm1d`, ``2d`` or ``3d`` takes its place and starts from its running
averages, gain and addend. What follows the affine map is new, the guard against outliers, so that a trained model
computes something else until it is trained again; without a guard (``ecm="none"``) evaluation stays as it was.

A recipe made for batches of B moves to B' by ``momentum' = momentum ** (B' / B)`` and
``lr' = lr * (B' / B) * (1 - momentum') / (1 - momentum)``.

Reference: Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah and James, 2019, "Online
Normalization for Training Neural Networks", arXiv 1905.05894.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from setpoint.errors import InputError
from setpoint.fixes.norm_sites import needs_batch_norms
from setpoint.fixing.base import Refused
from setpoint.nn import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

LAYERS = {nn.BatchNorm1d: OnlineNorm1d, nn.BatchNorm2d: OnlineNorm2d, nn.BatchNorm3d: OnlineNorm3d}


@dataclass(frozen=True)
class OnlineNorms:
    """Replace every batch norm by online normalization; the model must be trained afterwards.

    Args:
        alpha_fwd: Weight of the old value in mean and variance, per sample; 0.999 forgets over a thousand samples.
        alpha_bkw: The same for the gradient's control; 1 switches it off.
        ecm: The guard against outliers: ``ls`` (layer scaling), ``ac`` (clamping to ±5) or ``none``.

    Reference:
        Chiley et al., 2019, arXiv 1905.05894.

    Example:
        >>> import torch
        >>> from setpoint import fix
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> type(fix(model, OnlineNorms(), [torch.randn(1, 3, 8, 8)]).model[1]).__name__
        'OnlineNorm2d'
    """

    alpha_fwd: float = 0.999
    alpha_bkw: float = 0.99
    ecm: Literal["ls", "ac", "none"] = "ls"

    id: ClassVar[str] = "online-norm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if not (0 <= self.alpha_fwd <= 1 and 0 <= self.alpha_bkw <= 1):
            raise InputError(
                f"expected alpha_fwd and alpha_bkw between 0 and 1, got {self.alpha_fwd} and {self.alpha_bkw}"
            )
        if self.ecm not in ("ls", "ac", "none"):
            raise InputError(f"expected ecm to be ls (layer scaling), ac (clamping) or none, got {self.ecm!r}")

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs batch norms."""
        return needs_batch_norms(anatomy, "replace", *LAYERS.values())

    def plan(self, ctx: FixContext) -> list[Edit]:
        """An online norm for every batch norm, with its statistics, gain and addend."""
        edits: list[Edit] = []
        for site in ctx.anatomy.norms.values():
            if site.kind != "batch":
                continue
            path = site.name.partition("#")[0]
            norm = ctx.model.get_submodule(path)
            layer = LAYERS.get(type(norm))  # type: ignore[arg-type]
            if layer is None or "#" in site.name:
                kind = type(norm).__name__
                raise Refused(self.id, Refusal(path, f"is a {kind}, and torch's BatchNorm1d, 2d and 3d are replaced"))
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
            arguments = {
                "num_features": norm.num_features,
                "alpha_fwd": self.alpha_fwd,
                "alpha_bkw": self.alpha_bkw,
                "eps": norm.eps,
                "affine": norm.affine,
                "ecm": None if self.ecm == "none" else self.ecm,
            }
            edits.append(Edit(path, Build(f"setpoint.nn:{layer.__name__}", arguments), "samples in place of batches"))
            kept = {"weight": norm.weight, "bias": norm.bias, "m": norm.running_mean, "var": norm.running_var}
            edits += [
                Edit(f"{path}.{name}", tensor.detach().clone(), "the batch norm's")
                for name, tensor in kept.items()
                if tensor is not None
            ]
        return edits

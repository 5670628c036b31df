"""LayerNorm Scaling: multiply what the norms of layer l give by ``1/sqrt(l)``; and fold such factors away.

In a Pre-LN network the stream grows with depth and deep blocks come close to the identity. `Scaling` puts
`setpoint.nn.LayerNormScaling` around both norms of each layer, for training from scratch: a trained checkpoint computes
something else afterwards. `Folding` is for inference with a model that was trained so: the factor goes into the norm's
gain and shift, or into the weights that read a norm without a gain, and outputs stay. The model is then a plain Pre-LN
one: a Llama or GPT-2 that was scaled, trained and folded loads in transformers.

Reference: Sun, Song, Li, Yin, Zheng and Liu, 2025, "The Curse of Depth in Large Language Models", arXiv 2502.05795.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from setpoint.fixes.fields import expect_positive
from setpoint.fixes.norm_sites import needs, stack_of
from setpoint.fixing.base import Refused
from setpoint.nn import LayerNormScaling
from setpoint.surgery.anatomy import Anatomy
from setpoint.surgery.copying import share
from setpoint.surgery.editing import commit
from setpoint.surgery.fold import cannot_scale_readers, fold_scale, scale_readers
from setpoint.types import Build, Edit, FixContext, Preserves, Ref, Refusal, Stage


@dataclass(frozen=True)
class Scaling:
    """Scale the norms of layer l by ``l ** -power``; the final norm is not scaled. Train afterwards.

    Args:
        power: How fast the factor falls with depth.
        learnable: Start the gains at the factor and train them, instead of a constant factor.

    Reference:
        Sun et al., 2025, arXiv 2502.05795.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> stack = nn.TransformerEncoder(layer, 4, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        >>> fix(stack, Scaling(), [torch.randn(1, 4, 8)]).model.layers[3].norm1.scale
        0.5
    """

    power: float = 0.5
    learnable: bool = False

    id: ClassVar[str] = "lns"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        expect_positive(power=self.power)

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """Every branch must read the stream through a norm that belongs to one layer."""
        if not anatomy.blocks:
            return Refusal("", "no residual blocks were found in it")
        for block in anatomy.blocks:
            for branch in block.branches:
                if not branch.input_norms:
                    place = branch.writer.module if branch.writer is not None else block.name
                    return Refusal(
                        place, "its branch reads the stream with no norm in front, so there is none to scale"
                    )
                for name in branch.input_norms:
                    if "#" in name:
                        return Refusal(
                            name.partition("#")[0], "computes its norm in its own forward, where no factor fits"
                        )
        owners = Counter(
            name for block in anatomy.blocks for name in {n for b in block.branches for n in b.input_norms}
        )
        shared = next((name for name, layers in owners.items() if layers > 1), None)
        return None if shared is None else Refusal(shared, "serves several layers, and each would need its own factor")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A factor around each norm in front of a branch; norms that have one already keep it."""
        anatomy: Anatomy = ctx.anatomy
        layers: Counter[str] = Counter()
        edits: list[Edit] = []
        for block in anatomy.blocks:
            stack = stack_of(block)
            layers[stack] += 1
            for name in dict.fromkeys(n for branch in block.branches for n in branch.input_norms):
                around = (name, name.rpartition(".")[0])
                if any(isinstance(ctx.model.get_submodule(path), LayerNormScaling) for path in around):
                    continue
                arguments: dict[str, Any] = {"norm": Ref(name), "layer_index": layers[stack], "power": self.power}
                if self.learnable:
                    arguments["learnable"] = True
                edits.append(Edit(name, Build("setpoint.nn:LayerNormScaling", arguments), f"layer {layers[stack]}"))
        if not edits:
            raise Refused(self.id, Refusal("", "its norms are scaled already; there is nothing to do", done=True))
        return edits


@dataclass(frozen=True)
class Folding:
    """Fold the factors of LayerNorm Scaling into the weights; exact.

    A factor goes into the gain and shift of the norm that it multiplies. Where the norm has no gain, or shares it with
    another norm, the factor goes into the weights that read the norm.

    Reference:
        Sun et al., 2025, arXiv 2502.05795.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint import fix
        >>> model = nn.Sequential(LayerNormScaling(nn.LayerNorm(8), 4), nn.Linear(8, 2))
        >>> fix(model, Folding(), [torch.randn(3, 8)]).model[0].weight[0].item()
        0.5
    """

    id: ClassVar[str] = "lns-fold"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "exact"

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs scaled norms."""
        return needs(anatomy, LayerNormScaling, "scaled norm", "fold")

    def plan(self, ctx: FixContext) -> list[Edit]:
        """The norm alone in the place of each scaled norm, with the factor in its parameters or in its readers."""
        scaled = {path: module for path, module in ctx.model.named_modules() if isinstance(module, LayerNormScaling)}
        edits = [Edit(path, Ref(f"{path}.norm"), "its factor is in the weights") for path in scaled]
        left: dict[str, float] = {}
        for path, module in scaled.items():
            names = _takes_factor(ctx.model, module)
            if names:
                into = fold_scale(ctx.model, tuple(f"{path}.{name}" for name in names), module.scale)
                edits += [edit for edit in into if module.scale != 1.0]
            elif module.scale != 1.0:
                left[path] = module.scale
        return [*edits, *self._into_readers(ctx, edits, left)] if left else edits

    def _into_readers(self, ctx: FixContext, done: Sequence[Edit], factors: Mapping[str, float]) -> list[Edit]:
        """Read the model again without its factors, to see who reads the norms, and scale those weights."""
        trial = share(ctx.model)
        commit(trial, done)
        anatomy = Anatomy.trace(trial, ctx.batches[0], forward=ctx.forward)
        edits: list[Edit] = []
        for path, factor in factors.items():
            site = anatomy.norms.get(path)
            if site is None:
                raise Refused(self.id, Refusal(path, "could not be read as a norm, so its readers are not known"))
            refusal = cannot_scale_readers(anatomy, site)
            if refusal is not None:
                reason = f"has no gain of its own to take the factor, and its readers can't take it: {refusal}"
                raise Refused(self.id, Refusal(path, reason))
            more = scale_readers(trial, site, factor)
            commit(trial, more)
            edits += more
        return edits


def _takes_factor(model: nn.Module, module: LayerNormScaling) -> list[str]:
    """Names of the norm's parameters that a factor can go into; none if scaling them would not scale the norm alone."""
    try:
        module.fold()
    except TypeError:
        return []
    held = {name: p for name in ("weight", "bias") if isinstance(p := getattr(module.norm, name, None), Tensor)}
    owners = Counter(id(p) for other in model.modules() for p in other._parameters.values() if p is not None)
    return list(held) if all(owners[id(p)] == 1 for p in held.values()) else []

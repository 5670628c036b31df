"""Region normalization in the place of batch and instance norms, for images with holes, to be trained from there.

As in the paper's network, norms near the input take their two regions from a mask (`setpoint.nn.RNB`), the others find
them in the features (`setpoint.nn.RNL`). The mask is that of the model's call: wrap the model as
``setpoint.nn.Conditioned(model, "mask")`` and call it with ``mask=``. Statistics are those of the batch at hand, in
evaluation too, so that running averages are given up. An `RNB` starts with the old gain and addend in both regions; an
`RNL` has a gain and an addend for each pixel and none for each channel, so there the old ones go.

Reference: Yu, Guo, Jin, Wu, Chen, Li, Zhang and Liu, 2020, "Region Normalization for Image Inpainting",
arXiv 1911.10375.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.fixing.base import Refused
from setpoint.nn import RNB, RNL
from setpoint.nn.conditioning import condition
from setpoint.running import untouched
from setpoint.types import Build, Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

KINDS = ("batch", "instance")
Replaced = nn.BatchNorm2d | nn.InstanceNorm2d


@dataclass(frozen=True)
class RegionNorms:
    """Replace every batch and instance norm of images by region normalization; the model must be trained afterwards.

    Args:
        masked: How many norms, from the input on, take their regions from the mask of the call. The paper's network
            has 3; 0 for a model without masks, a large number for all.
        threshold, kernel_size: Of the others, as in `setpoint.nn.RNL`.
        stats: Of the whole ``batch``, or of each ``instance``.

    Reference:
        Yu et al., 2020, arXiv 1911.10375.

    Example:
        >>> from setpoint import fix
        >>> from setpoint.nn import Conditioned
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
        ...                       nn.InstanceNorm2d(4))
        >>> batch = {"input": torch.randn(2, 3, 8, 8), "mask": torch.rand(2, 1, 8, 8) > 0.5}
        >>> fixed = fix(Conditioned(model, "mask"), RegionNorms(masked=1), [batch]).model
        >>> type(fixed.module[1]).__name__, type(fixed.module[4]).__name__
        ('RNB', 'RNL')
    """

    masked: int = 0
    threshold: float = 0.8
    kernel_size: Literal[3, 7] = 7
    stats: Literal["batch", "instance"] = "batch"

    id: ClassVar[str] = "region-norm"
    stage: ClassVar[Stage] = "transform"
    preserves: ClassVar[Preserves] = "retrain"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"expected threshold between 0 and 1, where a sigmoid ends, got {self.threshold}")
        if self.masked < 0 or self.kernel_size not in (3, 7) or self.stats not in ("batch", "instance"):
            raise InputError(
                "expected masked of at least 0, kernel_size 3 or 7 and stats batch or instance, got "
                f"{self.masked}, {self.kernel_size} and {self.stats}"
            )

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """It needs batch or instance norms."""
        if any(site.kind in KINDS for site in anatomy.norms.values()):
            return None
        reason = "it has no batch norm and no instance norm; there is nothing to replace"
        return Refusal("", reason, done=anatomy.has(RNB, RNL))

    def plan(self, ctx: FixContext) -> list[Edit]:
        """A layer for every norm, in order of execution."""
        norms: dict[str, Replaced] = {}
        for site in ctx.anatomy.norms.values():
            if site.kind in KINDS:
                path = site.name.partition("#")[0]
                norms[path] = self._expected(path, ctx.model.get_submodule(path), inside="#" in site.name)
        given, found = list(norms)[: self.masked], list(norms)[self.masked :]
        self._expect_masks(ctx, given)
        like = next(p.detach() for p in ctx.model.parameters() if p.is_floating_point())
        edits = [edit for path in given for edit in self._basic(path, norms[path], like)]
        return edits + [edit for path in found for edit in self._learnable(path, norms[path], like, ctx.generator)]

    def _expected(self, path: str, norm: nn.Module, *, inside: bool) -> Replaced:
        if inside or type(norm) not in (nn.BatchNorm2d, nn.InstanceNorm2d):
            kind = type(norm).__name__
            raise Refused(
                self.id, Refusal(path, f"is a {kind}, and torch's BatchNorm2d and InstanceNorm2d are replaced")
            )
        assert isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d)
        return norm

    def _expect_masks(self, ctx: FixContext, paths: Sequence[str]) -> None:
        """A mask is to be found by every norm that will read one."""
        missing = set(paths)

        def look(path: str, *_: Any) -> None:
            try:
                condition("mask", path)
            except InputError:
                return
            missing.discard(path)

        hooks = [ctx.model.get_submodule(path).register_forward_pre_hook(partial(look, path)) for path in paths]
        try:
            with untouched(ctx.model):
                if hooks:
                    ctx.forward(ctx.model, ctx.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        for path in paths:
            if path in missing:
                reason = (
                    "would find no mask; give the model as setpoint.nn.Conditioned(model, 'mask') and batches with a "
                    "mask, or say masked=0"
                )
                raise Refused(self.id, Refusal(path, reason))

    # A norm without parameters does not tell a new layer its dtype and device, so every tensor is given.

    def _basic(self, path: str, norm: Replaced, like: Tensor) -> Iterator[Edit]:
        arguments = {"num_features": norm.num_features, "stats": self.stats, "eps": norm.eps}
        yield Edit(path, Build("setpoint.nn:RNB", arguments), "regions from the mask")
        none = like.new_zeros(norm.num_features)
        gamma = none if norm.weight is None else norm.weight.detach() - 1
        beta = none if norm.bias is None else norm.bias.detach()
        for region in ("foreground", "background"):
            yield Edit(f"{path}.{region}_gamma", gamma.clone(), "the norm's gain, in either region")
            yield Edit(f"{path}.{region}_beta", beta.clone(), "the norm's addend, in either region")

    def _learnable(self, path: str, norm: Replaced, like: Tensor, numbers: torch.Generator) -> Iterator[Edit]:
        arguments = {
            "num_features": norm.num_features,
            "threshold": self.threshold,
            "kernel_size": self.kernel_size,
            "stats": self.stats,
            "eps": norm.eps,
        }
        yield Edit(path, Build("setpoint.nn:RNL", arguments), "regions found in the features")
        for name, inputs in (("conv1", 2), ("gamma_conv", 1), ("beta_conv", 1)):
            shape = (1, inputs, self.kernel_size, self.kernel_size)
            bound = torch.Size(shape[1:]).numel() ** -0.5
            tensors = {"weight": shape} if name == "conv1" else {"weight": shape, "bias": (1,)}
            for kind, size in tensors.items():
                drawn = bound * (2 * torch.rand(size, generator=numbers) - 1)
                yield Edit(f"{path}.sa.{name}.{kind}", drawn.to(like), "as torch draws convolutions")

"""GDWCT: the covariance of an exemplar's features given to a content's, in groups of channels, without eigenvectors.

Whitening and coloring give features another mean and covariance: exactly so by two eigendecompositions for each image
(`group_wct`), which cost the cube of the channels. Cho, Choi, Park, Shin and Choo (2019, arXiv 1812.09912) learn both
halves. A loss makes the content's features white, so that they need only be centred. For each of G groups of n channels
a small network predicts a matrix A from the group's part of the style; with D the lengths of its columns and
``U = A D^-1``, what colours is ``X = U D U^T``, and another network predicts the mean:

    ``y = alpha (X (c - mean) + mu) + (1 - alpha) c``.

X is symmetric and has no negative eigenvalue whatever A is, and is the square root of a covariance where U is
orthogonal, which a second loss asks for. Two losses of the layer belong into the loss of a model, then: of the
covariance and of U (`Regularizers`).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels
from setpoint.nn.norm.functional import wide
from setpoint.nn.norm.gdn import full_precision
from setpoint.nn.norm.stateful import mean_over_examples

Maps = Float[Tensor, "batch channels ..."]
Matrices = Float[Tensor, "*groups n n"]

COVARIANCE_EPS = 1e-5
"""Added to the diagonal of a covariance, as in the official code."""


class Regularizers(NamedTuple):
    """What the two losses of a `GDWCT` are of.

    Args:
        covariance: Of the centred content, ``(G, n, n)``, or for each example ``(N, G, n, n)``.
        u: Columns of unit length that are to be orthogonal, ``(N, G, n, n)``.
    """

    covariance: Matrices
    u: Matrices

    @property
    def whitening(self) -> Tensor:
        """How far the content is from white; the released configuration counts it 0.001 times."""
        return distance_from_identity(self.covariance)

    @property
    def coloring(self) -> Tensor:
        """How far U is from orthogonal, ``mean |U^T U - I|``; the released configuration counts it 10 times.

        The official code takes ``distance_from_identity(u)`` instead, which asks for U = I.
        """
        return distance_from_identity(self.u.mT @ self.u)


class GDWCT(nn.Module):
    """Group-wise deep whitening and coloring: the style's mean and covariance for centred content.

    Linear layers start as torch's do and not by Kaiming's rule, by which the official code draws them: with that the
    first outputs are many times as large as the content. State has the official names.

    Args:
        num_features: Number of channels C of the content.
        num_groups: Number of groups G, each of ``n = C / G`` channels; 1 for the whole covariance, C for scales
            alone, as in AdaIN.
        style_dim: Length of the style code, divisible by G; None for C.
        hidden: Width of the network that predicts the coloring matrices, which all groups share.
        alpha_init: Where the weight of the coloured content starts. Training may take it out of 0 to 1: call
            `clamp_alpha` before each step, as the official code does.
        center: Whose mean is subtracted, that of the whole ``"batch"`` (in training under `torch.distributed` of all
            processes) in evaluation too, or each ``"instance"``'s own, which makes examples independent.
        device, dtype: Of the parameters.

    Shape:
        Content and output ``(N, C, *)``, style ``(N, style_dim)`` or ``(N, style_dim, 1, 1)``. A style of one example
        serves all.

    Raises:
        InputError: Channels or style that do not divide into the groups; on call, another number of channels, another
            length or number of styles.
        TypeError: On call, content that is not floating-point.

    Warns:
        UserWarning: Regularizers are asked for with no more pixels than channels in a group, where a covariance can't
            be the identity.

    Reference:
        Cho, Choi, Park, Shin and Choo, 2019, "Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring
        Transformation", arXiv 1812.09912.

    Example:
        >>> layer = GDWCT(8, num_groups=2, hidden=16)
        >>> y, losses = layer(torch.randn(2, 8, 6, 6), torch.randn(2, 8), need_regularizers=True)
        >>> y.shape, (0.001 * losses.whitening + 10 * losses.coloring).shape
        (torch.Size([2, 8, 6, 6]), torch.Size([]))
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        style_dim: int | None = None,
        hidden: int = 256,
        alpha_init: float = 0.6,
        center: Literal["batch", "instance"] = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        style_dim = num_features if style_dim is None else style_dim
        size = group_size(num_features, num_groups, "GDWCT")
        style_size = group_size(style_dim, num_groups, "GDWCT", "style_dim")
        if center not in ("batch", "instance"):
            raise InputError(f"GDWCT: expected center to be 'batch' or 'instance', got {center!r}")
        self.num_features = num_features
        self.num_groups = num_groups
        self.style_dim = style_dim
        self.alpha_init = alpha_init
        self.center = center
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.mlp_CT = _MLP((style_size, *[hidden] * 4, size**2), device, dtype)
        self.mlp_mu = _MLP((style_dim, style_dim, style_dim, num_features), device, dtype)
        nn.init.constant_(self.alpha, alpha_init)

    def reset_parameters(self) -> None:
        """As after making it."""
        nn.init.constant_(self.alpha, self.alpha_init)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    @torch.no_grad()
    def clamp_alpha(self) -> None:
        """Bring alpha back between 0 and 1."""
        self.alpha.clamp_(0.0, 1.0)

    @overload
    def forward(self, content: Maps, style: Tensor, need_regularizers: Literal[False] = ...) -> Maps: ...
    @overload
    def forward(self, content: Maps, style: Tensor, need_regularizers: Literal[True]) -> tuple[Maps, Regularizers]: ...
    def forward(
        self, content: Maps, style: Float[Tensor, "batch style ..."], need_regularizers: bool = False
    ) -> Maps | tuple[Maps, Regularizers]:
        """The content with the style's mean and covariance, in its own shape and dtype.

        Args:
            content: Maps ``(N, C, *)``.
            style: Codes ``(N, style_dim)``.
            need_regularizers: Return what the two losses are of, too.
        """
        expect_channels(content, self.num_features, "GDWCT")
        codes = self._expect_style(style, len(content))
        predicted = self.mlp_CT(codes.unflatten(1, (self.num_groups, -1)))  # type: ignore[no-untyped-call]
        u, coloring = coloring_of(predicted.unflatten(-1, (round(predicted.shape[-1] ** 0.5), -1)))
        mu = wide(self.mlp_mu(codes))
        with full_precision(content):
            values = wide(content).flatten(2)
            together = self.training and self.center == "batch"
            centred = _grouped(values - self._mean(values, together), self.num_groups)
            colored = (coloring @ centred).reshape(values.shape) + mu[..., None]
            y = torch.lerp(values, colored, wide(self.alpha)).reshape(content.shape).to(content.dtype)
            if not need_regularizers:
                return y
            self._warn_of_few(values)
            return y, Regularizers(_covariance(centred, self.center, together), u)

    def _mean(self, values: Float[Tensor, "batch channels pixels"], together: bool) -> Tensor:
        means = values.mean(2)
        if self.center == "instance":
            return means[..., None]
        return mean_over_examples(means, together)[0][:, None]

    def _expect_style(self, style: Tensor, examples: int) -> Tensor:
        codes = style.flatten(1) if style.dim() > 1 else style
        if codes.dim() != 2 or codes.shape[1] != self.style_dim or codes.shape[0] not in (1, examples):
            raise InputError(
                f"GDWCT: expected a style of shape ({examples}, {self.style_dim}), or of one example, got "
                f"{tuple(style.shape)}; average maps over space first"
            )
        return codes

    def _warn_of_few(self, values: Tensor) -> None:
        pixels = values.shape[2] * (1 if self.center == "instance" else len(values))
        if 0 < pixels <= self.num_features // self.num_groups and not torch.compiler.is_compiling():
            warnings.warn(
                f"GDWCT: {pixels} pixels for groups of {self.num_features // self.num_groups} channels, whose "
                "covariance is not of full rank and can't become the identity; use more groups or larger batches",
                stacklevel=4,
            )

    def extra_repr(self) -> str:
        """Channels, groups, length of the style, whose mean."""
        return f"{self.num_features}, num_groups={self.num_groups}, style_dim={self.style_dim}, center={self.center!r}"


def coloring_of(a: Matrices) -> tuple[Matrices, Matrices]:
    """``U = A D^-1`` and ``X = U D U^T``, D being the lengths of the columns of A; a column of zeros stays one.

    Args:
        a: Matrices ``(*, n, n)``.

    Returns:
        U and X, each ``(*, n, n)``, in at least float32.

    Example:
        >>> coloring_of(torch.tensor([[0.0, -3.0], [2.0, 0.0]]))[1]
        tensor([[3., 0.],
                [0., 2.]])
    """
    with full_precision(a):
        a = wide(a)
        u = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True).clamp_min(1e-12)
        return u, a @ u.mT


def distance_from_identity(matrices: Matrices) -> Tensor:
    """``mean |M - I|`` over all entries of all matrices.

    Args:
        matrices: ``(*, n, n)``.

    Returns:
        A number.

    Example:
        >>> distance_from_identity(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        tensor(0.7500)
    """
    return (matrices - torch.eye(matrices.shape[-1], device=matrices.device, dtype=matrices.dtype)).abs().mean()


def whitening_loss(x: Maps, num_groups: int, center: Literal["batch", "instance"] = "batch") -> Tensor:
    """How far features are from white in groups of channels; 0 at a covariance of ``(1 - 1e-5) I``.

    Args:
        x: Features ``(N, C, *)``.
        num_groups: Number of groups of channels.
        center: Take mean and covariance over the ``"batch"``, or of each ``"instance"``.

    Returns:
        A number: ``mean |Sigma - I|``.

    Raises:
        InputError: C does not divide into the groups.

    Example:
        >>> whitening_loss(torch.tensor([[[-1.0, 1.0], [3.0, 3.0]]]), num_groups=2)  # variances 2 and 0
        tensor(1.)
    """
    group_size(x.shape[1], num_groups, "whitening_loss")
    with full_precision(x):
        values = wide(x).flatten(2)
        over = (2,) if center == "instance" else (0, 2)
        centred = _grouped(values - values.mean(over, keepdim=True), num_groups)
        return distance_from_identity(_covariance(centred, center, together=False))


def group_wct(content: Maps, style: Maps, num_groups: int, eps: float = 1e-5) -> Maps:
    """Exact whitening and coloring: each example gets the mean and, in groups of channels, the covariance of a style.

    Needs no training and two eigendecompositions for each example and group. Gradients are not to be trusted where
    eigenvalues coincide.

    Args:
        content: Maps ``(N, C, *)``.
        style: Maps of the exemplars ``(N, C, *)``, of any size; one serves all.
        num_groups: Number of groups of channels.
        eps: Least eigenvalue that is divided by.

    Returns:
        A tensor of the shape and dtype of ``content``.

    Raises:
        InputError: C does not divide into the groups, or the two differ in C or N.

    Reference:
        Li, Fang, Yang, Wang, Lu and Yang, 2017, "Universal Style Transfer via Feature Transforms", arXiv 1705.08086.

    Example:
        >>> content, style = torch.randn(1, 4, 50), 3 * torch.randn(1, 4, 80) + 1
        >>> torch.allclose(group_wct(content, style, 1)[0].cov(), style[0].cov(), atol=1e-3)
        True
    """
    group_size(content.shape[1], num_groups, "group_wct")
    if style.shape[1] != content.shape[1] or len(style) not in (1, len(content)):
        raise InputError(
            f"group_wct: expected a style of shape {tuple(content.shape[:2])} and pixels, or of one example, got "
            f"{tuple(style.shape)}"
        )
    with full_precision(content):
        centred, given = (_grouped(wide(t).flatten(2), num_groups) for t in (content, style))
        centred, mean = centred - centred.mean(-1, keepdim=True), given.mean(-1, keepdim=True)
        white = _power(_second_moment(centred), -0.5, eps) @ centred
        colored = _power(_second_moment(given - mean), 0.5, 0.0) @ white + mean
        return colored.reshape(content.shape).to(content.dtype)


def group_size(channels: int, num_groups: int, layer: str, name: str = "num_features") -> int:
    """Channels in a group.

    Raises:
        InputError: They do not divide evenly.
    """
    if channels < 1 or num_groups < 1 or channels % num_groups:
        raise InputError(f"{layer}: expected {name} to be a multiple of num_groups, got {channels} and {num_groups}")
    return channels // num_groups


class _MLP(nn.Module):
    """Linear layers of the given sizes, with a leaky ReLU between them."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.main = nn.Sequential()
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            parts: OrderedDict[str, nn.Module] = OrderedDict(fc=nn.Linear(inputs, outputs, device=device, dtype=dtype))
            if index < len(sizes) - 2:
                parts["activation"] = nn.LeakyReLU(0.01)
            self.main.append(nn.Sequential(parts))

    def forward(self, x: Tensor) -> Tensor:
        predicted: Tensor = self.main(x)
        return predicted


def _grouped(values: Float[Tensor, "batch channels pixels"], num_groups: int) -> Float[Tensor, "batch groups n pixels"]:
    grouped: Tensor = values.unflatten(1, (num_groups, -1))  # type: ignore[no-untyped-call]
    return grouped


def _covariance(centred: Float[Tensor, "batch groups n pixels"], center: str, together: bool) -> Matrices:
    """Unbiased covariance of each group, with a little on the diagonal."""
    identity = COVARIANCE_EPS * torch.eye(centred.shape[2], device=centred.device, dtype=centred.dtype)
    if center == "instance":
        return _second_moment(centred) + identity
    pixels = centred.shape[-1]
    products = centred @ centred.mT / max(pixels, 1)
    mean, images = mean_over_examples(products, together)
    count = images * pixels
    corrected = mean * (count / (count - 1).clamp_min(1) if isinstance(count, Tensor) else count / max(count - 1, 1))
    return corrected + identity


def _second_moment(centred: Float[Tensor, "batch groups n pixels"]) -> Matrices:
    return centred @ centred.mT / max(centred.shape[-1] - 1, 1)


def _power(covariance: Matrices, exponent: float, least: float) -> Matrices:
    """A symmetric matrix to a power, by its eigenvalues, which are at least ``least``."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    power: Tensor = (vectors * eigenvalues.clamp_min(least).pow(exponent).unsqueeze(-2)) @ vectors.mT
    return power

"""Which batch norms can go into the layer in front of them, and what that layer becomes.

In evaluation a batch norm is ``s y + t``, with ``s = weight / sqrt(running_var + eps)`` and
``t = bias - s running_mean``. Behind ``y = W x + b`` that is one layer, ``W' = s W`` for every output channel and
``b' = s b + t``: exactly so if, and only if, the norm reads that layer and nothing else does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from setpoint.nn.norm.batchnorm import FrozenBatchNorm
from setpoint.running import Forward, untouched

if TYPE_CHECKING:
    from setpoint.surgery.graph import Graph
    from setpoint.surgery.tape import Call

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Affine = nn.Linear | nn.modules.conv._ConvNd


def foldable(
    model: nn.Module, batch: Any, norms: Collection[str], *, forward: Forward | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Run a model once and read which layer each batch norm can go into.

    Args:
        model: As it is afterwards.
        batch: An input.
        norms: Names of batch norms, frozen ones among them.
        forward: ``forward(model, batch)``, if calling takes more than the batch.

    Returns:
        Norm -> name of the convolution or linear layer that takes it; and norm -> why there is none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
        >>> foldable(model, torch.randn(2, 3, 8, 8), ["1", "3"])
        ({'1': '0'}, {'3': "it doesn't read a convolution or a linear layer directly"})
    """
    from setpoint.surgery.graph import Graph
    from setpoint.surgery.tape import record

    with untouched(model):
        graph = Graph(record(model, batch, forward))
    calls: dict[str, list[Call]] = {}
    for call in graph.tape.calls:
        calls.setdefault(call.name, []).append(call)
    modules = dict(model.named_modules())
    feeds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name in sorted(norms):
        found = _layer_before(name, modules, graph, calls)
        if isinstance(found, _Reason):
            reasons[name] = found
        else:
            feeds[name] = found
    return feeds, reasons


class _Reason(str):
    """Why not."""


def _layer_before(name: str, modules: dict[str, Any], graph: Graph, calls: dict[str, list[Call]]) -> str | _Reason:
    norm, own = modules[name], calls.get(name, [])
    if norm.running_mean is None:
        return _Reason("it keeps no running averages")
    if len(own) != 1:
        return _Reason(f"it ran {len(own)} times on this batch, and only a single use can be folded")
    value = own[0].inputs[0]
    path = value.producer.call.name if value.producer is not None else ""
    layer = modules.get(path)
    if isinstance(layer, _Affine) and nn.utils.parametrize.is_parametrized(layer):
        return _Reason(f"the weight of {path} is computed at every use; make it a plain one first (fold-weights)")
    if not isinstance(layer, _Affine) or value.index not in graph.weights:
        return _Reason("it doesn't read a convolution or a linear layer directly")
    returned = any(output.index == value.index for output in graph.tape.outputs)
    if returned or any(own[0] not in node.call.ancestors() for node in graph.readers[value.index]):
        return _Reason(f"the output of {path} is used elsewhere too")
    if len(calls[path]) != 1 or _is_shared(modules[""], layer):
        return _Reason(f"{path} runs several times or shares its weight with another layer")
    if value.tensor.shape[1] != norm.num_features or (isinstance(layer, nn.Linear) and value.tensor.dim() != 2):
        return _Reason(f"its channels are not the output channels of {path}")
    return path


def _is_shared(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a parameter of the layer stands at another place too."""
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    places = [p for module in model.modules() for p in module._parameters.values() if p is not None and id(p) in own]
    return len(places) != len(own)


@torch.no_grad()
def folded_tensors(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the batch norm behind it in them; computed in float64.

    Args:
        layer: A convolution, transposed convolution or linear layer, grouped or not, with a bias or without.
        norm: A batch norm with running averages, frozen or not, affine or not.

    Returns:
        ``(weight, bias)`` in the dtype of the layer's weight. Neither module is changed.

    Example:
        >>> norm = nn.BatchNorm1d(2, eps=0.0)
        >>> _ = norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(layer.weight)
        >>> folded_tensors(layer, norm)
        (tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]), tensor([-0.5000, -0.5000]))
    """
    assert isinstance(layer, _Affine)
    assert isinstance(norm, _BatchNorm | FrozenBatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = layer.weight.double()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # it is (in, out / groups, ...): output channels run over the groups of axis 0 and then over axis 1
        grouped = weight.unflatten(0, (layer.groups, -1))  # type: ignore[no-untyped-call]
        weight = (grouped * scale.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    return weight.to(layer.weight.dtype), shift.to(layer.weight.dtype)

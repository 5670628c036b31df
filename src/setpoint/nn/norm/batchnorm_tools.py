"""What is done with the batch norms of a whole model: recalibrate, freeze, fold.

In evaluation a batch norm is the affine map ``s x + t`` with ``s = weight / sqrt(running_var + eps)`` and
``t = bias - s running_mean``. So its running averages can be taken anew without training (`recalibrate`, the paper's
Algorithm 2), it can be fixed for good (`freeze_batchnorm`), and it can disappear into the layer in front of it:
``W' = s W`` for every output channel and ``b' = s b + t`` (`fold_batchnorm`).

Reference:
    Ioffe and Szegedy, 2015, "Batch Normalization", arXiv 1502.03167.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from setpoint.errors import InputError, nearest
from setpoint.nn.norm.batchnorm import FrozenBatchNorm
from setpoint.nn.norm.batchnorm_folding import foldable, folded_tensors
from setpoint.running import Forward, run_batch

_BatchNorm = nn.modules.batchnorm._BatchNorm


def recalibrate(
    model: nn.Module, batches: Iterable[Any], steps: int | None = None, *, forward: Forward | None = None
) -> nn.Module:
    """Take the running averages of every batch norm anew, as the plain average over the given batches.

    Needed after weights were averaged, pruned, quantized or merged, when the averages are those of another network.
    Only batch norms are put in training mode meanwhile, so dropout stays off; everything but their averages is left as
    it was. A norm that no batch reaches keeps its averages.

    Args:
        model: Changed in place: only ``running_mean``, ``running_var`` and ``num_batches_tracked``.
        batches: Inputs; a mapping is passed as keywords, a tuple or list as positions, anything else as it is.
        steps: How many batches to use at most, None for all.
        forward: ``forward(model, batch)``, if calling takes more than the batch (for instance to leave a label out).

    Returns:
        The model.

    Raises:
        InputError: There is no batch norm with running averages, or no batch. Should a batch fail, the old averages are
            back.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> data = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])]
        >>> recalibrate(model, data)[0].running_mean
        tensor([4.5000])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise InputError(
            "expected a model with batch norms that keep running averages, found none; there is nothing to recalibrate"
        )
    with _averaging(model, norms), torch.no_grad():
        seen = 0
        for batch in batches:
            if seen == steps:
                break
            run_batch(model, batch) if forward is None else forward(model, batch)
            seen += 1
        if not seen:
            raise InputError("expected at least one batch to take the statistics of, got none")
    return model


def freeze_batchnorm(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every batch norm by its frozen form, which ``train()`` doesn't wake.

    For fine-tuning with small batches, or on data whose statistics should not be learned.

    Args:
        model: A model with batch norms.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model with `FrozenBatchNorm` in place of each batch norm; parameters of the norms become buffers under the
        same names.

    Raises:
        InputError: There is no batch norm, or one without running averages; the message names it.

    Example:
        >>> frozen = freeze_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        >>> frozen[1]
        FrozenBatchNorm(4, eps=1e-05)
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        raise InputError("expected a model with batch norms, found none; there is nothing to freeze")
    frozen: dict[str, nn.Module] = {}
    for name, norm in norms.items():
        try:
            frozen[name] = FrozenBatchNorm.of(norm)
        except InputError as error:
            raise InputError(f"{name or 'the model'}: {error}") from None
    return _with_replaced(model if inplace else deepcopy(model), frozen)


def fold_batchnorm(
    model: nn.Module,
    batch: Any,
    only: Collection[str] | None = None,
    *,
    forward: Forward | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Multiply batch norms into the convolutions and linear layers in front of them; evaluation stays the same.

    One batch is run to see which layer feeds which norm, whatever the modules are called. Grouped, depthwise and
    transposed convolutions fold too.

    Args:
        model: A trained model. What comes back is meant for evaluation: it has no batch statistics any more.
        batch: An input to run once.
        only: Names of the batch norms to fold, None for all.
        forward: ``forward(model, batch)``, if calling takes more than the batch.
        inplace: Change the model itself instead of a copy.

    Returns:
        The model with `torch.nn.Identity` in place of each folded norm.

    Raises:
        InputError: A batch norm that can't be folded: it doesn't read a convolution or linear layer directly, or
            something else reads that layer too, or one of the two runs more than once, or has no running averages. The
            message names each and the reason, and the model is as it was; fold the others by naming them in ``only``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> folded = fold_batchnorm(model, x)
        >>> folded[1], bool(torch.allclose(folded(x), model(x), atol=1e-5))
        (Identity(), True)
    """
    norms = {name for name, m in model.named_modules() if isinstance(m, _BatchNorm | FrozenBatchNorm)}
    if not norms:
        raise InputError("expected a model with batch norms, found none; there is nothing to fold")
    wanted = norms if only is None else set(only)
    for name in sorted(wanted - norms):
        raise InputError(f"no batch norm is called {name!r}; the nearest names are {', '.join(nearest(name, norms))}")
    feeds, reasons = foldable(model, batch, wanted, forward=forward)
    if reasons:
        listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
        raise InputError(f"can't fold {listed}. Name the batch norms to fold in `only` to leave these as they are")
    folded = model if inplace else deepcopy(model)
    modules = dict(folded.named_modules())
    for name, path in feeds.items():
        layer = modules[path]
        for own, tensor in zip(("weight", "bias"), folded_tensors(layer, modules[name]), strict=True):
            layer.register_parameter(own, nn.Parameter(tensor, requires_grad=layer.weight.requires_grad))
    return _with_replaced(folded, {name: nn.Identity().train(modules[name].training) for name in feeds})


def _with_replaced(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    for name, module in replacements.items():
        if not name:
            return module
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
    return model


@contextmanager
def _averaging(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Fresh averages with equal weights while it lasts; modes and momenta return.

    The old averages come back on an error, and to a norm that saw no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    kept = [(norm, buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        yield
        unseen = {norm for norm in norms if not norm.num_batches_tracked}
    except BaseException:
        unseen = set(norms)
        raise
    finally:
        for norm, buffer, value in kept:
            if norm in unseen:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum

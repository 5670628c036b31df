"""Core: train the gains and addends of adapted batch norms on the test batches themselves, without labels.

You, Li and Zhao (2021, arXiv 2110.04065) add to α-BN a loss on the outputs of a classifier. With P the class
probabilities of a batch, ``R = PᵀP`` says how often two classes are confused; it should be a diagonal. Each batch is
predicted, and one step of an optimizer is taken on it, before the next comes.

The abstract and the name of the loss are all that could be had of its definition. What stands here is the minimum class
confusion loss without its weights and temperature, which has that form; take it for an experiment and not for the
paper's figures.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.alpha_bn import AlphaBatchNorm, adapt_batchnorm
from setpoint.running import Forward, run_batch, tensors_of


def class_correlation_loss(logits: Float[Tensor, "batch classes ..."]) -> Float[Tensor, ""]:
    """How much the predictions of a batch confuse classes: what R, its rows summing to 1, has off its diagonal.

    Args:
        logits: ``(N, K)``, or ``(N, K, H, W)`` with a prediction for each pixel.

    Returns:
        A scalar, from 0 (every prediction is certain) to 1 - 1/K (all are uniform).

    Raises:
        InputError: Fewer than two classes, or no prediction.

    Example:
        >>> class_correlation_loss(torch.zeros(5, 4)), class_correlation_loss(100 * torch.eye(4))
        (tensor(0.7500), tensor(0.))
    """
    if logits.dim() < 2 or logits.shape[1] < 2 or not logits.numel():
        raise InputError(
            f"class_correlation_loss: expected logits of shape (N, K, *) with at least two classes, got "
            f"{tuple(logits.shape)}"
        )
    probabilities = logits.float().softmax(1).movedim(1, -1).flatten(0, -2)
    correlation = probabilities.T @ probabilities
    rows = correlation / correlation.sum(1, keepdim=True).clamp_min(torch.finfo(correlation.dtype).tiny)
    return (rows.sum() - rows.trace()) / len(rows)


class CoreAdapter:
    """A classifier that adapts to the batches it is asked about; the model that was given stays as it is.

    Args:
        model: A trained classifier with batch norms.
        source_weight: Weight of the running averages, as in `setpoint.nn.adapt_batchnorm`.
        prior: Weigh by the size of the batch instead, as there.
        lr: Learning rate of Adam, which takes one step a batch on the batch norms' gains and addends.
        forward: ``forward(model, batch)``, if calling takes more than the batch.

    Raises:
        InputError: There is no batch norm to adapt, or none with a gain or addend; on call, a loss that is not finite
            (no step is then taken).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> adapter = CoreAdapter(model)
        >>> adapter(torch.randn(16, 4)).shape  # predictions, and a step
        torch.Size([16, 3])
        >>> adapter.reset()
    """

    def __init__(
        self,
        model: nn.Module,
        source_weight: float = 0.9,
        prior: float | None = None,
        lr: float = 1e-3,
        forward: Forward | None = None,
    ) -> None:
        self.model = adapt_batchnorm(model, source_weight, prior=prior).eval().requires_grad_(False)
        norms = [m.norm for m in self.model.modules() if isinstance(m, AlphaBatchNorm)]
        self._trained = [p.requires_grad_() for norm in norms for p in (norm.weight, norm.bias) if p is not None]
        if not self._trained:
            raise InputError("expected batch norms with gains and addends to train, got affine=False in all of them")
        self._start = [p.detach().clone() for p in self._trained]
        self.lr = lr
        self._forward = run_batch if forward is None else forward
        self._optimizer = torch.optim.Adam(self._trained, lr)
        self._fresh = deepcopy(self._optimizer.state_dict())

    def __call__(self, batch: Any) -> Float[Tensor, "batch classes ..."]:
        """Logits for a batch, after which one step is taken on it.

        Args:
            batch: What the model takes.

        Returns:
            Logits of the forward pass that the step was taken on, detached.
        """
        with torch.enable_grad():
            logits = tensors_of(self._forward(self.model, batch))[0]
            loss = class_correlation_loss(logits)
            if not bool(loss.isfinite()):
                raise InputError("the loss of this batch is not finite; look for NaN or infinities in it")
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return logits.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Gains, addends and the optimizer as before the first batch."""
        for parameter, start in zip(self._trained, self._start, strict=True):
            parameter.copy_(start)
        self._optimizer.load_state_dict(deepcopy(self._fresh))

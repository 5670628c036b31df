"""PPL-p % sparsity: how many hidden units can be silenced per token if perplexity may rise by p per cent.

A feed-forward's output is a sum over its hidden units, FFN(x) = sum_i h_i W[:, i]; unit i contributes |h_i| |W[:, i]|.
For a threshold eps all units that contribute less are dropped, and the cumulative error of tail truncation is

    CETT = mean over tokens of |sum of dropped contributions| / |FFN(x)|.

One common target for CETT gives each layer its own threshold; the target is bisected until perplexity has risen by p %
(Luo et al., 2024, arXiv 2411.02335). Biases of the down projection are no unit's contribution and are left out.

Differs from the published script in one point: there a unit at exactly the threshold is dropped while searching and
kept while applying; here it is kept in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from setpoint.data import next_token_loss
from setpoint.errors import InputError
from setpoint.probe.activity import ActivationSparsity
from setpoint.probe.base import Intervention, Subject, profile
from setpoint.probe.interventions.hooks import caught, module_at
from setpoint.progress import Progress
from setpoint.running import run_batch
from setpoint.types import Finding, Tap, Trace
from setpoint.words import percent, rounded

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


def neuron_magnitudes(h: Float[Tensor, "*tokens hidden"], w_out: Float[Tensor, "out hidden"]) -> Tensor:
    """Length of each hidden unit's contribution to the feed-forward's output.

    Args:
        h: Hidden activations as the down projection reads them.
        w_out: The down projection's weight, ``(out, hidden)``.

    Returns:
        ``|h_i| |W[:, i]|``, shape of ``h``.

    Example:
        >>> neuron_magnitudes(torch.tensor([[3.0, -4.0]]), 2 * torch.eye(2))
        tensor([[6., 8.]])
    """
    _check(h, w_out)
    lengths: Tensor = torch.linalg.vector_norm(w_out, dim=0)
    return h.abs() * lengths


def cett(
    h: Float[Tensor, "*tokens hidden"],
    w_out: Float[Tensor, "out hidden"],
    eps: float,
    mask: Bool[Tensor, "*tokens"] | None = None,
) -> float:
    """Cumulative error of tail truncation at a threshold.

    Args:
        h: Hidden activations as the down projection reads them.
        w_out: The down projection's weight, ``(out, hidden)``.
        eps: Units whose contribution is smaller than this are dropped.
        mask: Tokens to use; all by default. Tokens with an output of length 0 are left out.

    Returns:
        The mean relative length of what is dropped: 0 for ``eps=0``, 1 for ``eps=inf``.

    Raises:
        InputError: Shapes that don't fit, or a mask without any token.

    Reference:
        Luo et al., 2024, arXiv 2411.02335.

    Example:
        >>> round(cett(torch.tensor([[3.0, 4.0]]), torch.eye(2), eps=3.5), 6)
        0.6
    """
    return _Layer.of(h, w_out, mask).cett(eps)


def find_threshold(
    h: Float[Tensor, "*tokens hidden"], w_out: Float[Tensor, "out hidden"], target: float, num: int = 65536
) -> float:
    """The largest threshold on a grid whose CETT stays within a target.

    Args:
        h: Hidden activations as the down projection reads them.
        w_out: The down projection's weight, ``(out, hidden)``.
        target: The CETT allowed, 0 to 1.
        num: Points of the grid, linear from the smallest contribution that is not zero to the 0.99 quantile.

    Returns:
        The threshold. At the first point only exact zeros are dropped, so there is always an answer.

    Example:
        >>> h = torch.linspace(0, 1, 11)[None]
        >>> round(find_threshold(h, torch.eye(11), target=0.2), 2)
        0.4
    """
    return _Layer.of(h, w_out, None, num).threshold(target)


class _Layer:
    """One feed-forward's hidden activations; CETT values are remembered, since a search revisits its first points."""

    def __init__(self, h: Tensor, w_out: Tensor, num: int) -> None:
        self.h, self.w_out = h, w_out
        self.magnitudes = neuron_magnitudes(h, w_out)
        self.lengths = torch.linalg.vector_norm(h @ w_out.T, dim=-1)
        self.grid = self._grid(num)
        self._known: dict[int, float] = {}

    @classmethod
    def of(cls, h: Tensor, w_out: Tensor, mask: Tensor | None, num: int = 65536) -> _Layer:
        _check(h, w_out)
        flat = h.reshape(-1, h.shape[-1])
        if mask is not None:
            flat = flat[mask.reshape(-1)]
        if not len(flat):
            raise InputError("There are no tokens to measure: the mask is empty.")
        return cls(flat.float(), w_out.float(), num)

    def _grid(self, num: int) -> Tensor:
        positive = self.magnitudes[self.magnitudes > 0]
        if not len(positive):
            return torch.zeros(1)
        sample = self.magnitudes.flatten()
        sample = sample[:: max(1, len(sample) // 65536)]
        top = max(float(torch.quantile(sample, 0.99)), float(positive.min()))
        return torch.linspace(float(positive.min()), top, num, dtype=torch.float64)

    def cett(self, eps: float) -> float:
        dropped = torch.where(self.magnitudes < eps, self.h, torch.zeros((), dtype=self.h.dtype))
        error = torch.linalg.vector_norm(dropped @ self.w_out.T, dim=-1)
        live = self.lengths > 0
        if not live.any():
            return 0.0
        return float((error[live] / self.lengths[live]).double().mean())

    def threshold(self, target: float) -> float:
        low, high = 0, len(self.grid)
        while high - low > 1:
            middle = (low + high) // 2
            if middle not in self._known:
                self._known[middle] = self.cett(float(self.grid[middle]))
            low, high = (middle, high) if self._known[middle] <= target else (low, middle)
        return float(self.grid[low])


def _check(h: Tensor, w_out: Tensor) -> None:
    if w_out.ndim != 2 or h.shape[-1] != w_out.shape[1]:
        raise InputError(
            f"Expected h (..., hidden) and w_out (out, hidden), got {tuple(h.shape)} and {tuple(w_out.shape)}. "
            "A weight stored as (hidden, out) must be transposed."
        )


# --------------------------------------------------------------------------------------------------------------------
# On a whole model


@dataclass(frozen=True, eq=False)
class SparsityReport:
    """PPL-p % sparsity of a model.

    Args:
        p: The rise of perplexity that was allowed, in per cent.
        cett: The common target that was found.
        thresholds: Down projection -> threshold on a unit's contribution.
        activation_ratio: Shape ``(layers, tokens)``: share of units that stay active.
        ppl_ratio: Perplexity with the units silenced over without.
    """

    p: float
    cett: float
    thresholds: Mapping[str, float]
    activation_ratio: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    ppl_ratio: float

    @property
    def sparsity(self) -> float:
        """Share of units that are silenced, over all layers and tokens."""
        return 1.0 - float(self.activation_ratio.mean())


@contextmanager
def sparse_ffn(model: nn.Module, thresholds: Mapping[str, float]) -> Iterator[dict[str, list[Tensor]]]:
    """Silence, in every pass while the context is open, the units whose contribution is below their threshold.

    Args:
        model: The network.
        thresholds: Qualified name of a down projection -> threshold on ``|h_i| |W[:, i]|``.

    Yields:
        For each down projection, the share of active units per token of every call, as the passes run.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.eye(2))
        >>> with sparse_ffn(model, {"0": 3.5}) as active:
        ...     model(torch.tensor([3.0, 4.0]))
        tensor([0., 4.], grad_fn=...)
        >>> active["0"]
        [tensor(0.5000)]
    """
    active: dict[str, list[Tensor]] = {name: [] for name in thresholds}
    handles = []

    def silencer(name: str, threshold: float) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            h = args[0]
            kept = neuron_magnitudes(h.detach(), down_weight(module, h.shape[-1])) >= threshold
            active[name].append(kept.float().mean(dim=-1))
            return (h * kept, *args[1:])

        return hook

    try:
        for name, threshold in thresholds.items():
            handles.append(module_at(model, name).register_forward_pre_hook(silencer(name, threshold)))
        yield active
    finally:
        for handle in handles:
            handle.remove()


def down_weight(module: nn.Module, hidden: int) -> Tensor:
    """A projection's weight as ``(out, hidden)``, also when it is stored transposed as GPT-2 does.

    Raises:
        InputError: A module without a matrix that reads ``hidden`` units.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        if isinstance(module, nn.Linear) or weight.shape[0] != hidden:
            if weight.shape[1] == hidden:
                return weight.detach()
        else:
            return weight.detach().T
    raise InputError(f"{type(module).__name__} is no projection that reads {hidden} hidden units.")


def down_projections(model: nn.Module, anatomy: Any) -> dict[str, int]:
    """Dense feed-forwards' down projections, qualified name -> block index, in order of depth."""
    return {
        branch.feed_forward.down.module: block.index
        for block in anatomy.blocks
        for branch in block.branches
        if branch.feed_forward is not None
        and branch.feed_forward.experts == 1
        and branch.feed_forward.down is not None
        and isinstance(getattr(module_at(model, branch.feed_forward.down.module), "weight", None), Tensor)
    }


def ppl_sparsity(
    model: nn.Module,
    batch: Any,
    ffns: Sequence[str] | None = None,
    p: float = 1.0,
    tol: float = 1e-6,
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    num: int = 65536,
    progress: Progress | None = None,
) -> SparsityReport:
    """PPL-p % sparsity of a language model. The model is untouched afterwards.

    Thresholds are found and judged on the same tokens, which favours them a little.

    Args:
        model: The network.
        batch: One batch; ``attention_mask``, if it has one, leaves padding out.
        ffns: Qualified names of the down projections; found by tracing the model when left out.
        p: Rise of perplexity allowed, in per cent.
        tol: Width of the bracket around the target at which bisection stops.
        forward: ``forward(model, batch)``; by default a dict is passed as keyword arguments, a tuple as positional.
        loss: ``loss(output, batch)``, mean nats per token; by default next-token cross-entropy of ``output.logits``.
        num: Points of the grid that `find_threshold` searches.
        progress: ``progress(done, total, text)``.

    Returns:
        The report.

    Raises:
        InputError: ``p`` that is not positive, no feed-forwards, or an empty mask.

    Reference:
        Luo et al., 2024, arXiv 2411.02335.
    """
    if not p > 0:
        raise InputError(f"p must be positive (per cent of perplexity), got {p}.")
    if ffns is None:
        from setpoint.surgery import Anatomy

        anatomy = Anatomy.trace(model, batch, forward=forward)
        ffns = list(down_projections(model, anatomy))
        if not ffns:
            found = ", ".join(sorted({branch.role for block in anatomy.blocks for branch in block.branches}))
            raise InputError(
                f"No feed-forward with a down projection was found in {type(model).__name__} (branches found: "
                f"{found or 'none'}). Name the projections: ffns=['layers.0.mlp.down', ...]."
            )
    if not ffns:
        raise InputError("ffns is empty: name the down projections, e.g. 'layers.0.mlp.down'.")
    run = forward or run_batch
    measure = loss or _predicted
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    with torch.no_grad():
        taps = {name: Tap(name, "input") for name in ffns}
        with caught(model, list(taps.values())) as hidden:
            dense = float(measure(run(model, batch), batch))
        missing = [name for name, tap in taps.items() if tap not in hidden]
        if missing:
            raise InputError(f"These feed-forwards did not run in this pass: {', '.join(missing)}.")
        layers = {
            name: _Layer.of(
                hidden[tap],
                down_weight(module_at(model, name), hidden[tap].shape[-1]),
                None if mask is None else mask.bool(),
                num,
            )
            for name, tap in taps.items()
        }

        def trial(target: float) -> tuple[dict[str, float], float, dict[str, list[Tensor]]]:
            thresholds = {name: layer.threshold(target) for name, layer in layers.items()}
            with sparse_ffn(model, thresholds) as active:
                sparse = float(measure(run(model, batch), batch))
            return thresholds, exp(min(sparse - dense, 700.0)), active

        low, high = 0.0, 1.0
        steps = max(1, int(np.ceil(np.log2(1.0 / tol))))
        for step in range(steps):
            if progress is not None:
                progress(step, steps, "silencing hidden units")
            middle = (low + high) / 2
            low, high = (middle, high) if trial(middle)[1] < 1 + p / 100 else (low, middle)
        target = (low + high) / 2
        thresholds, ratio, active = trial(target)
    keep = None if mask is None else mask.bool().flatten().cpu()
    rows = [torch.cat([a.flatten() for a in active[name]]).cpu() for name in ffns]
    table = torch.stack([row if keep is None else row[keep] for row in rows]).double().numpy()
    return SparsityReport(p, target, thresholds, table, ratio)


def _predicted(output: Any, batch: Any) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it, padding left out."""
    logits = output.logits if hasattr(output, "logits") else output
    ids = batch.get("labels", batch["input_ids"]) if isinstance(batch, Mapping) else batch
    ids = ids[0] if isinstance(ids, tuple) else ids
    targets = ids[:, 1:].clone()
    if isinstance(batch, Mapping) and batch.get("attention_mask") is not None:
        targets[~batch["attention_mask"][:, 1:].bool()] = -100
    return next_token_loss(logits[:, :-1], {"targets": targets})


@dataclass(frozen=True)
class SilencedNeurons(Intervention):
    """PPL-p % sparsity of a language model's feed-forwards: always ``info``, a potential rather than a fault.

    Args:
        p: Rise of perplexity allowed, in per cent (Luo et al., 2024, recommend 1).
        tol: Bisection stops at this width (setpoint: the sparsity then moves by under one point).
        num: Points of the threshold grid.
    """

    p: float = 1.0
    tol: float = 2.0**-8
    num: int = 2048

    code: ClassVar[str] = ActivationSparsity.code
    title: ClassVar[str] = "How many hidden units can be silenced"
    explanation: ClassVar[str] = (
        "For each token the hidden units that contribute least to a feed-forward's output are silenced until "
        "perplexity has risen by one per cent: the share silenced is the sparsity that a kernel could use without "
        "noticeable loss, whatever the activation function. Trained ReLU models reach 90 % and more, SiLU models 60 "
        "to 70 % (Luo et al., 2024). Thresholds were found and judged on the same text, which favours them a little."
    )

    def __call__(self, subject: Subject, trace: Trace) -> list[Finding]:
        """At most one finding; none without a language-model head or without dense feed-forwards."""
        if trace.task != "language-model" or subject.loss is None:
            return []
        ffns = down_projections(subject.model, subject.anatomy)
        if not ffns:
            return []
        report = ppl_sparsity(
            subject.model,
            subject.batches[0],
            list(ffns),
            self.p,
            self.tol,
            forward=subject.forward,
            loss=subject.loss,
            num=self.num,
            progress=subject.progress,
        )
        per_layer = report.activation_ratio.mean(axis=1)
        least = int(per_layer.argmin())
        most = int(per_layer.argmax())
        blocks = list(ffns.values())
        sites = {r.site.block: r.site.name for r in trace.by_role("hidden")}
        return [
            self.finding(
                "perplexity",
                "info",
                value=report.sparsity,
                unit=f"share silenced at +{rounded(self.p)} % perplexity",
                threshold=self.p / 100,
                source="Luo et al., 2024 · arXiv 2411.02335: PPL-1 % sparsity",
                sites=[sites.get(blocks[i], f"block {blocks[i]}") for i in np.argsort(per_layer)],
                evidence=f"{percent(report.sparsity)} of the hidden units can be silenced per token for a rise of "
                f"perplexity by {100 * (report.ppl_ratio - 1):.2f} %; from {percent(1 - per_layer[most])} in block "
                f"{blocks[most]} to {percent(1 - per_layer[least])} in block {blocks[least]}.",
                numbers={
                    "sparsity": report.sparsity,
                    "cett": report.cett,
                    "ppl_ratio": report.ppl_ratio,
                    "layers": len(ffns),
                    "tokens": int(report.activation_ratio.shape[1]),
                },
                chart=profile(
                    f"Hidden units that stay active at +{rounded(self.p)} % perplexity",
                    "share",
                    {"active": [(b, float(v)) for b, v in zip(blocks, per_layer, strict=True)]},
                ),
            )
        ]

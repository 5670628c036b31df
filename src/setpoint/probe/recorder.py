"""`record`: from a model and its batches to a trace, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.probe.recorder_gradient import gather
from setpoint.probe.recorder_hooks import Groups, Recorder, Wanted
from setpoint.progress import Progress
from setpoint.running import run_batch, scalar_loss, untouched, unwrap
from setpoint.types import Site, SiteRole, Stat, Task, Trace

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy

_STREAM = frozenset({Stat.MOMENTS, Stat.TAILS, Stat.MEDIAN, Stat.PEAKS, Stat.CHANNELS, Stat.COSINE, Stat.STEP})
CHEAP: Mapping[SiteRole, frozenset[Stat]] = {
    "embedding": _STREAM,
    "residual": _STREAM,
    "branch": frozenset({Stat.MOMENTS}),
    "norm": frozenset({Stat.MOMENTS, Stat.TAILS, Stat.CHANNELS}),
    "hidden": frozenset({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS}),
    "convolution": frozenset({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS}),
    "attention": frozenset({Stat.ATTENTION}),
    "logits": frozenset({Stat.MOMENTS}),
}
"""What is recorded by default: everything that costs one pass over the tensors that matter."""


def record(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    anatomy: Anatomy | None = None,
    sites: Sequence[Site] | None = None,
    needs: Wanted | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    groups: Groups | None = None,
    task: Task = "other",
    progress: Progress | None = None,
    exact: bool = False,
    top_k: int = 8,
) -> Trace:
    """Run a model over batches and record the signals inside it.

    The model runs in eval mode, without gradients unless a loss is given, and is afterwards as it was: no hook, the
    same modes, buffers and random state, the same ``.grad`` of every parameter.

    Args:
        model: The network.
        batches: Tensors, tuples (positional arguments) or dicts (keyword arguments).
        anatomy: Its structure, if it has been traced already; otherwise it is traced on the first batch.
        sites: Where to measure; the anatomy's sites when None.
        needs: Statistics to take everywhere, or per role of site; `CHEAP` when None.
        forward: ``forward(model, batch)``, if calling the model takes more than its batch.
        loss: ``loss(output, batch)``, a scalar; adds its gradients by every parameter and at the sites of the stream.
        groups: Token groups, name -> bool mask ``(batch, tokens)`` or a callable from batch to mask.
        task: The model's task, kept in the trace.
        progress: ``progress(done, total, text)`` after each batch; ``total`` is 0 if the batches have no length.
        exact: Take medians from all values; memory then grows with the tokens.
        top_k: How many of the largest entries to keep per site.

    Returns:
        The trace.

    Raises:
        InputError: There are no batches, the loss is no scalar, or no site was reached.

    Example:
        >>> from setpoint.types import Tap
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> site = Site("relu", "hidden", Tap("1", "output"))
        >>> trace = record(model, [torch.randn(2, 3, 4)], sites=[site])
        >>> trace.sequences, trace.tokens, trace.records["relu"].channel_max.shape
        (2, 6, (8,))
    """
    inner = unwrap(model)
    forward = forward or run_batch
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("There is nothing to record: batches is empty. Give at least one batch.")
    if anatomy is None and sites is None:
        from setpoint.surgery import Anatomy

        anatomy = Anatomy.trace(inner, first, forward=forward)
    if sites is None:
        assert anatomy is not None
        sites = anatomy.sites()
    wanted = with_gradients(needs or CHEAP) if loss is not None else needs or CHEAP
    recorder = Recorder(inner, sites, needs=wanted, groups=groups, exact=exact, top_k=top_k)
    total = len(batches) if isinstance(batches, Sized) else 0
    losses: list[tuple[float, int]] = []
    with untouched(inner), fresh_gradients(inner), recorder:
        for done, batch in enumerate(_chain(first, iterator)):
            if progress is not None:
                progress(done, total, "recording")
            before = recorder.tokens
            recorder.begin(batch)
            with torch.set_grad_enabled(loss is not None):
                output = forward(inner, batch)
                if loss is not None:
                    value = scalar_loss(loss(output, batch))
                    value.backward()  # type: ignore[no-untyped-call]
                    losses.append((float(value.detach()), recorder.tokens - before))
            del output
            if loss is not None:
                inner.zero_grad(set_to_none=True)
    if progress is not None:
        progress(total, total, "recording")
    blocks = anatomy.blocks if anatomy is not None else ()
    return recorder.trace(
        task=task,
        blocks=len(blocks) if anatomy is not None else None,
        loss=_mean(losses),
        structure=anatomy.structure if anatomy is not None else frozenset(),
        block_of=block_finder([(block.name, block.index) for block in blocks]),
    )


def with_gradients(needs: Wanted) -> Wanted:
    """The needs with gradients at the residual stream added."""
    if not isinstance(needs, Mapping):
        return frozenset(needs) | {Stat.GRADIENT}
    stream: tuple[SiteRole, ...] = ("embedding", "residual")
    return {**needs, **{role: frozenset(needs.get(role, ())) | {Stat.GRADIENT} for role in stream}}


@contextmanager
def fresh_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside; what was there comes back afterwards."""
    held = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _mean(losses: Sequence[tuple[float, int]]) -> float | None:
    """Mean over tokens, and over processes."""
    if not losses:
        return None
    shares = [pair for part in gather(list(losses)) for pair in part]
    weight = sum(tokens for _, tokens in shares)
    return float(sum(value * tokens for value, tokens in shares) / weight) if weight else float(shares[0][0])


def block_finder(blocks: Sequence[tuple[str, int]]) -> Callable[[str], int | None]:
    """Which block a parameter belongs to: the one with the longest name that is a prefix of the parameter's."""
    ordered = sorted(blocks, key=lambda block: -len(block[0]))

    def block_of(name: str) -> int | None:
        return next((index for block, index in ordered if block and name.startswith(f"{block}.")), None)

    return block_of


__all__ = ["CHEAP", "Groups", "Recorder", "Wanted", "record", "run_batch"]

"""The one training loop: any model, any batches, any loss, on Lightning Fabric.

    from setpoint import data
    from setpoint.train import AdamW, Cosine, train

    text = data.text("python-stdlib", context=128)
    history = train(model, text.batches("train", 32, seed=0), data.next_token_loss, steps=1000,
                    optimizer=AdamW(lr=3e-3), schedule=Cosine(warmup=100), clip=1.0,
                    evaluate=text.batches("valid", 64, limit=256), evaluate_every=200, checkpoint="runs/first")

Under torchrun the same call trains on many processes: ``strategy="ddp"`` or ``"fsdp"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from setpoint.data.batches import Batches, run_inputs
from setpoint.errors import InputError
from setpoint.progress import Progress
from setpoint.running import kept_modes, scalar_loss, unwrap
from setpoint.train.checkpoints import Checkpoint, Shelf
from setpoint.train.evaluation import evaluation_for, move
from setpoint.train.failure import failure
from setpoint.train.feed import Feed
from setpoint.train.history import History, Run, items_in, tell
from setpoint.train.progress import shown
from setpoint.train.random import kept, put_seed
from setpoint.train.recipes import AdamW, Constant, Cosine, Recipe, Schedule

Loss = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


def train(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    *,
    steps: int,
    optimizer: Recipe | torch.optim.Optimizer | None = None,
    schedule: Schedule | None = None,
    forward: Forward = run_inputs,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Any = "32-true",
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: Any = "auto",
    seed: int = 0,
    evaluate: Iterable[Any] | Callable[[nn.Module], Any] | None = None,
    evaluate_every: int | None = None,
    callbacks: Sequence[Any] = (),
    checkpoint: str | Path | Checkpoint | None = None,
    resume: bool = True,
    progress: Progress | bool = True,
) -> History:
    """Train a model in place.

    With ``checkpoint`` the run can be cut off at any time; the same call goes on from the last checkpoint, and the
    loss curve is the one of a run that was never cut off (bit for bit on one machine, with deterministic kernels).

    Args:
        model: The network; trained in place, all of it in train mode (a callback's ``on_start`` may put parts back into
            eval mode), and in its own modes again afterwards.
        data: Batches, endless or not (an iterable that ends is started again). Of several processes each takes every
            n-th batch, so ``n`` processes make the steps of one that accumulates ``n`` batches.
        loss: ``loss(output, batch)``, a scalar that is a mean over the batch.
        steps: Updates to make.
        optimizer: A recipe (`AdamW`, `SGD`, or anything with ``build(model)``), or an optimizer over the model's
            parameters, whose learning rates are taken as the peaks and are there again afterwards; ``AdamW()`` when
            None.
        schedule: Learning rate as a share of the peak, ``schedule(step, steps)``; ``Cosine()`` when None.
        forward: ``forward(model, batch)``; by default inputs go to the model and targets to the loss
            (`setpoint.data.run_inputs`).
        accumulate: Batches for each update; their losses are averaged.
        clip: Largest norm of the gradient; None for no clipping.
        precision: ``"32-true"``, ``"bf16-mixed"``, ``"bf16-true"``, ``"16-mixed"``.
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        devices, num_nodes: Processes on each machine, and machines; under torchrun, what it started.
        strategy: ``"auto"``, ``"ddp"``, ``"fsdp"``, or a strategy of Fabric.
        seed: Of dropout and of the data's own random draws. The generators are as they were afterwards.
        evaluate: Batches of one pass, which give ``{"loss": mean}``; an `Evaluation` with metrics; or any callable
            from the model to a dict of numbers.
        evaluate_every: Steps between evaluations; there is always one after the last step.
        callbacks: Objects with any of the methods of `Callback`.
        checkpoint: A folder, or a `Checkpoint`. The page on a loss that stopped being a number is kept there too.
        resume: Go on from the newest checkpoint in that folder; False removes what is there.
        progress: True for a bar on a terminal, False for nothing, or ``progress(done, total, text)``.

    Returns:
        The history: losses, evaluations, tokens or samples per second.

    Raises:
        InputError: Settings, data or a checkpoint that can't be used.
        NonFiniteLoss: The loss or its gradient became infinite or not a number; no update was made of it, and the error
            carries a report on the moment before.

    Example:
        >>> from setpoint import data
        >>> digits = data.images("digits")
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> history = train(model, digits.batches("train", 64), data.label_loss, steps=40, optimizer=AdamW(lr=0.02),
        ...                 evaluate=digits.batches("valid", 200), accelerator="cpu", progress=False)
        >>> history.losses[-1] < 0.5 < history.losses[0], sorted(history.final)
        (True, ['loss', 'step'])
    """
    _check(steps=steps, accumulate=accumulate, evaluate_every=evaluate_every)
    if clip is not None and clip <= 0:
        raise InputError(f"expected clip above 0 or None, got {clip}")
    from setpoint.train.strategies import fabric_for  # Fabric takes seconds to import; recipes are wanted without it

    fabric = fabric_for(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision
    )
    fabric.launch()
    recipe, schedule = optimizer or AdamW(), schedule or Cosine()
    with kept(), kept_modes(model):
        put_seed(seed + fabric.global_rank)
        loop = _Loop(
            fabric=fabric,
            model=model,
            feed=Feed(data, seed=seed, rank=fabric.global_rank, world_size=fabric.world_size),
            loss=loss,
            forward=forward,
            recipe=recipe,
            schedule=schedule,
            steps=steps,
            accumulate=accumulate,
            clip=clip,
            evaluate=evaluation_for(evaluate, loss, forward),
            evaluate_every=evaluate_every,
            callbacks=tuple(callbacks),
        )
        with loop.peaks_kept():
            if checkpoint is not None:
                plan = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
                settings = {
                    "steps": steps if not isinstance(schedule, Constant) else "any",
                    "optimizer": _described(recipe),
                    "schedule": schedule,
                    "accumulate": accumulate,
                    "clip": clip,
                    "precision": precision,
                    "seed": seed,
                    "processes": fabric.world_size,
                    "data": _named(data),
                }
                loop.attach(Shelf(plan, fabric, settings), resume)
            loop.run(progress)
    return loop.state.history


@dataclass(slots=True, kw_only=True)
class _Loop:
    """Everything a run needs, once."""

    fabric: Any
    model: nn.Module
    feed: Feed
    loss: Loss
    forward: Forward
    recipe: Recipe | torch.optim.Optimizer
    schedule: Schedule
    steps: int
    accumulate: int
    clip: float | None
    evaluate: Callable[[nn.Module], Any] | None
    evaluate_every: int | None
    callbacks: tuple[Any, ...]
    wrapped: Any = None
    optimizer: Any = None
    rates: tuple[float, ...] = ()
    state: Run = None  # type: ignore[assignment]
    shelf: Shelf | None = None

    def __post_init__(self) -> None:
        fabric, recipe = self.fabric, self.recipe
        if isinstance(recipe, torch.optim.Optimizer):
            _refuse_strangers(recipe, self.model)
            if type(fabric.strategy).__name__ == "ModelParallelStrategy":
                raise InputError("fsdp replaces the parameters that an optimizer holds; give a recipe such as AdamW()")
        self.wrapped = fabric.setup_module(self.model)
        inner = unwrap(self.model)
        built = recipe if isinstance(recipe, torch.optim.Optimizer) else recipe.build(inner)
        self.rates = tuple(float(group["lr"]) for group in built.param_groups)
        self.optimizer = fabric.setup_optimizers(built)
        self.state = Run(inner, built, self.steps, History(), is_main=fabric.is_global_zero)

    # -- the course of a run ------------------------------------------------------------------------------------------

    @contextmanager
    def peaks_kept(self) -> Iterator[None]:
        """Put the peak learning rates back at the end: an optimizer that was given is the caller's."""
        try:
            yield
        finally:
            self._set_rates(1.0)

    def attach(self, shelf: Shelf, resume: bool) -> None:
        """Save to a shelf from now on, and go on from its newest checkpoint if that is wanted."""
        self.shelf = shelf
        newest = self.fabric.broadcast(shelf.newest())
        if newest is None:
            return
        if resume:
            self.state.step, self.state.history = shelf.load(newest, self._objects(), self.callbacks)
        else:
            shelf.clear()

    def run(self, progress: Progress | bool) -> None:
        """Every step that is left."""
        state = self.state
        done = state.step
        if done >= self.steps:
            return
        batches = self.feed.from_batch(done * self.accumulate)
        self.wrapped.train()
        tell(self.callbacks, "on_start", state)
        try:
            with shown(progress, main=state.is_main) as show:
                while state.step < self.steps and not state.stop:
                    self._step(batches)
                    tell(self.callbacks, "on_step", state)
                    last = state.step == self.steps or state.stop
                    if self.evaluate and (last or (self.evaluate_every and state.step % self.evaluate_every == 0)):
                        self._evaluate(self.evaluate)
                    if self.shelf and (state.stop or self.shelf.plan.due(state.step, self.steps)):
                        self.shelf.save(state.step, state.history, self._objects(), self.callbacks)
                    show(state)
        finally:
            tell(self.callbacks, "on_end", state)

    def _objects(self) -> dict[str, Any]:
        return {"model": self.wrapped, "optimizer": self.optimizer}

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, stream: Iterator[Any]) -> None:
        state, fabric = self.state, self.fabric
        start = perf_counter()
        state.batches = tuple(move(next(stream), fabric.device) for _ in range(self.accumulate))
        factor = self.schedule(state.step, self.steps)
        rate = self.rates[0] * factor
        self._set_rates(factor)
        self.optimizer.zero_grad(set_to_none=True)
        tell(self.callbacks, "on_step_start", state)
        total: Any = 0.0
        for place, batch in enumerate(state.batches):
            more = place < self.accumulate - 1
            with fabric.no_backward_sync(self.wrapped) if more and fabric.world_size > 1 else nullcontext():
                value = scalar_loss(self.loss(self.forward(self.wrapped, batch), batch))
                fabric.backward(value / self.accumulate if self.accumulate > 1 else value)
            total += value.detach() / self.accumulate if self.accumulate > 1 else value.detach()
        if fabric.world_size > 1:
            total = fabric.all_reduce(total, reduce_op="mean")
        state.loss = float(total)
        if not math.isfinite(state.loss):
            self._fail(rate)
        tell(self.callbacks, "on_backward", state)
        state.gradient_norm = self._gradient_norm()
        # A scaler of float16 gradients meets infinite ones now and then, and skips the update.
        if not math.isfinite(state.gradient_norm) and not self._scales():
            self._fail(rate)
        self.optimizer.step()
        state.step += 1
        history = state.history
        history.steps.append(state.step)
        history.losses.append(state.loss)
        history.rates.append(rate)
        history.items += sum(map(items_in, state.batches)) * fabric.world_size
        history.seconds += perf_counter() - start

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self.state.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def _gradient_norm(self) -> float:
        """The norm over all parameters, of what is then clipped if that is wanted."""
        if self.clip is not None:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=self.clip, error_if_nonfinite=False
            )
        else:
            parameters = (p for group in self.state.optimizer.param_groups for p in group["params"])
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return float(getattr(norm, "full_tensor", lambda: norm)())  # of gradients that are sharded over processes

    def _evaluate(self, evaluate: Callable[[nn.Module], Any]) -> None:
        state = self.state
        # The wrapper carries autocast; random numbers are kept, so that how often one looks does not change the run.
        with kept(), kept_modes(state.model), self.fabric.autocast():
            found = evaluate(state.model)
        state.history.evaluations.append({"step": state.step, **{k: float(v) for k, v in dict(found).items()}})
        tell(self.callbacks, "on_evaluate", state)

    def _scales(self) -> bool:
        return getattr(self.fabric.strategy.precision, "scaler", None) is not None

    def _fail(self, rate: float) -> NoReturn:
        state = self.state
        error = failure(
            state.model,
            state.batches,
            loss=self.loss,
            forward=self.forward,
            value=state.loss,
            norm=state.gradient_norm,
            step=state.step + 1,
            rate=rate,
            history=state.history,
        )
        if self.shelf and error.report is not None and state.is_main:
            error.report.to_html(self.shelf.folder / f"non-finite-step-{error.step}.html")
        raise error


def _described(optimizer: Recipe | torch.optim.Optimizer) -> str:
    """A recipe, or an optimizer and the settings of its groups."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return str(optimizer)
    groups = ({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
    words = (
        ", ".join(f"{k}={v.tolist() if isinstance(v, Tensor) else v}" for k, v in group.items()) for group in groups
    )
    return f"{type(optimizer).__name__}({'; '.join(words)})"


def _named(data: Iterable[Any]) -> str:
    """What can be told of the data without reading it; enough to notice another order or batch size."""
    if isinstance(data, Batches):
        return f"of {data.count:,} items in batches of {data.batch_size} by seed {data.seed}"
    return type(data).__name__


def _check(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"expected {name} of at least 1, got {count}")


def _refuse_strangers(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise InputError("The optimizer holds no parameter of this model; build it from model.parameters().")

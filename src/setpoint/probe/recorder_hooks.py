"""Hook a model once, keep streaming statistics, leave it as it was.

    with Recorder(model, sites, needs={Stat.MOMENTS}) as recorder:
        for batch in batches:
            model(batch)
    trace = recorder.trace()

A site's tensor is reduced the moment a plain forward hook sees it (`setpoint.probe.stat_kernels`) and is then let go:
what stays is O(sites × channels). Gradients arrive through tensor hooks, never through full module backward hooks,
which break models that write ``y += x``.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from setpoint.errors import InputError, nearest
from setpoint.probe.recorder_attention import CoreListener, RowSums, settle_cores
from setpoint.probe.recorder_gradient import ParameterWatch, gather, in_backward, watch_gradient
from setpoint.probe.recorder_inputs import Inputs
from setpoint.probe.stat_kernels import sum_of_squares
from setpoint.probe.stat_observe import Later, Stream, observe, settle_all
from setpoint.probe.stat_scratch import Scratch
from setpoint.probe.statistics import AttentionStatistics, Magnitudes, Peaks, SiteStatistics, merge_sites
from setpoint.running import plain_execution, tensors_of, unwrap
from setpoint.types import Site, SiteRole, Stat, Task, Trace

Wanted = Collection[Stat] | Mapping[SiteRole, Collection[Stat]]
Groups = Mapping[str, Tensor | Callable[[Any], Tensor]]

_NOTHING: AbstractContextManager[Any] = nullcontext()
_STREAM_ROLES: frozenset[SiteRole] = frozenset({"embedding", "residual"})
_GROUP_ROLES: frozenset[SiteRole] = frozenset({"embedding", "residual", "branch", "norm"})


class Recorder:
    """Records statistics at sites of a model while it runs.

    Args:
        model: The network. DDP and compiled wrappers are looked through; compiled code runs eagerly while recording.
        sites: Where to measure, e.g. ``Anatomy.trace(model, batch).sites()``.
        needs: Statistics to take everywhere, or per role of site; a role that is not named is not recorded.
        groups: Token groups, name -> bool mask of shape ``(batch, tokens)`` or ``(tokens,)``, or a callable from the
            batch to such a mask.
        top_k: How many of the largest entries to keep per site.
        exact: Take medians from all values instead of a histogram. Memory then grows with the tokens.
        query_rows: Query rows per head and sequence that attention statistics use.
        parameters: The watch on the parameters, if it was made before: while a sharded model runs, its modules hold
            other tensors than the ones that stay.

    Raises:
        InputError: A site's module does not exist, or two sites have one name.

    Example:
        >>> from setpoint.types import Tap
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> site = Site("relu", "hidden", Tap("1", "output"))
        >>> with Recorder(model, [site], needs={Stat.MOMENTS, Stat.ZEROS}) as recorder:
        ...     _ = model(torch.randn(2, 3, 4))
        >>> recorder.trace().records["relu"].minimum
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        needs: Wanted,
        groups: Groups | None = None,
        top_k: int = 8,
        exact: bool = False,
        query_rows: int = 32,
        parameters: ParameterWatch | None = None,
    ) -> None:
        self.model = unwrap(model)
        if self.model is not model and is_compiled(model):
            warnings.warn("A compiled model is recorded eagerly: run `recorder.model`.", stacklevel=2)
        self._modules = dict(self.model.named_modules(remove_duplicate=False))
        wanted = {site.name: frozenset(_needs_at(needs, site.role)) for site in sites}
        self.sites = tuple(site for site in sites if wanted[site.name])
        _refuse_bad_sites(self.sites, self._modules)
        self._statistics: dict[str, SiteStatistics] = {}
        for site in self.sites:
            if site.role != "attention":
                kept = SiteStatistics(wanted=wanted[site.name], peaks=Peaks(top_k))
                if exact and Stat.MEDIAN in kept.wanted:
                    kept.magnitudes = Magnitudes(values=[])
                self._statistics[site.name] = kept
        self._attention: dict[str, AttentionStatistics] = {}
        asked = needs.values() if isinstance(needs, Mapping) else (needs,)
        self._follows_gradients = any(Stat.GRADIENT in stats for stats in asked)  # of parameters, wherever sites are
        self._parameters = parameters or ParameterWatch(self.model, late=is_distributed(model))
        self._taps: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            self._taps[site.tap.module].append(site)
        self._keeps_stream = any(Stat.STEP in stats for stats in wanted.values())
        self._scratch = Scratch()
        self._inputs = Inputs(groups or {})
        self._calls: dict[str, int] = defaultdict(int)
        self._stream: _Written | None = None
        self._cores: list[_Cores] = []
        self._later: Later = []
        self._later_cores: list[tuple[str, list[RowSums]]] = []
        self._listener = CoreListener(self._core_found, query_rows, self._inputs.valid_queries)
        self._order: dict[str, None] = {}
        self._first_sequence = 0
        self._pass = (0, 0)
        self._stack: ExitStack | None = None
        self.tokens = 0
        self.sequences = 0

    # -- life of a recording ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Put the hooks in place."""
        if self._stack is not None:
            raise InputError("This recorder is already recording. Leave its `with` block before entering it again.")
        with ExitStack() as stack:
            stack.enter_context(plain_execution())
            root = self.model.register_forward_pre_hook(self._begin_pass, with_kwargs=True, prepend=True)
            stack.callback(root.remove)
            for name, sites in self._taps.items():
                for handle in self._hook(name, sites):
                    stack.callback(handle.remove)
            stack.enter_context(self._parameters)
            stack.callback(self._settle)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every hook, also after an exception."""
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.__exit__(kind, error, trace)

    def begin(self, batch: Any) -> None:
        """Announce the next batch.

        Only needed when the forward does not call the model itself (``model.get_image_features(...)``), or when
        group callables expect something other than the model's own inputs.
        """
        self._inputs.announce(batch)
        self._next_pass()

    def trace(
        self,
        *,
        task: Task = "other",
        blocks: int | None = None,
        loss: float | None = None,
        facts: Mapping[str, float] | None = None,
        structure: frozenset[str] = frozenset(),
        block_of: Callable[[str], int | None] | None = None,
    ) -> Trace:
        """What was recorded, merged over all processes when `torch.distributed` runs (all of them must call it).

        Args:
            task: The model's task.
            blocks: Number of blocks; read from the sites when None.
            loss: Mean loss, if one was computed.
            facts: Numbers about the model to add to those of the recording.
            structure: What the model has, see `setpoint.types.Trace`.
            block_of: Block of a parameter by its qualified name.

        Raises:
            InputError: No site was reached.
        """
        self._settle()
        self._reduce()
        self._inputs.demand_groups()
        if not self._order and (self.sites or not self.sequences):
            raise InputError(
                f"Nothing was recorded at {len(self.sites)} sites. Run the model inside `with recorder:` (for a "
                "compiled model, run `recorder.model`)."
            )
        records = {n: self._statistics[n].record(self._site(n)) for n in self._order if n in self._statistics}
        attention = {n: self._attention[n].record(self._site(n)) for n in self._order if n in self._attention}
        numbered = [site.block for site in self.sites if site.block is not None]
        known = {"parameters": float(sum(p.numel() for p in self.model.parameters()))}
        lost = sum(gather(self._inputs.non_finite))
        if lost:
            known["non_finite_inputs"] = float(lost)
        logits = [r for r in records.values() if r.site.role == "logits"]
        if logits and logits[-1].tokens:
            known["vocabulary"] = float(logits[-1].count // logits[-1].tokens)
        return Trace(
            records=records,
            attention=attention,
            parameters=self._parameters.records(block_of or (lambda _: None)),
            blocks=blocks if blocks is not None else max(numbered, default=-1) + 1,
            task=task,
            sequences=self.sequences,
            tokens=self.tokens,
            loss=loss,
            facts={**known, **(facts or {})},
            structure=structure,
        )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _hook(self, name: str, sites: Sequence[Site]) -> list[Any]:
        module = self._modules[name]
        attentions = [site for site in sites if site.role == "attention"]
        inputs = [site for site in sites if site.role != "attention" and site.tap.side == "input"]
        outputs = [site for site in sites if site.role != "attention" and site.tap.side == "output"]

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if in_backward():  # recomputed under checkpointing; only what depends on the graph is of interest
                if inputs:
                    self._recomputed(inputs, (args, kwargs))
                return
            call = self._calls[name]
            self._calls[name] += 1
            if inputs:
                self._catch(inputs, call, (args, kwargs))
            if attentions:
                if not self._cores:  # one module that owns a core may hold another; the listener hears a core once
                    self._listener.__enter__()  # type: ignore[no-untyped-call]
                self._cores.append(_Cores([site for site in attentions if site.tap.call == call]))

        def after(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            if in_backward():
                if outputs:
                    self._recomputed(outputs, output)
                return
            if not (inputs or attentions):
                self._calls[name] += 1
            if attentions and self._cores:
                self._cores.pop()
                if not self._cores:
                    self._listener.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if outputs:
                self._catch(outputs, self._calls[name] - 1, output)

        handles: list[Any] = []
        if inputs or attentions:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if outputs or attentions:
            handles.append(module.register_forward_hook(after, always_call=bool(attentions)))
        return handles

    def _begin_pass(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not in_backward():
            self._inputs.arrive(args, kwargs)
            self._next_pass()
            self._count(*self._inputs.given)
            if self._follows_gradients and torch.is_grad_enabled():
                self._parameters.watch()

    def _next_pass(self) -> None:
        self._settle()
        self._calls.clear()
        self._stream = None
        self._first_sequence = self.sequences
        self._inputs.shape = None
        self._pass = (0, 0)

    def _count(self, sequences: int, length: int) -> None:
        """What the running pass carries: as its inputs tell, until the first site knows better."""
        tokens = self._inputs.tokens(sequences, length)
        self.sequences += sequences - self._pass[0]
        self.tokens += tokens - self._pass[1]
        self._pass = (sequences, tokens)

    def _settle(self) -> None:
        """Close the pass that may be open."""
        self._stream = None
        self._cores.clear()
        settle_all(self._later, self._scratch)
        self._later.clear()
        names = [name for name, _ in self._later_cores]
        for name, statistics in zip(names, settle_cores([rows for _, rows in self._later_cores]), strict=True):
            if name in self._attention:
                self._attention[name].add(statistics)
            else:
                self._attention[name] = statistics
        self._later_cores.clear()
        self._parameters.commit()

    def _catch(self, sites: Sequence[Site], call: int, carried: Any) -> None:
        due = [site for site in sites if site.tap.call == call]
        if not due:
            return
        tensors = tensors_of(carried)
        for site in due:
            if site.tap.index < len(tensors) and tensors[site.tap.index].is_floating_point():
                self._observe(site, tensors[site.tap.index])

    def _observe(self, site: Site, tensor: Tensor) -> None:
        statistics = self._statistics[site.name]
        self._order.setdefault(site.name)
        self._follow_gradient(site, tensor)
        with quiet(tensor.device):
            values = tensor.detach() if tensor.requires_grad else tensor
            values = _by_sequence(values, site.channel_axis, self._inputs.shape)
            if self._inputs.shape is None:
                self._inputs.shape = (values.shape[0], values.shape[1])
                self._count(*self._inputs.shape)
            statistics.dtype = statistics.dtype or str(tensor.dtype).removeprefix("torch.")
            self._measure(site, values, statistics)

    def _measure(self, site: Site, values: Tensor, statistics: SiteStatistics) -> None:
        sequences, length, width = values.shape
        groups = site.role in _GROUP_ROLES
        first = self._first_sequence
        if not values.is_contiguous() and site.channel_axis != -1:
            # A feature map with channels first: one image at a time, so that only one is copied.
            for i in range(sequences):
                selection = self._inputs.select(values[i : i + 1], groups, slice(i, i + 1))
                rows = values[i].contiguous()
                observe(rows, length, statistics, self._scratch, first_sequence=first + i, selection=selection)
            return
        rows = values.reshape(-1, width)
        before = self._stream
        follows = before is not None and before.block in (None, (site.block or 0) - 1) and site.role == "residual"
        squares = observe(
            rows,
            length,
            statistics,
            self._scratch,
            later=self._later,
            first_sequence=first,
            selection=self._inputs.select(values, groups),
            stream=before.stream if before and follows and before.stream.values.shape == rows.shape else None,
        )
        if self._keeps_stream and site.role in _STREAM_ROLES:
            kept = self._scratch.flat("stream", rows.numel(), rows, rows.dtype).view(rows.shape)
            self._stream = _Written(Stream(kept.copy_(rows), squares), site.block)

    def _core_found(self, compute: Callable[[], list[RowSums]]) -> None:
        site = self._cores[-1].next() if self._cores else None
        if site is None:
            return
        with quiet(None):
            parts = compute()
        self._order.setdefault(site.name)
        self._later_cores.append((site.name, parts))

    # -- gradients ----------------------------------------------------------------------------------------------------

    def _recomputed(self, sites: Sequence[Site], carried: Any) -> None:
        """Under reentrant checkpointing the graph exists in the recomputation only; its gradients are taken there."""
        tensors = tensors_of(carried)
        for site in sites:
            alone = self._calls[site.tap.module] == 1
            if alone and site.tap.index < len(tensors) and site.name not in self._inputs.followed:
                self._follow_gradient(site, tensors[site.tap.index])

    def _follow_gradient(self, site: Site, tensor: Tensor) -> None:
        statistics = self._statistics[site.name]
        if Stat.GRADIENT not in statistics.wanted or not tensor.requires_grad:
            return
        self._inputs.followed.add(site.name)
        self._parameters.watch()

        def arrived(gradient: Tensor) -> None:
            with quiet(gradient.device):
                statistics.gradient_squares += sum_of_squares(gradient)
                statistics.gradient_count += gradient.numel()

        watch_gradient(tensor, arrived)

    # -- results ------------------------------------------------------------------------------------------------------

    def _site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def _reduce(self) -> None:
        """Join what the other processes recorded; done once, at the end."""
        mine = (self._statistics, self._attention, self.sequences, self.tokens, tuple(self._order))
        everyone = gather(mine)
        if len(everyone) == 1:
            return
        self._statistics, self._attention, self.sequences, self.tokens, order = everyone[0]
        self._order = dict.fromkeys(order)
        for statistics, attention, sequences, tokens, order in everyone[1:]:
            merge_sites(self._statistics, statistics, self.sequences)
            for name, found in attention.items():
                if name in self._attention:
                    self._attention[name].add(found)
                else:
                    self._attention[name] = found
            self._order.update(dict.fromkeys(order))
            self.sequences += sequences
            self.tokens += tokens


@dataclass(slots=True)
class _Written:
    """The residual stream as the last site left it: what the next block starts from.

    Its values are a copy in a buffer that is reused, since models may add in place; ``block`` is the index of the
    block that wrote it, None for the embedding.
    """

    stream: Stream
    block: int | None


class _Cores:
    """The attention sites of one module call, handed out in the order in which its cores run."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._waiting = list(sites)

    def next(self) -> Site | None:
        return self._waiting.pop(0) if self._waiting else None


def quiet(device: torch.device | None) -> AbstractContextManager[Any]:
    """For arithmetic of our own inside somebody's forward: no graph, no autocast."""
    kind = device.type if device is not None else "cpu"
    if torch.is_autocast_enabled(kind):
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, enabled=False))
        return stack
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, below any DDP wrapper, is a wrapper made by `torch.compile`."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return hasattr(model, "_orig_mod")


def is_distributed(model: nn.Module) -> bool:
    """Whether a wrapper averages the gradients over processes at the end of the backward."""
    return isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel)


def _by_sequence(values: Tensor, axis: int, shape: tuple[int, int] | None) -> Tensor:
    """Values as (sequences, positions, channels); a view where possible."""
    values = values.movedim(axis, -1) if axis not in (-1, values.dim() - 1) else values
    if values.dim() == 2:
        if shape is not None and shape[0] * shape[1] == values.shape[0]:  # tokens of all sequences in one row of rows
            return values.reshape(*shape, values.shape[1])
        return values.unsqueeze(1)
    if values.dim() < 2:
        return values.reshape(1, 1, -1)
    return values.flatten(1, -2) if values.dim() > 3 else values


def _needs_at(needs: Wanted, role: SiteRole) -> Collection[Stat]:
    if isinstance(needs, Mapping):
        return needs.get(role, ())
    if role == "attention":
        return [stat for stat in needs if stat is Stat.ATTENTION]
    return [stat for stat in needs if stat is not Stat.ATTENTION]


def _refuse_bad_sites(sites: Sequence[Site], modules: Mapping[str, nn.Module]) -> None:
    names = [site.name for site in sites]
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubled:
        raise InputError(f"Two sites are called {doubled[0]!r}. Give each site a name of its own.")
    for site in sites:
        if site.tap.module not in modules:
            near = ", ".join(nearest(site.tap.module, modules))
            raise InputError(
                f"Site {site.name!r} is at module {site.tap.module!r}, which the model lacks; near: {near}."
            )


__all__ = ["Groups", "Recorder", "Wanted", "is_compiled", "quiet"]

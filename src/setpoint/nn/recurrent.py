"""Recurrent cells that normalize each weight's contribution at each time step (Ba, Kiros and Hinton, 2016).

In a recurrent network the summed inputs grow or shrink from step to step, and batch statistics would have to be kept
for each step. Layer normalization takes them from the step itself. In the LSTM each of the two matrix products and the
cell on its way out has a norm, shared over time::

    i, f, g, o = norm_ih(W_ih x_t) + norm_hh(W_hh h_{t-1}) + bias
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(norm_cell(c_t))

The cell that is carried on is *not* normalized. Gates stand in the order of `torch.nn.LSTMCell`, whose weights fit as
they are when the norms are taken out; a norm over all four gates does not depend on their order. (arXiv 1607.06450)
"""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.block.base import NormFactory
from setpoint.nn.norm.layernorm import LayerNorm

State = tuple[Tensor, Tensor]


class LNLSTMCell(nn.Module):
    """One step of a layer-normalized LSTM, called like `torch.nn.LSTMCell`.

    Args:
        input_size: Width of the input.
        hidden_size: Width H of the hidden state and of the cell.
        bias: Have a bias behind the two normalized products.
        norm_layer: Makes a norm from a width; ``torch.nn.Identity`` gives the plain cell.
        forget_bias: Where the forget gate's part of the bias starts; 1 keeps the cell open at first.
        device, dtype: Of the parameters.

    Shape:
        Input ``(N, input_size)`` or ``(input_size,)``; hidden state and cell ``(N, H)`` or ``(H,)``.

    Raises:
        InputError: A width below 1; on call, another width than ``input_size`` or ``hidden_size``.

    Reference:
        Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.

    Example:
        >>> h, c = LNLSTMCell(3, 5)(torch.randn(2, 3))
        >>> h.shape, c.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        norm_layer: NormFactory = LayerNorm,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_sizes("LNLSTMCell", input_size, hidden_size)
        self.input_size, self.hidden_size, self.forget_bias = input_size, hidden_size, forget_bias
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype)) if bias else None
        self.norm_ih = norm_layer(4 * hidden_size).to(device=device, dtype=dtype)
        self.norm_hh = norm_layer(4 * hidden_size).to(device=device, dtype=dtype)
        self.norm_cell = norm_layer(hidden_size).to(device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform within 1/√H as torch's cells have them, norms afresh, bias 0 but for the forget gate."""
        bound = 1 / sqrt(self.hidden_size)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            nn.init.constant_(self.bias[self.hidden_size : 2 * self.hidden_size], self.forget_bias)
        _reset(self.norm_ih, self.norm_hh, self.norm_cell)

    def forward(self, x: Float[Tensor, "*batch input"], state: State | None = None) -> State:
        """The next hidden state and cell; without a state, both start at zero."""
        _expect_width("LNLSTMCell", "an input", x, self.input_size)
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            state = zeros, zeros
        for name, tensor in zip(("a hidden state", "a cell"), state, strict=True):
            _expect_width("LNLSTMCell", name, tensor, self.hidden_size)
        return self.step(self.project(x), state)

    def project(self, x: Float[Tensor, "*batch input"]) -> Float[Tensor, "*batch gates"]:
        """What the input adds to the gates; it needs no state, so a sequence can be projected in one product."""
        projected: Tensor = self.norm_ih(nn.functional.linear(x, self.weight_ih))
        return projected if self.bias is None else projected + self.bias

    def step(self, projected: Float[Tensor, "*batch gates"], state: State) -> State:
        """The next hidden state and cell from a projected input."""
        h, c = state
        gates = projected + self.norm_hh(nn.functional.linear(h, self.weight_hh))
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.norm_cell(c)), c

    def extra_repr(self) -> str:
        """Widths and bias."""
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias is not None}, forget_bias={self.forget_bias}"


class LNGRUCell(nn.Module):
    """One step of a layer-normalized GRU, called like `torch.nn.GRUCell`.

    ``z, r = norm(W_zr x) + norm(U_zr h)``; ``n = tanh(norm(W_n x) + sigmoid(r) norm(U_n h))``;
    ``h' = (1 - sigmoid(z)) h + sigmoid(z) n``. The rows of ``weight_ih`` (W) and ``weight_hh`` (U) stand in the order
    z, r, n; in `torch.nn.GRUCell` the order is r, z, n and z keeps the old state instead of taking the new one.

    Args:
        input_size: Width of the input.
        hidden_size: Width H of the hidden state.
        bias: Have a bias behind each normalized product.
        norm_layer: Makes a norm from a width; ``torch.nn.Identity`` gives the plain cell.
        device, dtype: Of the parameters.

    Shape:
        Input ``(N, input_size)`` or ``(input_size,)``; hidden state ``(N, H)`` or ``(H,)``.

    Raises:
        InputError: A width below 1; on call, another width than ``input_size`` or ``hidden_size``.

    Reference:
        Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.

    Example:
        >>> LNGRUCell(3, 5)(torch.randn(2, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        norm_layer: NormFactory = LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_sizes("LNGRUCell", input_size, hidden_size)
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size, device=device, dtype=dtype)) if bias else None
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size, device=device, dtype=dtype)) if bias else None
        self.norm_ih = norm_layer(2 * hidden_size).to(device=device, dtype=dtype)
        self.norm_hh = norm_layer(2 * hidden_size).to(device=device, dtype=dtype)
        self.norm_in = norm_layer(hidden_size).to(device=device, dtype=dtype)
        self.norm_hn = norm_layer(hidden_size).to(device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform within 1/√H as torch's cells have them, norms afresh, biases 0."""
        bound = 1 / sqrt(self.hidden_size)
        for weight in (self.weight_ih, self.weight_hh):
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.bias_ih, self.bias_hh):
            if bias is not None:
                nn.init.zeros_(bias)
        _reset(self.norm_ih, self.norm_hh, self.norm_in, self.norm_hn)

    def forward(self, x: Float[Tensor, "*batch input"], h: Tensor | None = None) -> Float[Tensor, "*batch hidden"]:
        """The next hidden state; without one, it starts at zero."""
        _expect_width("LNGRUCell", "an input", x, self.input_size)
        if h is None:
            h = x.new_zeros(*x.shape[:-1], self.hidden_size)
        _expect_width("LNGRUCell", "a hidden state", h, self.hidden_size)
        ih = self._normed(nn.functional.linear(x, self.weight_ih), self.norm_ih, self.norm_in, self.bias_ih)
        hh = self._normed(nn.functional.linear(h, self.weight_hh), self.norm_hh, self.norm_hn, self.bias_hh)
        split = 2 * self.hidden_size
        z, r = torch.sigmoid(ih[..., :split] + hh[..., :split]).chunk(2, -1)
        n = torch.tanh(ih[..., split:] + r * hh[..., split:])
        return (1 - z) * h + z * n

    def _normed(self, summed: Tensor, gates: nn.Module, candidate: nn.Module, bias: Tensor | None) -> Tensor:
        split = 2 * self.hidden_size
        normed = torch.cat([gates(summed[..., :split]), candidate(summed[..., split:])], -1)
        return normed if bias is None else normed + bias

    def extra_repr(self) -> str:
        """Widths and bias."""
        return f"{self.input_size}, {self.hidden_size}, bias={self.bias_ih is not None}"


class LNLSTM(nn.Module):
    """A layer-normalized LSTM over sequences, called like `torch.nn.LSTM`.

    The input is projected for all steps at once; the steps themselves run in a Python loop, which on a CPU takes one to
    two times as long as torch's fused LSTM.

    Args:
        input_size: Width of the input.
        hidden_size: Width H of hidden state and cell.
        num_layers: Layers stacked on each other.
        bias: Have a bias in each cell.
        batch_first: Whether sequences are ``(N, L, input_size)`` instead of ``(L, N, input_size)``.
        dropout: Probability of zeroing what one layer passes to the next, in training.
        bidirectional: Run each layer in both directions; outputs are twice as wide.
        norm_layer: Makes a norm from a width.
        forget_bias: Where the forget gate's part of the bias starts.
        device, dtype: Of the parameters.

    Shape:
        Input ``(L, N, input_size)``, ``(N, L, input_size)`` with ``batch_first``, or ``(L, input_size)``. Output of the
        same layout, H wide (2 H bidirectional). State: two tensors ``(num_layers × directions, N, H)``.

    Raises:
        InputError: A size below 1; on call, another width or number of axes, a state of another shape, no time step.
        TypeError: On call, a packed sequence.

    Reference:
        Ba, Kiros and Hinton, 2016, "Layer Normalization", arXiv 1607.06450.

    Example:
        >>> output, (h, c) = LNLSTM(3, 5, num_layers=2)(torch.randn(7, 2, 3))
        >>> output.shape, h.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 2, 5]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        norm_layer: NormFactory = LayerNorm,
        forget_bias: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect_sizes("LNLSTM", input_size, hidden_size, num_layers)
        if not 0 <= dropout <= 1:
            raise InputError(f"LNLSTM: expected dropout between 0 and 1, got {dropout!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.directions = 2 if bidirectional else 1
        widths = [input_size] + [hidden_size * self.directions] * (num_layers - 1)
        self.cells = nn.ModuleList(
            LNLSTMCell(width, hidden_size, bias, norm_layer, forget_bias, device, dtype)
            for width in widths
            for _ in range(self.directions)
        )

    def reset_parameters(self) -> None:
        """Every cell afresh."""
        _reset(*self.cells)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The hidden states of the last layer at every step, and the last hidden state and cell of every layer."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"LNLSTM: expected a tensor, got {type(x).__name__}; pad sequences of different lengths, and mask "
                "the loss at the padding"
            )
        _expect_width("LNLSTM", "an input", x, self.input_size)
        if x.dim() not in (2, 3):
            raise InputError(f"LNLSTM: expected an input with 2 or 3 axes, got {x.dim()} (shape {tuple(x.shape)})")
        time = 1 if self.batch_first and x.dim() == 3 else 0
        steps = x.movedim(time, 0)
        if not len(steps):
            raise InputError(f"LNLSTM: expected at least one time step, got an input of shape {tuple(x.shape)}")
        states = self._states(steps, state)
        ends = []
        for layer in range(self.num_layers):
            first = layer * self.directions
            runs = [self._run(self.cells[first + d], steps, states[first + d], bool(d)) for d in range(self.directions)]
            steps = torch.cat([outputs for outputs, _ in runs], -1)
            ends += [end for _, end in runs]
            if layer + 1 < self.num_layers:
                steps = nn.functional.dropout(steps, self.dropout, self.training)
        h, c = (torch.stack(parts) for parts in zip(*ends, strict=True))
        return steps.movedim(0, time), (h, c)

    def _states(self, steps: Tensor, state: State | None) -> list[State]:
        shape = (len(self.cells), *steps.shape[1:-1], self.hidden_size)
        if state is None:
            zeros = steps.new_zeros(shape)
            state = zeros, zeros
        for name, tensor in zip(("h", "c"), state, strict=True):
            if tuple(tensor.shape) != shape:
                raise InputError(f"LNLSTM: expected {name} of shape {shape}, got {tuple(tensor.shape)}")
        return list(zip(*(tensor.unbind(0) for tensor in state), strict=True))

    @staticmethod
    def _run(cell: nn.Module, steps: Tensor, state: State, backwards: bool) -> tuple[Tensor, State]:
        assert isinstance(cell, LNLSTMCell)
        projected = cell.project(steps).unbind(0)
        outputs = []
        for step in reversed(projected) if backwards else projected:
            state = cell.step(step, state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def extra_repr(self) -> str:
        """Sizes and layout."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}, "
            f"dropout={self.dropout}, bidirectional={self.bidirectional}"
        )


def _reset(*modules: nn.Module) -> None:
    for module in modules:
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _expect_sizes(layer: str, *sizes: int) -> None:
    for size in sizes:
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{layer}: expected sizes to be positive whole numbers, got {size!r}")


def _expect_width(layer: str, what: str, x: Tensor, width: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{layer}: expected {what} of floating-point numbers, got {x.dtype}; convert it first")
    if x.shape[-1:] != (width,):
        raise InputError(f"{layer}: expected {what} of shape (*, {width}), got {tuple(x.shape)}")

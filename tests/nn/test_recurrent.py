"""The recurrent cells of the layer normalization paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn import LNLSTM, LNGRUCell, LNLSTMCell

Double = torch.float64


def plain(_: int) -> nn.Module:
    return nn.Identity()


def test_lstm_cell_without_its_norms_is_torchs() -> None:
    own, theirs = LNLSTMCell(3, 5, norm_layer=plain, dtype=Double), nn.LSTMCell(3, 5, dtype=Double)
    with torch.no_grad():
        own.weight_ih.copy_(theirs.weight_ih)
        own.weight_hh.copy_(theirs.weight_hh)
        own.bias.copy_(theirs.bias_ih + theirs.bias_hh)
    x, state = torch.randn(4, 3, dtype=Double), (torch.randn(4, 5, dtype=Double), torch.randn(4, 5, dtype=Double))
    for a, b in zip(own(x, state), theirs(x, state), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gru_cell_without_its_norms_is_torchs_with_the_update_gate_turned() -> None:
    own, theirs = LNGRUCell(3, 5, norm_layer=plain, dtype=Double), nn.GRUCell(3, 5, dtype=Double)

    def turned(rows: Tensor) -> Tensor:
        r, z, n = rows.chunk(3)
        return torch.cat([-z, r, n])

    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(own, name).copy_(turned(getattr(theirs, name)))
    x, h = torch.randn(4, 3, dtype=Double), torch.randn(4, 5, dtype=Double)
    torch.testing.assert_close(own(x, h), theirs(x, h), atol=1e-12, rtol=0)


def test_lstm_cell_follows_the_papers_equations() -> None:
    cell = LNLSTMCell(3, 5, dtype=Double)
    for p in cell.parameters():
        nn.init.normal_(p)
    x, h, c = (torch.randn(4, n, dtype=Double) for n in (3, 5, 5))
    gates = cell.norm_hh(h @ cell.weight_hh.T) + cell.norm_ih(x @ cell.weight_ih.T) + cell.bias
    i, f, g, o = gates.chunk(4, -1)
    wanted_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    got_h, got_c = cell(x, (h, c))
    torch.testing.assert_close(got_c, wanted_c)
    torch.testing.assert_close(got_h, o.sigmoid() * cell.norm_cell(wanted_c).tanh())


def test_carried_cell_is_not_normalized() -> None:
    cell, state = LNLSTMCell(3, 5), (torch.zeros(1, 5), torch.full((1, 5), 40.0))
    assert (cell(torch.randn(1, 3), state)[1] > 10).all()


def test_gru_cell_follows_the_papers_equations() -> None:
    cell = LNGRUCell(3, 5, bias=False, dtype=Double)
    for p in cell.parameters():
        nn.init.normal_(p)
    x, h = torch.randn(4, 3, dtype=Double), torch.randn(4, 5, dtype=Double)
    z, r = (cell.norm_hh(h @ cell.weight_hh[:10].T) + cell.norm_ih(x @ cell.weight_ih[:10].T)).sigmoid().chunk(2, -1)
    candidate = cell.norm_in(x @ cell.weight_ih[10:].T) + r * cell.norm_hn(h @ cell.weight_hh[10:].T)
    torch.testing.assert_close(cell(x, h), (1 - z) * h + z * candidate.tanh())


def test_lstm_is_its_cells_step_by_step() -> None:
    lstm, x = LNLSTM(3, 5, num_layers=2, bidirectional=True, dtype=Double), torch.randn(6, 4, 3, dtype=Double)
    layer, ends = x, []
    for at in (0, 2):
        directions = []
        for cell, order in ((lstm.cells[at], range(6)), (lstm.cells[at + 1], reversed(range(6)))):
            state, found = None, {}
            for t in order:
                state = cell(layer[t], state)
                found[t] = state[0]
            directions.append(torch.stack([found[t] for t in range(6)]))
            ends.append(state)
        layer = torch.cat(directions, -1)
    output, (h, c) = lstm(x)
    torch.testing.assert_close(output, layer)
    torch.testing.assert_close(h, torch.stack([end[0] for end in ends]))
    torch.testing.assert_close(c, torch.stack([end[1] for end in ends]))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_has_the_shapes_of_torchs(batch_first: bool, directions: int) -> None:
    both = [
        kind(3, 5, num_layers=2, batch_first=batch_first, bidirectional=directions == 2) for kind in (LNLSTM, nn.LSTM)
    ]
    for x in (torch.randn(6, 4, 3), torch.randn(6, 3)):
        own, theirs = (lstm(x) for lstm in both)
        assert [t.shape for t in (own[0], *own[1])] == [t.shape for t in (theirs[0], *theirs[1])]


def test_lstm_without_its_norms_is_torchs() -> None:
    own = LNLSTM(3, 5, num_layers=2, norm_layer=plain, dtype=Double)
    theirs = nn.LSTM(3, 5, num_layers=2, dtype=Double)
    with torch.no_grad():
        for at, cell in enumerate(own.cells):
            cell.weight_ih.copy_(getattr(theirs, f"weight_ih_l{at}"))
            cell.weight_hh.copy_(getattr(theirs, f"weight_hh_l{at}"))
            cell.bias.copy_(getattr(theirs, f"bias_ih_l{at}") + getattr(theirs, f"bias_hh_l{at}"))
    x, state = torch.randn(6, 4, 3, dtype=Double), (torch.randn(2, 4, 5, dtype=Double),) * 2
    torch.testing.assert_close(own(x, state), theirs(x, state))


def test_lstm_goes_on_from_its_state() -> None:
    lstm, x = LNLSTM(3, 5), torch.randn(6, 4, 3)
    whole, end = lstm(x)
    first, state = lstm(x[:2])
    rest, end_of_rest = lstm(x[2:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
    torch.testing.assert_close(end_of_rest, end)


def test_dropout_acts_between_layers_in_training_only() -> None:
    lstm, x = LNLSTM(3, 5, num_layers=2, dropout=0.5), torch.randn(6, 4, 3)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])


def test_forget_gate_starts_open() -> None:
    bias = LNLSTMCell(3, 5).bias
    assert torch.equal(bias[5:10], torch.ones(5))
    assert bias.sum() == 5


def test_norms_keep_gradients_alive_where_a_plain_network_explodes_or_dies() -> None:
    """A tanh network of 64 units over 100 steps, its recurrent matrix scaled by 0.5, 1 and 2."""

    def gradient(scale: float, norm: Callable[[Tensor], Tensor]) -> float:
        torch.manual_seed(0)
        weight = nn.init.orthogonal_(torch.empty(64, 64)) * scale
        x = torch.randn(100, 8, 64) * 0.1
        h = first = torch.zeros(8, 64, requires_grad=True)
        for t in range(100):
            h = torch.tanh(norm(h @ weight.T + x[t]))
        return float(torch.autograd.grad(h.sum(), first)[0].norm())

    layer_norm = nn.LayerNorm(64)
    normed = [gradient(scale, layer_norm) for scale in (0.5, 1.0, 2.0)]
    bare = [gradient(scale, lambda a: a) for scale in (0.5, 1.0, 2.0)]
    assert max(normed) < 1e4 * min(normed)
    assert max(bare) > 1e8 * min(bare)


def test_wrong_inputs_are_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"LNLSTMCell: expected an input of shape \(\*, 3\), got \(4, 2\)"):
        LNLSTMCell(3, 5)(torch.randn(4, 2))
    with pytest.raises(InputError, match=r"LNLSTMCell: expected a cell of shape \(\*, 5\), got \(4, 6\)"):
        LNLSTMCell(3, 5)(torch.randn(4, 3), (torch.randn(4, 5), torch.randn(4, 6)))
    with pytest.raises(InputError, match=r"LNGRUCell: expected a hidden state of shape \(\*, 5\)"):
        LNGRUCell(3, 5)(torch.randn(4, 3), torch.randn(4, 6))
    with pytest.raises(InputError, match=r"LNLSTM: expected h of shape \(1, 4, 5\), got \(2, 4, 5\)"):
        LNLSTM(3, 5)(torch.randn(6, 4, 3), (torch.randn(2, 4, 5), torch.randn(1, 4, 5)))
    with pytest.raises(InputError, match="at least one time step"):
        LNLSTM(3, 5)(torch.randn(0, 4, 3))
    with pytest.raises(InputError, match="positive whole numbers, got 0"):
        LNLSTM(3, 0)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(6, 4, 3), torch.tensor([6, 5, 3, 2]))
    with pytest.raises(TypeError, match="expected a tensor, got PackedSequence; pad sequences"):
        LNLSTM(3, 5)(packed)

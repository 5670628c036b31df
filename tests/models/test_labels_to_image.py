from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from setpoint.errors import InputError
from setpoint.models import LabelsToImage, LabelsToImageConfig
from setpoint.nn import SPADE

LABELS = torch.randint(3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
FLAT = torch.arange(3)[:, None, None].expand(3, 8, 8)


def made(norm: object, relabel: bool = False) -> LabelsToImage:
    torch.manual_seed(0)
    return LabelsToImage(LabelsToImageConfig(label_nc=3, width=6, depth=2, relabel=relabel), norm=norm).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [None, nn.Identity, nn.InstanceNorm2d, partial(SPADE, label_nc=3, norm="batch")])
def test_every_norm_trains(norm: object) -> None:
    model = made(norm).train()
    y = model(LABELS)
    assert y.shape == (2, 3, 8, 8)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_instance_norm_makes_maps_of_one_label_alike_and_spade_does_not() -> None:
    hidden, shown = made(nn.InstanceNorm2d)(FLAT), made(None)(FLAT)
    torch.testing.assert_close(hidden[0], hidden[1])
    assert (shown[0] - shown[1]).abs().max() > 1e-4


def test_labels_can_be_shown_at_every_convolution() -> None:
    model = made(nn.InstanceNorm2d, relabel=True)
    assert model.units[0].conv1.in_channels == 9
    y = model(FLAT)
    assert (y[0] - y[1]).abs().max() > 1e-3


def test_model_comes_back_from_data() -> None:
    model = made(None)
    again = LabelsToImage.from_dict(json.loads(json.dumps(model.to_dict()))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(LABELS), model(LABELS))


def test_bad_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"whole numbers .* got torch.float32 of shape \(2, 8, 8\)"):
        made(None)(LABELS.float())
    with pytest.raises(InputError, match="sizes of at least 1"):
        LabelsToImageConfig(label_nc=0)

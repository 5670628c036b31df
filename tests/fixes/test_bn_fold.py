from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint import fix
from setpoint.errors import InputError
from setpoint.fixes.bn_fold import BatchNormFolding
from setpoint.loading.mobilenet import MobileNetV2
from setpoint.models import Bottleneck, ResNet, ResNetConfig
from setpoint.nn import freeze_batchnorm, weight_norm

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, with gains, addends and averages of its own in every norm, and outputs of usual size."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(generator=generator)
    return model.eval()


def norms_left(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_every_norm_of_mobilenet_folds_exactly() -> None:
    torch.manual_seed(0)
    model = settled(MobileNetV2(num_classes=4))
    assert len(norms_left(model)) == 52
    fixed = fix(model, BatchNormFolding(), [IMAGES], timed=False)
    assert not norms_left(fixed.model)
    assert not fixed.notes
    assert fixed.change.exact is not None
    assert fixed.change.exact[0] < 1e-9


def test_every_norm_of_a_residual_network_folds_and_comes_back_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settled(ResNet(ResNetConfig(depths=(1, 1), widths=(8, 16), stem_width=8), block=Bottleneck))
    fixed = fix(model, "bn-fold", [IMAGES], timed=False)
    assert not norms_left(fixed.model)
    loaded = setpoint.load(fixed.save(tmp_path / "folded"))
    assert loaded.model.stem[0].bias is not None
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IMAGES), fixed.model(IMAGES), atol=0, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda bias: nn.Conv1d(4, 6, 2, groups=2, bias=bias), nn.BatchNorm1d, (3, 4, 5)),
        (lambda bias: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=bias), nn.BatchNorm2d, (3, 4, 5, 5)),
        (lambda bias: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=bias), nn.BatchNorm2d, (3, 4, 5, 5)),
        (lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias), nn.BatchNorm3d, (2, 4, 2, 2, 2)),
        (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d, (3, 4)),
    ],
)
def test_grouped_transposed_and_linear_layers_fold_with_and_without_biases_and_gains(
    layer: object, norm: type[nn.Module], shape: tuple[int, ...], affine: bool, bias: bool
) -> None:
    made = layer(bias)  # type: ignore[operator]
    width = getattr(made, "out_channels", None) or made.out_features
    model, x = settled(nn.Sequential(made, norm(width, affine=affine))), torch.randn(shape)
    fixed = fix(model, "bn-fold", [x], timed=False)
    assert isinstance(fixed.model[1], nn.Identity)
    torch.testing.assert_close(fixed.model(x), model(x), atol=1e-5, rtol=1e-5)


class Mixed(nn.Module):
    """One pair that folds and five norms that can't: the batch norms are named for what is in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))
        self.conv[3].weight = self.conv[2].weight
        self.good, self.read, self.twice, self.shared = (nn.BatchNorm2d(3) for _ in range(4))
        self.behind, self.batch = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good(self.conv[0](x)).relu()
        y = self.conv[1](x)
        x = self.behind(self.read(y).relu()) + y
        x = self.shared(self.conv[2](x)) + self.conv[3](x)
        x = self.twice(self.twice(self.conv[4](x)))
        return self.batch(self.last(x))


def test_norms_that_can_not_fold_stay_and_the_notes_say_why() -> None:
    model = settled(Mixed())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fixed = fix(model, "bn-fold", [IMAGES], timed=False)
    assert isinstance(fixed.model.good, nn.Identity)
    assert norms_left(fixed.model) == ["read", "twice", "shared", "behind", "batch"]
    assert set(fixed.notes) == {
        "bn-fold: read stays: the output of conv.1 is used elsewhere too",
        "bn-fold: twice stays: it ran 2 times on this batch, and only a single use can be folded",
        "bn-fold: shared stays: conv.2 runs several times or shares its weight with another layer",
        "bn-fold: behind stays: it doesn't read a convolution or a linear layer directly",
        "bn-fold: batch stays: it keeps no running averages",
    }
    torch.testing.assert_close(fixed.model(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


def test_frozen_norms_fold() -> None:
    model = freeze_batchnorm(settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    fixed = fix(model, "bn-fold", [IMAGES], timed=False).model
    assert isinstance(fixed[1], nn.Identity)


def test_a_weight_that_is_computed_is_folded_first() -> None:
    model = settled(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    with pytest.raises(InputError, match=r"1: the weight of 0 is computed at every use.*fold-weights"):
        fix(model, "bn-fold", [IMAGES])
    fixed = fix(model, "fold-weights,bn-fold", [IMAGES], timed=False).model
    assert not norms_left(fixed)


def test_a_norm_in_front_of_its_convolution_is_refused_with_the_place() -> None:
    with pytest.raises(InputError, match="0: it doesn't read a convolution or a linear layer directly"):
        fix(settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))), "bn-fold", [IMAGES])


def test_model_without_batch_norms_has_nothing_to_fold() -> None:
    with pytest.raises(InputError, match="no batch norm; there is nothing to fold"):
        fix(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "bn-fold", [IMAGES], timed=False)

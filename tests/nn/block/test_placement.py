from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

from setpoint.errors import InputError
from setpoint.nn import OutputNorm, PeriNorm, Placement, PostNorm, PreNorm, RMSNorm, ScaledPreNorm, placement


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("pre", PreNorm()),
        ("post", PostNorm()),
        ("peri", PeriNorm()),
        ("sandwich", PeriNorm()),
        ("output", OutputNorm()),
        ("lns", ScaledPreNorm()),
    ],
)
def test_placements_have_names(name: str, wanted: Placement) -> None:
    assert placement(name) == wanted


def test_fields_are_passed_and_unknown_ones_refused_with_the_known() -> None:
    assert placement("lns", power=1.0) == ScaledPreNorm(power=1.0)
    with pytest.raises(InputError, match="takes embed_norm, power, learnable, got exponent"):
        placement("lns", exponent=1.0)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'before'; there are lns, output, peri \(sandwich\), post, pre"):
        placement("before")


def test_a_placement_of_ones_own_is_found_by_name_and_the_latest_wins() -> None:
    def define() -> type[Placement]:
        @dataclass(frozen=True)
        class Bare(Placement):
            name: ClassVar[str] = "bare-in-a-test"

            def residual(self, sublayer: nn.Module, dim: int, **_: Any) -> nn.Module:
                return sublayer

        return Bare

    first, second = define(), define()
    try:
        assert type(placement("bare-in-a-test")) is second
    finally:
        first.name = second.name = ""  # classes outlive the test; one without a name is not found


def test_placements_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PreNorm().embed_norm = True  # type: ignore[misc]


@pytest.mark.parametrize("kind", [PreNorm, PostNorm, PeriNorm, OutputNorm, ScaledPreNorm])
def test_units_start_with_the_stream_and_end_with_it(kind: type[Placement]) -> None:
    import torch

    unit = kind().residual(nn.Linear(8, 8), 8, norm=RMSNorm, layer=2, depth=3, dropout=0.1)
    assert unit(torch.randn(2, 8)).shape == (2, 8)

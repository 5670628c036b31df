"""The study of massive activations: which text it reads, and what its arms do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from setpoint.errors import InputError
from setpoint.optim.tvr import matrix_spreads
from setpoint.probe.interventions.massive import Entry
from setpoint.studies import Context, massive_refined
from setpoint.studies import _language as language

BUDGET = massive_refined.trained.budgets["smoke"]


@pytest.fixture
def numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of the words 0 to 99, and a tokenizer that reads them as numbers."""

    def processor(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    monkeypatch.setattr(massive_refined, "smollm2", lambda: SimpleNamespace(processor=processor))
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(100))))
    return path


def test_slices_share_no_token_with_each_other_or_with_the_calibration(numbered: Path) -> None:
    slices = [massive_refined.slice_of(number, 3, 5, numbered) for number in range(4)]
    means = massive_refined.windows(5, numbered)[: massive_refined.CALIBRATION]
    read = torch.cat([means.flatten(), *(part.flatten() for part in slices)])
    assert slices[0].shape == (3, 1, 5)
    assert len(set(read.tolist())) == len(read) == 4 * 5 + 4 * 3 * 5


def test_a_text_too_short_for_a_slice_is_refused(numbered: Path) -> None:
    with pytest.raises(InputError, match="slice 6 needs 25 windows of 5 tokens and the text has 20"):
        massive_refined.slice_of(6, 3, 5, numbered)


def test_the_control_sets_the_same_channels_at_tokens_without_massive_entries() -> None:
    entries = [Entry(0, 0, 7, 900.0), Entry(0, 3, 7, 800.0), Entry(0, 3, 9, 700.0)]
    moved = massive_refined.elsewhere(entries, 6, torch.Generator().manual_seed(0))
    assert [entry.channel for entry in moved] == [7, 7, 9]
    assert {entry.token for entry in moved} <= {1, 2, 4, 5}
    assert len({entry.token for entry in moved}) == 3


def test_rescaling_brings_each_kind_of_matrix_to_half_of_what_it_comes_to_without() -> None:
    plain = massive_refined.fit(0, BUDGET, Context(), 1e-3)
    rescaled = massive_refined.fit_rescaled(0, BUDGET, Context(), 1e-3)
    without, held = matrix_spreads(plain.learned.model), matrix_spreads(rescaled.learned.model)
    assert rescaled.fired > 0
    assert held == pytest.approx({name: massive_refined.SHARE * std for name, std in without.items()}, rel=0.05)


def test_the_rescaled_model_is_held_against_a_plain_one_of_the_same_seed_and_rate() -> None:
    plain = massive_refined.fit(0, BUDGET, Context(), 1e-3)
    rescaled = massive_refined.fit_rescaled(0, BUDGET, Context(), 1e-3)
    assert rescaled.figures["loss_to_plain"] == pytest.approx(rescaled.learned.loss / plain.learned.loss)
    assert rescaled.figures["ratio_to_plain"] == pytest.approx(rescaled.figures["ratio"] / plain.figures["ratio"])


def test_every_arm_gives_the_loss_of_its_own_model() -> None:
    assert massive_refined.trained.tuning is not None
    setting = {"lr": massive_refined.trained.tuning.grid["lr"][0]}
    losses = {
        arm.name: massive_refined.trained(arm, setting, 0, BUDGET, Context()).metrics["loss"]
        for arm in massive_refined.trained.arms
    }
    assert len(set(losses.values())) == 3
    assert max(losses.values()) < language.DIVERGED

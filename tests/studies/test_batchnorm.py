"""What the proof of batch normalization reads, and how it counts."""

from __future__ import annotations

import torch

from setpoint.studies.batchnorm import TEST, VALID, digits, reading


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_tuning_trains_on_no_image_that_is_judged_or_tuned_on() -> None:
    tuning = digits("valid")
    assert (len(tuning.train), len(tuning.valid), len(tuning.test)) == (1797 - TEST - VALID, VALID, TEST)
    assert not rows(tuning.train.images) & (rows(tuning.valid.images) | rows(tuning.test.images))


def test_judged_run_trains_on_all_but_the_test_images() -> None:
    judged = digits("test")
    assert len(judged.train) == 1797 - TEST
    assert not rows(judged.train.images) & rows(judged.test.images)
    assert torch.equal(judged.test.images, digits("valid").test.images)


def test_run_that_never_gets_there_counts_as_its_last_step() -> None:
    assert reading([10, 20, 30], [0.5, 0.6, 0.7], 30)["steps_to_95"] == 30
    assert reading([10, 20, 30], [0.5, 0.95, 0.7], 30)["steps_to_95"] == 20


def test_final_accuracy_is_the_median_of_the_last_five_readings() -> None:
    assert reading([1, 2, 3, 4, 5, 6], [0.1, 0.9, 0.8, 0.2, 0.9, 0.85], 6)["accuracy"] == 0.85

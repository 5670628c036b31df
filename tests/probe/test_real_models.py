"""Trained models: what is really there is found, and nothing is called wrong that isn't."""

from __future__ import annotations

from functools import cache

import pytest

from setpoint.loading import batches_for, load, loss_for, packaged
from setpoint.probe import registry
from setpoint.probe.base import Subject
from setpoint.probe.interventions.dependence import MassiveDependence
from setpoint.probe.interventions.sparsity import SilencedNeurons
from setpoint.probe.recorder import record
from setpoint.surgery import Anatomy
from setpoint.types import Finding, Loaded, Trace


@cache
def recorded(name: str) -> tuple[Loaded, Trace, tuple[Finding, ...]]:
    if not packaged()[name].available:
        pytest.skip(f"the package of {name} is not installed")
    loaded = load(name)
    trace = record(
        loaded.model,
        batches_for(loaded, tokens=128, count=4),
        needs=registry.needs(registry.PROBES),
        forward=loaded.forward,
        task=loaded.task,
    )
    return loaded, trace, tuple(registry.run(registry.PROBES, trace))


@pytest.mark.parametrize("name", ["smollm2", "minilm", "vit-s", "mobilenetv2"])
def test_trained_model_raises_no_alarm(name: str) -> None:
    _, _, findings = recorded(name)
    assert [f.evidence for f in findings if f.severity != "info"] == []


def test_smollm2_massive_activation_is_found_from_one_recording() -> None:
    _, _, findings = recorded("smollm2")
    finding = max((f for f in findings if f.code == "massive-activation"), key=lambda f: f.value)
    assert (finding.numbers["token"], finding.numbers["channel"]) == (0, 507)
    assert finding.numbers["first_block"] == 11
    assert finding.numbers["last_block"] in (27, 28)  # the text is that of the Python which runs
    assert 2.0e4 < finding.numbers["value"] < 2.7e4
    assert finding.value > 1e4


def test_smollm2_sends_attention_to_the_first_token_from_the_massive_block_on() -> None:
    _, trace, findings = recorded("smollm2")
    assert any(f.id == "attention-saturation@first-token" for f in findings)
    mass = [float(r.sink.mean()) for r in trace.attention.values()]
    assert min(mass[12:16]) > 2 * max(mass[10:12])


def test_only_the_language_model_has_massive_activations() -> None:
    for name in ("minilm", "vit-s", "mobilenetv2"):
        assert not [f for f in recorded(name)[2] if f.code == "massive-activation"]


def test_mobilenet_has_the_dead_channels_that_its_batch_norms_show() -> None:
    (finding,) = [f for f in recorded("mobilenetv2")[2] if f.code == "dead-units"]
    assert finding.severity == "info"
    assert 35 <= finding.numbers["dead"] <= 150


@pytest.mark.slow
def test_smollm2_relies_on_the_entry_as_on_a_constant() -> None:
    loaded, trace, _ = recorded("smollm2")
    batches = batches_for(loaded, tokens=256, count=3)
    subject = Subject(
        loaded.model,
        Anatomy.trace(loaded.model, batches[0], forward=loaded.forward),
        batches,
        loaded.forward,
        loss_for(loaded),
    )
    (finding,) = MassiveDependence()(subject, trace)
    assert finding.numbers["zero_loss"] > finding.numbers["loss"] + 8
    assert abs(finding.numbers["mean_loss"] - finding.numbers["loss"]) < 0.05
    assert abs(finding.numbers["control_loss"] - finding.numbers["loss"]) < 0.05

    (sparsity,) = SilencedNeurons(tol=2.0**-5)(subject, trace)
    assert 0.1 < sparsity.value < 0.6

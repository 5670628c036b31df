"""Interventions: what happens to the output when something inside the model is changed."""

from __future__ import annotations

from setpoint.probe.base import Intervention
from setpoint.probe.interventions.dependence import MassiveDependence
from setpoint.probe.interventions.removal import BlockRemoval
from setpoint.probe.interventions.sparsity import SilencedNeurons

INTERVENTIONS: tuple[Intervention, ...] = (MassiveDependence(), BlockRemoval(), SilencedNeurons())
"""One of each, with its default thresholds."""

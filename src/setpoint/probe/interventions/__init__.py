"""Interventions: what happens to the output when something inside the model is changed."""

from __future__ import annotations

from setpoint.probe.base import Intervention

INTERVENTIONS: tuple[Intervention, ...] = ()

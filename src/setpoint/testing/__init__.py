"""Conformance suites: what every probe, layer, fix and study must pass, setpoint's own and yours."""

from setpoint.testing.fix import check_fix
from setpoint.testing.layer import LAYER_CHECKS, check_layer
from setpoint.testing.probe import ConformanceError, check_probe, restrict
from setpoint.testing.study import check_study
from setpoint.testing.traces import ailing_traces, convolutional_trace, empty_trace, healthy_trace

__all__ = [
    "LAYER_CHECKS",
    "ConformanceError",
    "ailing_traces",
    "check_fix",
    "check_layer",
    "check_probe",
    "check_study",
    "convolutional_trace",
    "empty_trace",
    "healthy_trace",
    "restrict",
]

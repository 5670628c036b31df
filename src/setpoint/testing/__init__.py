"""Conformance suites: what every probe must pass, setpoint's own and yours."""

from setpoint.testing.probe import ConformanceError, check_probe, restrict
from setpoint.testing.traces import ailing_traces, convolutional_trace, empty_trace, healthy_trace

__all__ = [
    "ConformanceError",
    "ailing_traces",
    "check_probe",
    "convolutional_trace",
    "empty_trace",
    "healthy_trace",
    "restrict",
]

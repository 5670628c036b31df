"""Conformance suites: what every thing of a kind must pass."""

"""Measurements: one streaming recorder, and pure functions from what it recorded to findings."""

"""Norms and what stands in for them, one file a method; import them from `setpoint.nn`."""

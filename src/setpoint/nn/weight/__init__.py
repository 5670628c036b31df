"""Weights written as functions of other parameters, one file a method; import them from `setpoint.nn`."""

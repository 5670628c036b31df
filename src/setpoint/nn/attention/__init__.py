"""What attention can be given, one file a method; import it from `setpoint.nn`."""

"""How weights start, one file a method; import them from `setpoint.nn`."""

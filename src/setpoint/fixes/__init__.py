"""One fix per file; `setpoint.fix` finds them through the catalogue."""

"""The engine behind `setpoint.prove`: what is run, by whom, where it is kept, and what follows from it."""

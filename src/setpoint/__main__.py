"""``python -m setpoint``."""

from setpoint.cli import main

main()

"""Applying methods to models: `fix`, and what a fix of your own needs."""

from setpoint.fixing.base import Fix, NotExact, Refused
from setpoint.fixing.engine import fix
from setpoint.fixing.result import Fixed
from setpoint.fixing.spec import chosen, parse, to_text

__all__ = ["Fix", "Fixed", "NotExact", "Refused", "chosen", "fix", "parse", "to_text"]

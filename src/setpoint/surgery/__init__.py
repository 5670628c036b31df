"""Reading and editing other people's models."""

from setpoint.surgery.anatomy import Anatomy

__all__ = ["Anatomy"]

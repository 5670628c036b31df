"""Optimizers, gradient transforms, and what every optimizer needs to know of a model."""

from setpoint.optim.decay import decay_groups, is_decayed, no_weight_decay

__all__ = ["decay_groups", "is_decayed", "no_weight_decay"]

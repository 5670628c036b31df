"""Training: the loop, and what is passed to it.

`train` runs any model on any batches; optimizers and schedules are plain data; checkpoints make a run that was cut
off go on as if it had not been.
"""

from setpoint.optim.decay import decay_groups, no_weight_decay
from setpoint.train.checkpoints import Checkpoint
from setpoint.train.evaluation import Evaluation
from setpoint.train.failure import NonFiniteLoss
from setpoint.train.history import Callback, History, Run
from setpoint.train.loop import train
from setpoint.train.recipes import SGD, WSD, AdamW, Constant, Cosine, Recipe, Schedule

__all__ = [
    "SGD",
    "WSD",
    "AdamW",
    "Callback",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Evaluation",
    "History",
    "NonFiniteLoss",
    "Recipe",
    "Run",
    "Schedule",
    "decay_groups",
    "no_weight_decay",
    "train",
]

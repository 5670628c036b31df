"""`watch`: the recorder during training, at every N-th step, with the probes' findings as alarms.

watcher = setpoint.watch(model, every=50, on="run.jsonl")

for batch in batches:                                # a loop of your own
    with watcher.step() as seen:
        loss = ...; loss.backward(); optimizer.step(); optimizer.zero_grad()
        seen.loss = loss

train(model, data, loss, steps=..., callbacks=[watcher])                # setpoint's loop
Trainer(..., callbacks=[watcher.for_trainer()])                         # transformers
lightning.Trainer(..., callbacks=[watcher.for_lightning()])             # Lightning
"""

from setpoint.watching.observation import Observation
from setpoint.watching.sinks import JsonLines, TensorBoard
from setpoint.watching.watcher import Alarm, Watcher, watch

__all__ = ["Alarm", "JsonLines", "Observation", "TensorBoard", "Watcher", "watch"]

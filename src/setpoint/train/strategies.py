"""How a run is spread over processes: one of Fabric's strategies, by name."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from setpoint.errors import InputError

_NAMES = ("auto", "ddp", "fsdp")


def fabric_for(*, accelerator: str, devices: int | str, num_nodes: int, strategy: Any, precision: Any) -> Fabric:
    """The engine that moves, wraps, and synchronises.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        devices: Processes on this machine; under torchrun, as many as it started.
        num_nodes: Machines.
        strategy: ``"auto"``, ``"ddp"``, ``"fsdp"`` or a strategy of Fabric.
        precision: As Fabric takes it: ``"32-true"``, ``"bf16-mixed"``, ``"bf16-true"``, ``"16-mixed"``.

    Raises:
        InputError: Something that Fabric doesn't know or that this machine doesn't have.
    """
    if isinstance(strategy, str) and strategy not in _NAMES:
        raise InputError(f"expected a strategy of {', '.join(_NAMES)} or one of Fabric's objects, got {strategy!r}")
    try:
        return Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_sharded(devices, num_nodes) if strategy == "fsdp" else strategy,
            precision=precision,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def _sharded(devices: int | str, num_nodes: int) -> Any:
    """Parameters, gradients and optimizer state shared out over all processes (``fully_shard``)."""
    from lightning_fabric.strategies import ModelParallelStrategy

    started = os.environ.get("WORLD_SIZE")  # torchrun says how many it started
    if started is None and not isinstance(devices, int):
        raise InputError(f"fsdp needs the number of devices, got devices={devices!r}; or start it under torchrun")
    # On a CPU tensors are gathered by threads that need Python to let go of them. One that comes to it when Python is
    # already shutting down aborts the process, though all work is done; so they are left a moment in which to finish.
    atexit.unregister(_pause)
    atexit.register(_pause)
    size = int(started) if started is not None else int(devices) * num_nodes
    return ModelParallelStrategy(shard, data_parallel_size=size, tensor_parallel_size=1)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard each block, then what is left.

    A block is an entry of a `torch.nn.ModuleList` or `torch.nn.Sequential`; its parameters are gathered together, and
    only while it runs.
    """
    from torch.distributed.fsdp import fully_shard

    data = mesh["data_parallel"]
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    inner = {id(block) for stack in stacks for block in stack.modules() if block is not stack}
    for stack in stacks:
        if id(stack) in inner:  # a stack inside a block is gathered with its block
            continue
        for block in stack:
            if any(True for _ in block.parameters()) and not isinstance(block, nn.ModuleList | nn.ModuleDict):
                fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    return model


def _pause() -> None:
    time.sleep(0.1)

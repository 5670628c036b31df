"""``setpoint fix``. Nothing heavy is imported before the command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.errors import InputError
from setpoint.shell import AsJson, Device, Dtype, Hub, Model, Trust, console, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from setpoint.types import Loaded


def add_to(app: typer.Typer) -> None:
    """Add the command to the shell."""
    app.command()(fix)


def fix(
    model: Model,
    with_: Annotated[
        str, typer.Option("--with", metavar="SPEC[,SPEC…]", help="What to do, e.g. pre-rmsnorm or dyt:alpha=0.5.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text file, token ids (.npy, .safetensors) or a folder of images, to judge on.", show_default=False
        ),
    ] = None,
    retrain: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Train on this afterwards: a data set's name, a text, or a folder of images with a subfolder a class.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of --retrain.")] = 1000,
    untrained_ok: Annotated[
        bool, typer.Option("--untrained-ok", help="Write a model that still needs training.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For what is drawn at random.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that an earlier fix wrote.")] = False,
    json: AsJson = False,
    hub: Hub = False,
    trust_code: Trust = False,
) -> None:
    """Change MODEL by published methods, say what that did to it, and write it to a folder that loads back."""
    if retrain is not None and untrained_ok:
        raise InputError("--retrain and --untrained-ok exclude each other: train the changed model or do not")
    with shown(quiet=json) as show:
        show(0, 0, "reading the request")
        from setpoint.fixing import parse
        from setpoint.fixing.engine import refuse_needless_training
        from setpoint.fixing.saving import refuse_target

        fixes = parse(with_)
        refuse_target(output, force=force)
        if retrain is not None:
            refuse_needless_training(fixes)
        show(0, 0, f"loading {model}")
        from setpoint.fixing import fix as run
        from setpoint.loading import load

        loaded = load(model, hub=hub, trust_code=trust_code, device=device, dtype=dtype)
        fixed = run(
            loaded,
            fixes,
            data=data,
            retrain=_training(loaded, retrain, steps, seed) if retrain is not None else None,
            untrained_ok=untrained_ok,
            seed=seed,
            progress=show,
        )
        show(0, 0, f"writing {output}")
        folder = fixed.save(output, force=force)
    if json:
        import json as encoder

        sys.stdout.write(encoder.dumps({**fixed.to_dict(), "folder": str(folder)}) + "\n")
        return
    screen = console()
    screen.print(fixed)
    screen.print(f"model: {output}   load it with setpoint.load, or: setpoint check {output}", soft_wrap=True)


def _training(loaded: Loaded, source: str, steps: int, seed: int) -> Callable[[nn.Module], Any]:
    from setpoint.fixing.retraining import retrain_on

    return retrain_on(loaded, source, steps=steps, seed=seed)

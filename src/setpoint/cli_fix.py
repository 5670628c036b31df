"""``setpoint fix``. Nothing heavy is imported before the command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from setpoint.types import Loaded


def add_to(app: typer.Typer) -> None:
    """Add the command to the shell."""
    app.command()(fix)


def fix(
    model: Annotated[
        str,
        typer.Argument(help="A name (smollm2, minilm, vit-s, mobilenetv2), a folder, a .gguf file or module:factory."),
    ],
    with_: Annotated[
        str, typer.Option("--with", metavar="SPEC[,SPEC…]", help="What to do, e.g. pre-rmsnorm or dyt:alpha=0.5.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="A text file, or a folder of images, to judge on.", show_default=False)
    ] = None,
    retrain: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Train on this (a data set's name, or a text file) afterwards.",
                     show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of --retrain.")] = 1000,
    untrained_ok: Annotated[
        bool, typer.Option("--untrained-ok", help="Write a model that still needs training.")
    ] = False,
    seed: Annotated[int, typer.Option(help="For what is drawn at random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that an earlier fix wrote.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="MODEL is a Hugging Face id; fetch it.")] = False,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run code that comes with the model's folder.")
    ] = False,
) -> None:  # fmt: skip
    """Change MODEL by published methods, say what that did to it, and write it to a folder that loads back."""
    from setpoint.cli import _console, _progress

    if retrain is not None and untrained_ok:
        raise InputError("--retrain and --untrained-ok exclude each other: train the changed model or do not")
    with _progress(quiet=json) as show:
        show(0, 0, "reading the request")
        from setpoint.fixing import parse
        from setpoint.fixing.saving import refuse_target

        fixes = parse(with_)
        refuse_target(output, force=force)
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
    console = _console()
    console.print(fixed)
    console.print(f"model: {output}   load it with setpoint.load, or: setpoint check {output}", soft_wrap=True)


def _training(loaded: Loaded, source: str, steps: int, seed: int) -> Callable[[nn.Module], Any]:
    from setpoint.fixing.retraining import retrain_on

    return retrain_on(loaded, source, steps=steps, seed=seed)

"""What a rich terminal would show, as a string: for ``print`` and for logs."""

from __future__ import annotations

import shutil
from io import StringIO
from typing import Any


def as_text(renderable: Any) -> str:
    """The rendering at the terminal's width (100 columns where there is none), without colours."""
    from rich.console import Console

    file = StringIO()
    width = shutil.get_terminal_size((100, 24)).columns
    Console(file=file, width=width, highlight=False, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())

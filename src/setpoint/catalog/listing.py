"""What ``setpoint list`` and ``setpoint show`` print, and the same as JSON. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from setpoint.catalog.signature import signature
from setpoint.types import Item, Method, Preserves

_PRESERVES: Mapping[Preserves, str] = {
    "exact": "exact: outputs stay the same to rounding",
    "approximate": "approximate: outputs change a little, and the change is measured",
    "retrain": "retrain: the function changes; train afterwards",
}


def render_list(methods: Iterable[Method]) -> RenderableType:
    """A table with one row per method.

    Args:
        methods: What to list, in this order.

    Returns:
        Something for ``rich.print``.
    """
    table = Table(
        "method", "kind", "room", "treats", "paper", box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold"
    )
    for column in (0, 3):  # keys and codes are for typing: they stay whole, whatever else folds
        table.columns[column].no_wrap = True
    for method in methods:
        table.add_row(
            Text(method.key, style="bold"),
            ", ".join(sorted(method.kinds)),
            method.room,
            "\n".join(sorted(method.treats)),
            Text(_short_reference(method), style="dim"),
        )
    if not table.row_count:
        return Text("No method meets these filters.")
    return table


def render_method(method: Method) -> RenderableType:
    """One method in full: paper, what it does, each item with how it is called, the last result of its proof.

    Args:
        method: What to show.

    Returns:
        Something for ``rich.print``.

    Raises:
        InputError: An item's path leads to no source.
    """
    parts: list[RenderableType] = [
        Text.assemble((method.key, "bold"), "  ", (method.room, "dim")),
        Text(method.title, style="italic"),
        Text(method.reference, style="dim"),
        *([Text(f"https://arxiv.org/abs/{method.arxiv}", style="dim")] if method.arxiv else []),
        Text(),
        Text(method.summary),
    ]
    for item in method.items:
        parts += [Text(), Text.assemble((item.id, "bold"), f"  {item.kind}"), _indented(_item_table(item))]
    parts += [Text(), Text.assemble(("proof  ", "bold"), _proof(method))]
    return Group(*parts)


def as_json(methods: Iterable[Method]) -> str:
    """The methods as one JSON list, each with its items, their signatures and shell forms.

    Args:
        methods: What to write, in this order.

    >>> import json
    >>> from setpoint.catalog import methods
    >>> json.loads(as_json([methods["massive-refined"]]))[0]["arxiv"]
    '2503.22329'
    """
    return json.dumps([_plain(method) for method in methods], indent=2, ensure_ascii=False)


def shell_form(item: Item) -> str:
    """How an item is used at a shell; "" for what is only used from Python.

    >>> from setpoint.catalog import items
    >>> shell_form(items()["massive-activation"][1])
    'setpoint check MODEL --probe massive-activation'
    """
    if item.kind == "check":
        return f"setpoint check MODEL --probe {item.id}"
    if item.kind == "fix":
        training = " --retrain DATA" if item.preserves == "retrain" else ""
        return f"setpoint fix MODEL --with {item.id}{training} -o OUT"
    return ""


def python_form(item: Item) -> str:
    """How an item that treats a finding is used from Python.

    >>> from setpoint.catalog import items
    >>> print(python_form(items()["pre-rmsnorm"][1]))
    setpoint.fix(model, "pre-rmsnorm", batches)
    >>> print(python_form(items()["tvr"][1]))
    from setpoint.optim.tvr import TargetVarianceRescaler
    setpoint.train.train(…, callbacks=[TargetVarianceRescaler()])
    """
    if item.kind == "fix":
        training = ", retrain=train" if item.preserves == "retrain" else ""
        return f'setpoint.fix(model, "{item.id}", batches{training})'
    if item.kind == "callback":
        return f"{import_line(item)}\nsetpoint.train.train(…, callbacks=[{item.path.partition(':')[2]}()])"
    return import_line(item)


def import_line(item: Item) -> str:
    """The Python statement that gets an item.

    >>> from setpoint.types import Item
    >>> import_line(Item("a", "check", "setpoint.errors:nearest", "Finds near names."))
    'from setpoint.errors import nearest'
    """
    module, _, name = item.path.partition(":")
    return f"from {module} import {name}"


def _short_reference(method: Method) -> str:
    """First author and year; the full reference is what ``show`` is for."""
    first, *others = method.authors.removesuffix(" et al.").split(", ")
    many = others or method.authors.endswith(" et al.")
    return f"{first}{' et al.' if many else ''}, {method.year}"


def _item_table(item: Item) -> Table:
    found = signature(item.path)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("does", Text(item.does))
    if item.treats:
        table.add_row("raises" if item.kind == "check" else "treats", Text(", ".join(item.treats)))
    if item.preserves:
        table.add_row("preserves", Text(_PRESERVES[item.preserves]))
    if shell_form(item):
        table.add_row("shell", Text(shell_form(item)))
    table.add_row("import", Text(import_line(item)))
    table.add_row("call", Text(f"{found.name}{found.call}"))
    return table


def _indented(renderable: RenderableType) -> Padding:
    return Padding(renderable, (0, 0, 0, 2))


def _proof(method: Method) -> Text | str:
    if method.proof == "none":
        return "none of its own; tests hold its code to the definition"
    if method.result is None:
        return f"{method.proof}: not run yet; run `setpoint prove {method.key}`"
    from setpoint.report.proof import Proof
    from setpoint.report.proof_terminal import summary

    return Text("\n").join([Text(), summary(Proof.from_json(method.result))])


def _plain(method: Method) -> dict[str, Any]:
    plain = asdict(method)
    for item, row in zip(method.items, plain["items"], strict=True):
        found = signature(item.path)
        row |= {"signature": f"{found.name}{found.call}", "import": import_line(item), "shell": shell_form(item)}
    return plain

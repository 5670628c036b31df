from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console, RenderableType

from setpoint.catalog import methods
from setpoint.catalog.listing import as_json, import_line, render_list, render_method, shell_form
from setpoint.report.proof import Proof
from setpoint.types import Better, Claim, Interval, Item, Judgement, Method, StudyResult

CHECK = Item(
    id="near-names",
    kind="check",
    path="setpoint.errors:nearest",
    does="Finds names that look alike.",
    treats=("massive-activation",),
)
METHOD = Method(
    key="near",
    room="probe",
    title="On [near] names",
    authors="Doe et al.",
    year=2024,
    arxiv="2401.00001",
    summary="Sorts names by likeness.",
    items=(CHECK,),
)


def text(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_list_has_one_line_a_method() -> None:
    lines = text(render_list([METHOD])).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["near", "check", "probe", "massive-activation", "Doe", "et", "al.,", "2024"]


def test_key_is_never_cut_in_a_narrow_terminal() -> None:
    assert "near" in text(render_list([METHOD]), width=30)


def test_codes_are_whole_in_a_terminal_of_80_columns() -> None:
    lines = text(render_list(methods.values()), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert words >= {code for method in methods.values() for code in method.treats} | set(methods)


def test_empty_list_says_so() -> None:
    assert text(render_list([])) == "No method meets these filters.\n"


def test_show_tells_how_an_item_is_called() -> None:
    shown = text(render_method(METHOD))
    for part in [
        "On [near] names",
        "https://arxiv.org/abs/2401.00001",
        "Sorts names by likeness.",
        "setpoint check MODEL --probe near-names",
        "from setpoint.errors import nearest",
        "nearest(name: str, known: Iterable[str], count: int = 3",
        "raises  massive-activation",
        "none of its own",
    ]:
        assert part in " ".join(shown.split("\n")), part


def test_show_gives_the_last_result_of_a_proof() -> None:
    claim = Claim("it is nearer", Better(0.1), "distance", "near", "far", unit="km")
    judgement = Judgement(claim, "holds", "", Interval(0.123456, 0.1, 0.2, 0.11, 0.19, 5))
    proof = Proof("near", "laptop", (StudyResult("walk", "Is it near?", (judgement,), (), "seed", (0, 1), {}),))
    proven = replace(METHOD, proof="near", result=json.loads(proof.to_json()))
    shown = text(render_method(proven))
    assert "holds      it is nearer  +0.123 km [+0.1 to +0.2 km]" in shown
    assert "laptop budget" in shown
    assert "setpoint prove near" in text(render_method(replace(proven, result=None)))


def test_json_carries_items_signatures_and_shell_forms() -> None:
    (row,) = json.loads(as_json([METHOD]))
    assert row["key"] == "near"
    assert row["items"][0]["shell"] == "setpoint check MODEL --probe near-names"
    assert row["items"][0]["signature"].startswith("nearest(name: str")
    assert row["result"] is None


def test_fix_is_shown_with_what_it_preserves() -> None:
    fix = replace(CHECK, kind="fix", preserves="exact")
    assert shell_form(fix) == "setpoint fix MODEL --with near-names -o OUT"
    assert "exact: outputs stay the same" in text(render_method(replace(METHOD, items=(fix,))))


def test_part_has_no_shell_form() -> None:
    assert shell_form(replace(CHECK, kind="part")) == ""
    assert import_line(CHECK) == "from setpoint.errors import nearest"

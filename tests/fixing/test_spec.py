from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_type_hints

import pytest

from setpoint.catalog import items
from setpoint.errors import InputError
from setpoint.fixes.dyt import DynamicTanh
from setpoint.fixes.lns import Scaling
from setpoint.fixes.pre_rmsnorm import PreRMSNorm
from setpoint.fixing import chosen, parse, to_text
from setpoint.fixing import spec as module
from setpoint.fixing.spec import fix_class


def test_items_are_separated_by_commas_and_fields_by_colons() -> None:
    assert parse("pre-rmsnorm, dyt:alpha=0.5:embedding_scale=no") == [
        PreRMSNorm(),
        DynamicTanh(alpha=0.5, embedding_scale=False),
    ]


@pytest.mark.parametrize("fix", [PreRMSNorm(), DynamicTanh(alpha=0.25), Scaling(power=1.0, learnable=True)])
def test_the_text_of_a_fix_reads_back_to_it(fix: object) -> None:
    assert parse(to_text(fix)) == [fix]


def test_defaults_are_left_out_of_the_text() -> None:
    assert to_text(DynamicTanh(alpha=0.5)) == "dyt:alpha=0.5"


def test_hyphens_in_a_field_are_taken_for_underscores() -> None:
    assert parse("dyt:attention-alpha=0.9") == [DynamicTanh(attention_alpha=0.9)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtt", "the nearest: dyt"),
        ("lorc", "no fix is called 'lorc'. See: setpoint list --kind fix"),
        ("massive-activation", "is a check, not a fix"),
        ("tvr", "is a callback, not a fix; massive-refined brings the fix kv-bias"),
        ("dyt:alfa=1", "fields of dyt: alpha (float or none, none), attention_alpha"),
        ("dyt:alpha", "expected field=value"),
        ("dyt:alpha=big", "expected float or none, got 'big'"),
        ("dyt:alpha=1:alpha=2", "given twice"),
        ("dyt:alpha=-1", "expected alpha above 0"),
        ("dyt:embedding_scale=maybe", "expected bool, got 'maybe'"),
        ("pre-rmsnorm:x=1", "pre-rmsnorm has no fields"),
        ("", "expected key"),
        ("dyt,,lns", "expected key"),
    ],
)
def test_what_can_not_be_read_says_what_was_expected(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Rich:
    """Every kind of field."""

    bits: int = 8
    mode: Literal["fast", "slow"] = "fast"
    layers: tuple[int, ...] = ()
    name: str = "x"

    id: ClassVar[str] = "rich"


def test_lists_literals_and_words_are_read_by_the_type_of_their_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fix_class", lambda id: Rich)
    read = parse("rich:bits=4:mode=slow:layers=1+2+3:name=abc")[0]
    assert read == Rich(4, "slow", (1, 2, 3), "abc")
    assert to_text(read) == "rich:bits=4:mode=slow:layers=1+2+3:name=abc"
    with pytest.raises(InputError, match="expected fast or slow, got 'quick'"):
        parse("rich:mode=quick")
    with pytest.raises(InputError, match=r"expected int\+…, got '1\+b'"):
        parse("rich:layers=1+b")


def test_fixes_are_chosen_from_text_objects_and_lists() -> None:
    assert chosen([PreRMSNorm(), "lns,dyt"]) == [PreRMSNorm(), Scaling(), DynamicTanh()]
    with pytest.raises(TypeError, match="make one"):
        chosen(PreRMSNorm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a int"):
        chosen(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one fix"):
        chosen([])


NUMBERS = [
    (item.id, name)
    for _, item in items().values()
    if item.kind == "fix"
    for name, kind in get_type_hints(fix_class(item.id)).items()
    if kind in (float, float | None)
]


@pytest.mark.parametrize(("id", "field"), NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_of_a_fix_may_be_infinite_or_nan(id: str, field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"expected .*{field}"):
        parse(f"{id}:{field}={value}")

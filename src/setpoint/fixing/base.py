"""What a fix is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from setpoint.errors import InputError
from setpoint.types import Edit, FixContext, Preserves, Refusal, Stage

if TYPE_CHECKING:
    from setpoint.surgery import Anatomy


@runtime_checkable
class Fix(Protocol):
    """A change to a model, as a frozen dataclass: its fields are the method's parameters.

    ``id`` is what ``--with`` takes. ``stage`` says when it runs among others. ``preserves`` is a promise that is held:
    ``exact`` is measured and enforced, ``approximate`` is measured, ``retrain`` says that the model must be trained
    afterwards. ``applies`` looks at the anatomy alone and is asked before anything is done; ``plan`` returns every edit
    and changes nothing itself. What only turns out while planning is raised as `Refused`.
    """

    id: ClassVar[str]
    stage: ClassVar[Stage]
    preserves: ClassVar[Preserves]

    def applies(self, anatomy: Anatomy) -> Refusal | None:
        """None if the model can take the fix, else the place in it and the reason."""
        ...

    def plan(self, ctx: FixContext) -> list[Edit]:
        """Every edit, in order."""
        ...


class Refused(InputError):
    """A fix can't be applied to this model; ``refusal`` names the place."""

    def __init__(self, fix: str, refusal: Refusal) -> None:
        super().__init__(f"{fix} does not fit this model: {refusal}")
        self.fix = fix
        self.refusal = refusal


class NotExact(InputError):
    """A fix that promises the same outputs gave others; it was undone."""

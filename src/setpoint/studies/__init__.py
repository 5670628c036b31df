"""One proof per method, and the words in which a proof is declared.

A study of your own is a Python file that uses these names; ``setpoint prove my_study.py`` runs it.
"""

from setpoint.studies.declare import BUDGETS, Arm, Budget, Context, Diverged, Study, Tuning, study
from setpoint.studies.registry import find_studies, study_keys
from setpoint.types.proving import Better, Claim, Equal, NotWorse, Outcome, Shape

__all__ = [
    "BUDGETS",
    "Arm",
    "Better",
    "Budget",
    "Claim",
    "Context",
    "Diverged",
    "Equal",
    "NotWorse",
    "Outcome",
    "Shape",
    "Study",
    "Tuning",
    "find_studies",
    "study",
    "study_keys",
]

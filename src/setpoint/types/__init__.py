"""The dataclasses that rooms exchange.

Everything here is data: frozen, small, and free of torch at import time, so that the catalogue, the shell and a
report read back from disk can use it without loading a tensor library. Tensors appear only as annotations.

One file per group: what was loaded, what a model is made of (filled by `setpoint.surgery.Anatomy`), what was measured
(filled by `setpoint.probe.Recorder`), what follows from it, what the catalogue says of a method, and what a fix is
given and gives back. All names are imported from here.
"""

from setpoint.types.anatomy import (
    PASS_THROUGH,
    AttentionSite,
    Block,
    Branch,
    BranchRole,
    Chain,
    FeedForwardSite,
    NormKind,
    NormSite,
    Projection,
    Site,
    SiteRole,
    Tap,
    Unread,
    Use,
    Writer,
)
from setpoint.types.catalogue import Item, Kind, Method, Preserves
from setpoint.types.findings import SEVERITIES, Chart, Finding, Remedy, Series, Severity
from setpoint.types.fixing import STAGES, Build, Change, Edit, FixContext, Ref, Refusal, Stage
from setpoint.types.loading import Loaded, Task
from setpoint.types.proving import Claim
from setpoint.types.recording import (
    TABLE_COLUMNS,
    AttentionRecord,
    GroupRecord,
    ParameterRecord,
    Peak,
    Record,
    Stat,
    Trace,
)

__all__ = [
    "PASS_THROUGH",
    "SEVERITIES",
    "STAGES",
    "TABLE_COLUMNS",
    "AttentionRecord",
    "AttentionSite",
    "Block",
    "Branch",
    "BranchRole",
    "Build",
    "Chain",
    "Change",
    "Chart",
    "Claim",
    "Edit",
    "FeedForwardSite",
    "Finding",
    "FixContext",
    "GroupRecord",
    "Item",
    "Kind",
    "Loaded",
    "Method",
    "NormKind",
    "NormSite",
    "ParameterRecord",
    "Peak",
    "Preserves",
    "Projection",
    "Record",
    "Ref",
    "Refusal",
    "Remedy",
    "Series",
    "Severity",
    "Site",
    "SiteRole",
    "Stage",
    "Stat",
    "Tap",
    "Task",
    "Trace",
    "Unread",
    "Use",
    "Writer",
]

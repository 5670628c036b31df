"""Whatever the catalogue lists is held to the suite of its kind."""

from __future__ import annotations

from importlib import import_module

import pytest

from setpoint.catalog import items
from setpoint.probe.base import Probe
from setpoint.testing import ailing_traces, check_probe

CHECKS = sorted(name for name, (_, item) in items().items() if item.kind == "check")


def probe_of(item: str) -> Probe:
    module, name = items()[item][1].path.split(":")
    made = getattr(import_module(module), name)()
    assert isinstance(made, Probe)
    return made


@pytest.mark.parametrize("item", CHECKS)
def test_every_check_passes_the_suite(item: str) -> None:
    check_probe(type(probe_of(item)))


@pytest.mark.parametrize("item", CHECKS)
def test_every_check_finds_the_ailment_it_is_named_for(item: str) -> None:
    for code in items()[item][1].treats:
        found = probe_of(item)(ailing_traces()[code])
        assert code in {finding.code for finding in found}

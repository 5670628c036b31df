from __future__ import annotations

from dataclasses import is_dataclass

import pytest

from setpoint.errors import InputError
from setpoint.probe import registry
from setpoint.probe.base import Intervention, Subject
from setpoint.probe.remedies import literature, remedies
from setpoint.testing.traces import ailing_traces, healthy_trace
from setpoint.types import Finding, Item, Method, Stat, Trace

TRANSFORMER = {"attention", "feed_forward", "rms-norm", "head", "pre", "causal", "residual"}
CONVNET = {"convolution", "batch-norm", "residual"}


def method(key: str, *items: Item) -> Method:
    return Method(key, "nn/norm", "Title", "Author", 2025, "0000.00000", "summary", items)


def test_codes_are_unique_and_all_thirteen_are_there() -> None:
    assert len(set(registry.codes())) == len(registry.PROBES) == 13


def test_every_intervention_deepens_a_known_code() -> None:
    assert {i.code for i in registry.interventions_for()} <= set(registry.codes())
    assert all(is_dataclass(i) for i in registry.interventions_for())


def test_unknown_code_gets_the_nearest_names() -> None:
    with pytest.raises(InputError, match="massive-activation"):
        registry.probes_for({"massive-activations"})


def test_needs_is_the_union_per_role() -> None:
    needs = registry.needs(registry.probes_for({"massive-activation", "idle-layers", "attention-collapse"}))
    assert needs["residual"] == {Stat.MOMENTS, Stat.MEDIAN, Stat.PEAKS, Stat.CHANNELS, Stat.STEP}
    assert needs["attention"] == {Stat.ATTENTION}


def test_findings_come_worst_first() -> None:
    trace = ailing_traces()["non-finite"]
    severities = [f.severity for f in registry.run(registry.PROBES, trace)]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_an_interventions_finding_takes_the_place_of_the_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = ailing_traces()["massive-activation"]
    findings = registry.run(registry.PROBES, trace)
    old = next(f for f in findings if f.code == "massive-activation")

    class Deeper(Intervention):
        code = "massive-activation"

        def __call__(self, subject: Subject, trace: Trace) -> list[Finding]:
            return [Finding(self.code, old.id, "info", 1.0, "x", 0.0, "s", old.sites, "deeper 1", numbers={"new": 1})]

    monkeypatch.setattr("setpoint.probe.interventions.INTERVENTIONS", (Deeper(),))
    merged = registry.deepen(None, trace, findings)  # type: ignore[arg-type]
    new = next(f for f in merged if f.id == old.id)
    assert len(merged) == len(findings)
    assert new.evidence == "deeper 1"
    assert new.chart == old.chart
    assert new.numbers["new"] == 1
    assert new.numbers["channel"] == old.numbers["channel"]


def test_every_literature_entry_treats_known_codes_and_says_when() -> None:
    for paper in literature().values():
        assert {t.partition("@")[0] for t in paper.treats} <= set(registry.codes()), paper.key
        assert paper.when in ("now", "training"), paper.key
        assert paper.does[0].islower(), paper.key
        assert not paper.does.endswith("."), paper.key


def test_a_convolutional_network_is_not_told_about_attention() -> None:
    for code in registry.codes():
        for remedy in remedies(code, CONVNET):
            assert not any("attention" in need.split("|") for need in literature()[remedy.key].requires), remedy.key


def test_remedies_now_come_before_those_for_training() -> None:
    for code in registry.codes():
        order = [r.when for r in remedies(code, TRANSFORMER)]
        assert order == sorted(order, key=["now", "training"].index)


def test_massive_activation_has_remedies_for_a_language_model() -> None:
    keys = [r.key for r in remedies("massive-activation", TRANSFORMER)]
    assert {"massive-refined", "osp", "dyt"} <= set(keys)
    assert "test-time-registers" not in keys


def test_remedies_follow_the_kind_of_finding() -> None:
    float16 = {r.key for r in remedies("precision-risk@float16", TRANSFORMER)}
    int8 = {r.key for r in remedies("precision-risk@int8", TRANSFORMER)}
    assert "outliertune" in int8 - float16
    assert "peri-ln" in float16 - int8
    assert float16 | int8 <= {r.key for r in remedies("precision-risk", TRANSFORMER)}


def test_carried_method_stands_first_and_replaces_its_paper() -> None:
    fix = Item("lns-fold", "fix", "setpoint.x:Y", "fold the scale", treats=("idle-layers",), preserves="exact")
    found = remedies("idle-layers", TRANSFORMER, {"lns": method("lns", fix)})
    assert found[0].key == "lns-fold"
    assert found[0].available
    assert found[0].when == "now"
    assert "lns" not in [r.key for r in found]


def test_carried_method_is_filtered_by_what_its_paper_requires() -> None:
    fix = Item("lns-fold", "fix", "setpoint.x:Y", "fold the scale", treats=("idle-layers",), preserves="exact")
    assert remedies("idle-layers", CONVNET, {"lns": method("lns", fix)}) == ()


def test_a_check_is_no_remedy() -> None:
    check = Item("rank", "check", "setpoint.x:Y", "measure", treats=("rank-collapse",))
    assert remedies("rank-collapse", TRANSFORMER, {"rank": method("rank", check)}) == ()


def test_with_remedies_fills_a_finding() -> None:
    trace = ailing_traces()["norm-mismatch"]
    finding = next(f for f in registry.run(registry.PROBES, trace) if f.code == "norm-mismatch")
    assert [r.key for r in registry.with_remedies(finding, healthy_trace().structure).remedies][:1] == ["norm-align"]

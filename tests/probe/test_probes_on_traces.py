"""Each probe as the pure function it is: hand-made recordings, figures computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from setpoint.probe import registry
from setpoint.probe.activity import ActivationSparsity, DeadUnits
from setpoint.probe.attention import AttentionCollapse, AttentionSaturation
from setpoint.probe.base import Probe, looks_untrained
from setpoint.probe.channels import OutlierChannels
from setpoint.probe.gradients import GradientImbalance, depth_of
from setpoint.probe.groups import NormMismatch, effective_rotation
from setpoint.probe.idle import IdleLayers
from setpoint.probe.massive import MassiveActivation
from setpoint.probe.nonfinite import NonFinite
from setpoint.probe.precision import PrecisionRisk, typical_levels
from setpoint.probe.rank import RankCollapse
from setpoint.probe.variance import VarianceGrowth, fit_growth
from setpoint.testing.probe import check_probe
from setpoint.testing.traces import ailing_traces, convolutional_trace, empty_trace, healthy_trace
from setpoint.types import (
    AttentionRecord,
    Finding,
    GroupRecord,
    ParameterRecord,
    Peak,
    Record,
    Site,
    SiteRole,
    Tap,
    Trace,
)


def site(name: str, role: SiteRole = "residual", block: int | None = None) -> Site:
    return Site(name, role, Tap(name, "output"), block, module=name.split(" ")[0])


def trace_of(*records: Record, **facts: Any) -> Trace:
    given: dict[str, Any] = {
        "records": {r.site.name: r for r in records},
        "attention": {},
        "parameters": {},
        "blocks": sum(r.site.role == "residual" for r in records),
        "task": "other",
        "sequences": 1,
        "tokens": 512,
    }
    return Trace(**{**given, **facts})


def residuals(**columns: list[Any]) -> Trace:
    """Residual records from one list per field, one entry per block."""
    count = len(next(iter(columns.values())))
    return trace_of(
        *(Record(site(f"block.{i}", block=i), **{k: v[i] for k, v in columns.items()}) for i in range(count))
    )


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# --------------------------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("probe", registry.PROBES, ids=lambda p: p.code)
def test_probe_conforms(probe: Probe) -> None:
    check_probe(probe)


@pytest.mark.parametrize("probe", registry.PROBES, ids=lambda p: p.code)
def test_healthy_traces_are_met_with_silence(probe: Probe) -> None:
    assert probe(healthy_trace()) == probe(convolutional_trace()) == probe(empty_trace()) == []


@pytest.mark.parametrize("code", registry.codes())
def test_each_ailment_raises_its_own_code(code: str) -> None:
    assert code in {f.code for f in registry.run(registry.PROBES, ailing_traces()[code])}


@pytest.mark.parametrize("probe", registry.PROBES, ids=lambda p: p.code)
def test_a_probe_that_has_nothing_to_read_says_what_it_lacks(probe: Probe) -> None:
    assert probe.lacks(empty_trace())
    assert probe.lacks(ailing_traces()[probe.code]) == ""


def test_what_was_not_measured_is_named_with_what_it_takes() -> None:
    probes = registry.probes_for({"attention-collapse", "gradient-imbalance", "dead-units"})
    assert registry.not_measured(probes, convolutional_trace()) == {
        "gradient-imbalance": "needs a loss",
        "attention-collapse": "no attention",
    }


# --------------------------------------------------------------------------------------------------------------------
# variance-growth


def test_doubling_variance_is_exponential_at_rate_two() -> None:
    fit = fit_growth([2.0**n for n in range(12)])
    assert fit.form == "exponential"
    assert fit.rate == pytest.approx(2.0)
    assert fit.exponential_r2 == pytest.approx(1.0)


def test_steady_variance_is_linear_with_its_slope() -> None:
    fit = fit_growth([2.0 + 3.0 * n for n in range(12)])
    assert fit.form == "linear"
    assert fit.slope == pytest.approx(1.5)
    assert fit.linear_r2 == pytest.approx(1.0)


def test_variance_growth_reports_the_factor_over_depth() -> None:
    finding = only(VarianceGrowth()(residuals(variance=[3.0**n for n in range(10)])))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(3.0**9)
    assert finding.numbers["per_block"] == pytest.approx(3.0)


def test_linear_growth_to_the_bound_of_xiong_is_silent() -> None:
    assert VarianceGrowth()(residuals(variance=[1 + 1.5 * n for n in range(48)])) == []


def test_one_massive_entry_is_not_growth() -> None:
    variance = [1.0] * 4 + [1e6] * 8
    assert VarianceGrowth()(residuals(variance=variance, median=[0.6745] * 12)) == []
    assert VarianceGrowth()(residuals(variance=variance)) != []


def test_a_jump_of_the_whole_stream_is_placed_at_its_block() -> None:
    finding = only(VarianceGrowth()(residuals(variance=[1.0] * 5 + [1e6] * 5)))
    assert finding.numbers["steepest_block"] == 5
    assert finding.sites[0] == "block.5"


# --------------------------------------------------------------------------------------------------------------------
# gradient-imbalance


def gradients(*norms: float) -> Trace:
    parameters = {f"w{i}": ParameterRecord(f"w{i}", i, 4, 1.0, g, g / 2) for i, g in enumerate(norms)}
    return trace_of(parameters=parameters, blocks=len(norms))


def test_block_gradient_is_the_rms_over_its_parameters() -> None:
    parameters = {
        "a": ParameterRecord("a", 0, 9, 1.0, 3.0),
        "b": ParameterRecord("b", 0, 16, 1.0, 4.0),
        "c": ParameterRecord("c", None, 100, 1.0, 50.0),
    }
    assert depth_of(trace_of(parameters=parameters)).gradients == {0: pytest.approx(1.0)}


def test_vanishing_gradient_names_its_direction_and_ratio() -> None:
    finding = only(GradientImbalance()(gradients(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)))
    assert "vanishes toward the input" in finding.evidence
    assert finding.value == pytest.approx(10**4)


def test_gradients_within_the_limit_are_silent() -> None:
    assert GradientImbalance()(gradients(1.0, 0.5, 0.2, 0.1, 0.05, 0.02)) == []


def test_blocks_without_gradient_are_named() -> None:
    finding = only(GradientImbalance()(gradients(0.0, 1.0, 1.0, 1.0)))
    assert finding.id == "gradient-imbalance@no-gradient"
    assert finding.sites == ("block 0",)


# --------------------------------------------------------------------------------------------------------------------
# massive-activation


def smollm2_like() -> Trace:
    """What SmolLM2 shows: channel 507 at token 0 in blocks 11 to 27, and shortly at other tokens in block 2."""
    records = []
    for block in range(30):
        largest = np.full(576, 20.0)
        peaks = (Peak(20.0, 0, 9, 3),)
        if block == 2:
            largest[507], peaks = 900.0, (Peak(900.0, 0, 40, 507),)
        if 11 <= block <= 27:
            largest[507], peaks = 24000.0, (Peak(23902.0, 0, 0, 507), Peak(-24000.0 + block, 1, 0, 507))
        records.append(
            Record(
                site(f"layers.{block} residual", block=block),
                median=0.8 if block == 2 else 1.66,
                peaks=peaks,
                channel_max=largest,
                maximum=float(largest.max()),
                minimum=-20.0,
            )
        )
    return trace_of(*records)


def test_massive_activation_is_followed_from_first_to_last_block() -> None:
    worst, brief = MassiveActivation()(smollm2_like())
    assert worst.numbers["token"] == 0
    assert worst.numbers["channel"] == 507
    assert (worst.numbers["first_block"], worst.numbers["last_block"]) == (11, 27)
    assert worst.value == pytest.approx(23989 / 1.66)
    assert (brief.numbers["first_block"], brief.numbers["last_block"]) == (2, 2)
    assert worst.id == "massive-activation@layers.11"


@pytest.mark.parametrize(
    ("value", "median", "massive"),
    [(2000.0, 1.0, True), (999.0, 1.0, False), (80.0, 0.04, False), (-2000.0, 1.0, True), (101.0, 0.1, True)],
)
def test_both_conditions_of_the_rule_must_hold(value: float, median: float, massive: bool) -> None:
    found = MassiveActivation()(residuals(median=[median], peaks=[(Peak(value, 0, 0, 3),)]))
    assert bool(found) is massive


def test_massive_activation_near_the_end_of_float16_is_a_warning() -> None:
    harmless = only(MassiveActivation()(residuals(median=[1.0], peaks=[(Peak(2e4, 0, 0, 3),)])))
    risky = only(MassiveActivation()(residuals(median=[1.0], peaks=[(Peak(5e4, 0, 0, 3),)])))
    assert (harmless.severity, risky.severity) == ("info", "warning")


def test_channels_that_start_at_one_block_are_one_finding() -> None:
    peaks = (Peak(5000.0, 0, 0, 3), Peak(-3000.0, 0, 0, 7))
    finding = only(MassiveActivation()(residuals(median=[1.0, 1.0], peaks=[peaks, peaks])))
    assert finding.numbers["channels"] == "3, 7"


# --------------------------------------------------------------------------------------------------------------------
# outlier-channels


def tailed(kurtosis: float, largest: list[float], rms: list[float] | None = None, role: SiteRole = "norm") -> Trace:
    record = Record(
        site("place.0", role, 0),
        variance=2.0,
        fourth_moment=4.0 * (kurtosis + 3),
        channel_max=np.array(largest),
        channel_rms=np.array(rms or [x / 3 for x in largest]),
    )
    return trace_of(record)


def test_outlier_channel_is_named_with_its_ratio() -> None:
    finding = only(OutlierChannels()(tailed(500.0, [2.0] * 9 + [90.0])))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(500.0)
    assert finding.numbers["worst_channel"] == 9
    assert finding.numbers["worst_ratio"] == pytest.approx(45.0)


def test_heavy_tail_below_the_ruinous_kurtosis_is_info() -> None:
    assert only(OutlierChannels()(tailed(100.0, [2.0] * 9 + [90.0]))).severity == "info"


def test_heavy_tail_in_the_stream_itself_is_info() -> None:
    assert only(OutlierChannels()(tailed(500.0, [2.0] * 9 + [90.0], role="residual"))).severity == "info"


def test_tail_made_by_few_tokens_is_left_to_massive_activation() -> None:
    finding = only(OutlierChannels()(tailed(5e4, [2.0] * 9 + [9000.0], [0.7] * 9 + [9000.0 / 512**0.5])))
    assert finding.severity == "info"
    assert "massive-activation" in finding.evidence


def test_kurtosis_without_an_outlier_channel_is_silent() -> None:
    assert OutlierChannels()(tailed(500.0, [2.0] * 9 + [15.0])) == []


# --------------------------------------------------------------------------------------------------------------------
# dead-units, activation-sparsity


def hidden(active: list[float], tokens: int, zeros: float = 0.0, role: SiteRole = "hidden") -> Trace:
    record = Record(site("mlp", role, 0), tokens=tokens, zeros=zeros, channel_active=np.array(active))
    return trace_of(record)


def test_dead_units_are_counted_and_warned_about() -> None:
    finding = only(DeadUnits()(hidden([0.0] * 3 + [0.5] * 7, tokens=3000)))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(0.3)
    assert "0.1 %" in finding.evidence, "the rule of three: 3 / 3000"


def test_dead_units_on_little_data_are_only_noted() -> None:
    assert only(DeadUnits()(hidden([0.0] * 3 + [0.5] * 7, tokens=100))).severity == "info"


def test_single_dead_channel_is_info() -> None:
    finding = only(DeadUnits()(hidden([0.0] + [0.5] * 99, tokens=9000, role="convolution")))
    assert finding.severity == "info"
    assert finding.id == "dead-units@convolution"


def test_units_without_a_finite_value_are_not_called_dead() -> None:
    lost = Record(
        site("mlp", "hidden", 0),
        count=400,
        tokens=100,
        non_finite=300,
        channel_max=np.array([0.0, 0.0, 0.0, 1.0]),
        channel_active=np.ones(4),
    )
    assert DeadUnits()(trace_of(lost)) == []
    silent = replace(lost, channel_active=np.array([1.0, 1.0, 0.0, 1.0]))
    assert only(DeadUnits()(trace_of(silent))).numbers["worst_units"] == "2"
    assert DeadUnits()(trace_of(replace(lost, non_finite=400, channel_max=np.zeros(4)))) == []


def test_channel_at_rounding_level_is_dead() -> None:
    record = Record(site("conv", "convolution"), tokens=9000, channel_max=np.array([1e-20, 1.0, 2.0, 3.0]))
    assert only(DeadUnits()(trace_of(record))).numbers["worst_units"] == "0"


def test_sparsity_is_info_and_a_silent_layer_a_warning() -> None:
    assert only(ActivationSparsity()(hidden([0.1], 512, zeros=0.93))).severity == "info"
    assert only(ActivationSparsity()(hidden([0.1], 512, zeros=0.999))).severity == "warning"
    assert ActivationSparsity()(hidden([0.6], 512, zeros=0.4)) == []


# --------------------------------------------------------------------------------------------------------------------
# idle-layers, rank-collapse


def test_idle_blocks_are_listed_least_first() -> None:
    finding = only(IdleLayers()(residuals(angle=[20.0, 1.0, 0.5, 20.0])))
    assert finding.severity == "warning"
    assert finding.sites == ("block.2", "block.1")


def test_single_idle_block_is_info() -> None:
    assert only(IdleLayers()(residuals(angle=[20.0, 1.0, 20.0]))).severity == "info"


def test_rank_collapse_names_where_it_began() -> None:
    finding = only(RankCollapse()(residuals(cosine=[0.2, 0.7, 0.995, 0.999])))
    assert finding.severity == "warning"
    assert "blocks 2-3" in finding.evidence


def test_identical_tokens_are_an_error() -> None:
    assert only(RankCollapse()(residuals(cosine=[0.2, 1.0]))).severity == "error"


# --------------------------------------------------------------------------------------------------------------------
# attention


def attention(block: int = 0, keys: int = 256, **heads: list[float]) -> Trace:
    given = {"entropy": [0.6], "sink": [0.1], "largest": [0.3], "logit_max": [5.0], "saturated": [0.0], **heads}
    count = max(map(len, given.values()))
    arrays = {name: np.resize(np.array(values), count) for name, values in given.items()}
    record = AttentionRecord(site(f"attn.{block}", "attention", block), queries=64, keys=keys, **arrays)
    return trace_of(attention={record.site.name: record})


def test_uniform_heads_are_counted() -> None:
    finding = only(AttentionCollapse()(attention(entropy=[0.999, 0.998, 0.9999, 0.5])))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(0.75)


def test_few_uniform_heads_are_silent() -> None:
    assert AttentionCollapse()(attention(entropy=[0.999, 0.6, 0.6, 0.5])) == []


def test_one_hot_heads_away_from_the_first_token_are_saturated() -> None:
    finding = only(AttentionSaturation()(attention(saturated=[0.95, 0.99, 0.0, 0.0], logit_max=[400.0])))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(0.5)


def test_one_hot_heads_on_the_first_token_are_sinks() -> None:
    finding = only(AttentionSaturation()(attention(saturated=[0.95, 0.99], sink=[0.99, 0.95])))
    assert finding.id == "attention-saturation@first-token"
    assert finding.severity == "info"


def test_sinks_are_not_spoken_of_when_the_sequence_is_short() -> None:
    assert AttentionSaturation()(attention(sink=[0.5, 0.5], keys=4)) == []


# --------------------------------------------------------------------------------------------------------------------
# norm-mismatch


def test_effective_rotation_matches_the_papers_figures() -> None:
    assert effective_rotation(30, 1, 90) == pytest.approx(1.9092, abs=1e-4)
    assert effective_rotation(1, 1, 90) == pytest.approx(45.0)
    assert effective_rotation(30, 1, 60) == pytest.approx(1.6264, abs=1e-4)
    assert effective_rotation(1, 1, 60) == pytest.approx(30.0)


def test_norm_mismatch_gives_the_ratio_of_lengths_and_of_turns() -> None:
    groups = {"image": GroupRecord(58.0, 2.0, 4), "text": GroupRecord(2.0, 40.0, 9)}
    finding = only(NormMismatch()(residuals(groups=[groups, groups])))
    assert finding.severity == "warning"
    assert finding.value == pytest.approx(29.0)
    assert finding.numbers["rotation_ratio"] == pytest.approx(20.0)


def test_groups_of_like_length_are_silent() -> None:
    groups = {"image": GroupRecord(2.5, 20.0, 4), "text": GroupRecord(2.0, 40.0, 9)}
    assert NormMismatch()(residuals(groups=[groups])) == []


# --------------------------------------------------------------------------------------------------------------------
# precision-risk


@pytest.mark.parametrize(
    ("largest", "dtype", "severity"),
    [
        (2e4, "float32", "info"),
        (4e4, "float32", "warning"),
        (1e5, "bfloat16", "warning"),
        (4e4, "float16", "error"),
        (2e4, "float16", "info"),
    ],
)
def test_float16_headroom_is_judged_by_what_the_model_runs_in(largest: float, dtype: str, severity: str) -> None:
    trace = trace_of(Record(site("block.0", block=0), minimum=-largest, maximum=1.0, dtype=dtype))
    finding = only(PrecisionRisk()(trace))
    assert finding.severity == severity
    assert finding.value == pytest.approx(65504 / largest)


def test_values_far_below_the_limit_are_silent() -> None:
    assert PrecisionRisk()(trace_of(Record(site("block.0", block=0), minimum=-300.0, maximum=300.0))) == []


def test_int8_steps_of_the_typical_channel() -> None:
    record = Record(site("norm", "norm", 0), maximum=254.0, minimum=0.0, channel_max=np.array([1.0, 2.0, 2.0, 254.0]))
    assert typical_levels(record) == pytest.approx(1.0)
    finding = only(PrecisionRisk()(trace_of(record)))
    assert finding.id == "precision-risk@int8"
    assert finding.severity == "warning"


def test_float8_is_only_spoken_of_where_products_read() -> None:
    stream = Record(site("block.0", block=0), minimum=0.0, maximum=500.0)
    norm = Record(site("norm", "norm", 0), minimum=0.0, maximum=500.0)
    assert PrecisionRisk()(trace_of(stream)) == []
    assert only(PrecisionRisk()(trace_of(stream, norm))).id == "precision-risk@float8"


# --------------------------------------------------------------------------------------------------------------------
# non-finite


def test_first_place_with_nan_is_named_before_its_wake() -> None:
    trace = residuals(non_finite=[0, 3, 900], count=[1000, 1000, 1000])
    finding = only(NonFinite()(trace))
    assert finding.severity == "error"
    assert finding.sites == ("block.1", "block.2")
    assert "0.3 %" in finding.evidence


def test_damaged_parameters_are_named() -> None:
    parameters = {"w": ParameterRecord("w", 0, 4, float("nan")), "v": ParameterRecord("v", 0, 4, 1.0)}
    finding = only(NonFinite()(trace_of(parameters=parameters)))
    assert finding.sites == ("w",)


def test_values_that_are_all_non_finite_are_a_hundred_per_cent() -> None:
    trace = replace(residuals(non_finite=[1000], count=[1000]), tokens=4)
    finding = only(NonFinite()(trace))
    assert finding.numbers["share"] == 1.0
    assert "(100 %)" in finding.evidence


def test_non_finite_inputs_are_named_as_the_origin() -> None:
    trace = residuals(non_finite=[5], count=[1000])
    assert "first of 1 measured places" in only(NonFinite()(trace)).evidence
    given = only(NonFinite()(replace(trace, facts={"non_finite_inputs": 2.0})))
    assert "The input already holds 2" in given.evidence


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_an_error(loss: float) -> None:
    finding = only(NonFinite()(replace(healthy_trace(), loss=loss)))
    assert (finding.severity, finding.id) == ("error", "non-finite@loss")


def test_gradients_that_are_no_numbers_name_the_place_where_they_begin_on_the_way_back() -> None:
    parameters = {n: ParameterRecord(n, 0, 4, 1.0, g, g) for n, g in (("w", float("inf")), ("v", 1.0))}
    trace = replace(residuals(gradient_rms=[float("nan"), float("nan"), 0.1]), parameters=parameters, loss=1.0)
    finding = only(NonFinite()(trace))
    assert (finding.id, finding.sites) == ("non-finite@gradients", ("w",))
    assert "1 of 2 parameters" in finding.evidence
    assert "first appear at block.1" in finding.evidence


# --------------------------------------------------------------------------------------------------------------------
# Weights that nobody trained


def weights(norms: list[float], size: int = 4096) -> dict[str, ParameterRecord]:
    return {f"h.{i}.w": ParameterRecord(f"h.{i}.w", i, size, norm) for i, norm in enumerate(norms)}


def test_weights_of_one_size_in_all_blocks_look_untrained() -> None:
    assert looks_untrained(trace_of(parameters=weights([10.0, 10.1, 9.9])))
    assert not looks_untrained(trace_of(parameters=weights([10.0, 11.0, 9.0])))
    assert not looks_untrained(trace_of(parameters=weights([10.0, 0.0, 10.0])))
    assert not looks_untrained(trace_of())


def test_uniform_attention_of_an_untrained_network_is_no_fault() -> None:
    trace = ailing_traces()["attention-collapse"]
    norms = [8.0 + i for i in range(12)]
    assert only(AttentionCollapse()(replace(trace, parameters=weights(norms)))).severity == "warning"
    fresh = only(AttentionCollapse()(replace(trace, parameters=weights([8.0] * 12))))
    assert fresh.severity == "info"
    assert "before any training" in fresh.evidence


def test_idle_blocks_of_an_untrained_network_are_no_fault() -> None:
    trace = residuals(angle=[1.0] * 12)
    assert only(IdleLayers()(trace)).severity == "warning"
    assert only(IdleLayers()(replace(trace, parameters=weights([8.0] * 12)))).severity == "info"


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def test_convolutions_are_drawn_in_order_of_execution() -> None:
    records = [
        Record(site(f"conv{i}", "convolution", i // 2), tokens=9000, channel_active=np.array([0.0, 1.0, 1.0, 1.0]))
        for i in range(4)
    ]
    chart = only(DeadUnits()(trace_of(*records))).chart
    assert chart is not None
    assert (chart.x, chart.series[0].x) == ("convolution, in order of execution", (0.0, 1.0, 2.0, 3.0))


def test_int8_steps_are_drawn_as_one_value_a_block() -> None:
    norms = [
        Record(site(f"norm{i}", "norm", i // 2), channel_max=np.array([1.0, 1.0, 1.0, 50.0 + i])) for i in range(6)
    ]
    finding = next(f for f in PrecisionRisk()(trace_of(*norms)) if f.id == "precision-risk@int8")
    assert finding.chart is not None
    (series,) = finding.chart.series
    assert series.x == (0.0, 1.0, 2.0)
    assert series.y[0] == pytest.approx(127 / 51)
    outside = [*norms, replace(norms[0], site=site("head norm", "norm"))]
    finding = next(f for f in PrecisionRisk()(trace_of(*outside)) if f.id == "precision-risk@int8")
    assert finding.chart is not None
    assert finding.chart.series[0].x == tuple(float(i) for i in range(7)), "a place outside of blocks is drawn too"


def test_the_massive_channel_is_drawn_beside_the_largest_other_one() -> None:
    records = residuals(
        median=[1.0] * 3,
        peaks=[(Peak(5000.0, 0, 0, 2),)] * 3,
        channel_max=[np.array([1.0, 7.0, 5000.0])] * 3,
    )
    chart = only(MassiveActivation()(records)).chart
    assert chart is not None
    assert {s.name: s.y[0] for s in chart.series} == {"channel 2": 5000.0, "largest other channel": 7.0, "median": 1.0}


def test_tokens_and_shares_are_spoken_of_in_the_right_number() -> None:
    peaks = [(Peak(9e4, 0, 0, 2), Peak(8e4, 0, 5, 2))]
    finding = only(MassiveActivation()(residuals(median=[1.0], peaks=peaks)))
    assert "at tokens 0 and 5 in" in finding.evidence
    assert "1.4 times what float16 can hold" in finding.evidence
    assert "at token 0 in" in only(MassiveActivation()(residuals(median=[1.0], peaks=[peaks[0][:1]]))).evidence
    place = replace(site("stage.0", block=0), channel_axis=1)
    picture = trace_of(Record(place, median=1.0, peaks=peaks[0]))
    assert "at positions 0 and 5 in" in only(MassiveActivation()(picture)).evidence


def test_a_picture_of_one_cell_is_not_drawn() -> None:
    record = Record(
        site("block.0", block=0),
        variance=1.0,
        fourth_moment=500.0,
        channel_max=np.array([2.0] * 9 + [400.0]),
        channel_rms=np.ones(10) * 100,
    )
    assert only(OutlierChannels()(trace_of(record))).chart is None


def test_a_picture_says_which_channels_and_that_a_place_is_in_no_block() -> None:
    def record(name: str, block: int | None) -> Record:
        largest = np.array([2.0] * 8 + [300.0, 400.0])
        place = site(name, role="norm", block=block)
        return Record(place, variance=1.0, fourth_moment=500.0, channel_max=largest, channel_rms=np.full(10, 100.0))

    chart = only(OutlierChannels()(trace_of(record("layers.0.norm norm", 0), record("norm norm", None)))).chart
    assert chart is not None
    assert chart.title == "Largest magnitude of the 2 channels that reach furthest, norm outputs with outliers only"
    assert [series.name for series in chart.series] == ["layers.0.norm norm", "norm (in no block) norm"]


def test_threshold_and_value_of_dead_units_speak_of_the_same_share() -> None:
    finding = only(DeadUnits()(hidden([0.0] + [0.5] * 9, tokens=100)))
    assert (finding.severity, finding.threshold) == ("info", DeadUnits().share)

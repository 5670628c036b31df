"""The accumulators and the one-pass kernels, held to float64 references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from setpoint.probe.stat_kernels import sample_stride, sum_of_squares
from setpoint.probe.stat_observe import Later, Selection, Stream, observe, settle_all
from setpoint.probe.stat_scratch import Scratch, chunk_rows
from setpoint.probe.statistics import BINS, MANTISSA_BITS, Magnitudes, Moments, Peaks, SiteStatistics, bin_edge
from setpoint.types import Record, Site, Stat, Tap

EVERYTHING = frozenset(Stat) - {Stat.ATTENTION, Stat.GRADIENT}
SITE = Site("site", "residual", Tap("", "output"))


def observed(
    values: Tensor, *, wanted: frozenset[Stat] = EVERYTHING, parts: int = 1, exact: bool = False, **options: Any
) -> Record:
    """The record of values of shape (sequences, positions, channels), given in so many batches."""
    statistics = SiteStatistics(wanted, Peaks(8))
    if exact:
        statistics.magnitudes = Magnitudes(values=[])
    scratch, first = Scratch(), 0
    for part in values.chunk(parts):
        observe(part.flatten(0, 1), part.shape[1], statistics, scratch, first_sequence=first, **options)
        first += len(part)
    return statistics.record(SITE)


def assert_moments_match(record: Record, values: Tensor, rel: float = 1e-5) -> None:
    x = values.double().numpy().ravel()
    x = x[np.isfinite(x)]
    d = x - x.mean()
    assert record.mean == pytest.approx(x.mean(), rel=rel, abs=rel * np.sqrt((x**2).mean()))
    assert record.variance == pytest.approx((d**2).mean(), rel=rel, abs=1e-300)
    if record.fourth_moment is not None:
        assert record.fourth_moment == pytest.approx((d**4).mean(), rel=10 * rel, abs=1e-300)
    assert record.rms == pytest.approx(np.sqrt((x**2).mean()), rel=rel)
    assert (record.minimum, record.maximum) == (x.min(), x.max())


finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(st.lists(st.lists(finite, min_size=1, max_size=12), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_merged_moments_are_those_of_the_whole(parts: list[list[float]]) -> None:
    total = Moments()
    for part in parts:
        total.add(Moments.of(np.array(part)))
    x = np.concatenate([np.array(p) for p in parts])
    d = x - x.mean()
    scale = np.abs(x).max()
    assert total.count == x.size
    assert total.mean == pytest.approx(x.mean(), abs=1e-12 * scale)
    assert total.variance == pytest.approx((d**2).mean(), rel=1e-9, abs=1e-12 * scale**2)
    assert total.fourth == pytest.approx((d**4).mean(), rel=1e-8, abs=1e-12 * scale**4)


@given(
    mean=st.floats(-1e4, 1e4, width=32),
    spread=st.floats(0.0078125, 100.0, width=32),
    spike=st.sampled_from([0.0, 2e4, -6e4]),
    parts=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_moments_hold_for_any_mean_spread_and_spike(
    mean: float, spread: float, spike: float, parts: int, seed: int
) -> None:
    values = torch.randn(4, 40, 24, generator=torch.Generator().manual_seed(seed)) * spread + mean
    values[1, 2, 3] += spike
    assert_moments_match(observed(values, parts=parts), values, rel=3e-5)


@pytest.mark.parametrize("wanted", [EVERYTHING, frozenset({Stat.MOMENTS})])
def test_a_single_entry_of_20000_keeps_the_others_digits(wanted: frozenset[Stat]) -> None:
    values = torch.randn(2, 512, 576)
    values[0, 0, 507] = 2e4
    record = observed(values, wanted=wanted)
    assert_moments_match(record, values)
    if record.channel_rms is None:
        return
    rms = values.double().square().mean((0, 1)).sqrt().numpy()
    assert record.channel_rms == pytest.approx(rms, rel=1e-5)


def test_a_mean_of_a_million_spreads_cancels_nothing() -> None:
    values = 1000.0 + 1e-3 * torch.randn(1, 256, 64)
    assert_moments_match(observed(values), values, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e-8, 1e8, 1e15, 1e30])
def test_values_whose_powers_leave_float32_are_still_measured(scale: float) -> None:
    values = torch.randn(1, 64, 32) * scale
    assert_moments_match(observed(values), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_accumulated_in_more(dtype: torch.dtype) -> None:
    values = (3 + torch.randn(2, 300, 96)).to(dtype)
    record = observed(values)
    assert_moments_match(record, values)
    assert record.channel_mean == pytest.approx(values.double().mean((0, 1)).numpy(), rel=1e-5)


def test_a_constant_has_no_variance_at_all() -> None:
    record = observed(torch.full((2, 30, 7), 0.1), parts=2)
    assert (record.variance, record.fourth_moment, record.kurtosis) == (0.0, 0.0, None)


def test_non_finite_values_are_counted_and_left_out() -> None:
    values = torch.randn(2, 64, 16)
    values[0, 3, 5], values[1, 0, 0], values[1, 9, 5] = math.nan, math.inf, -math.inf
    record = observed(values)
    assert (record.non_finite, record.count) == (3, values.numel())
    assert_moments_match(record, values)
    assert all(math.isfinite(peak.value) for peak in record.peaks)
    column = values[:, :, 5].double().numpy().ravel()
    column = column[np.isfinite(column)]
    assert record.channel_rms is not None
    assert record.channel_rms[5] == pytest.approx(np.sqrt((column**2).mean()))
    assert record.cosine is not None
    assert math.isfinite(record.cosine)


def test_all_nan_gives_no_moments_and_no_peaks() -> None:
    record = observed(torch.full((1, 4, 3), math.nan))
    assert (record.mean, record.peaks, record.non_finite) == (None, (), 12)


def test_chunks_are_joined_without_a_seam() -> None:
    width = 2048
    rows = 3 * chunk_rows(width, torch.device("cpu")) + 17
    values = torch.randn(1, rows, width) + 0.3
    values[0, rows - 1, 5] = 99.0
    record = observed(values)
    assert_moments_match(record, values)
    assert record.peaks[0].token == rows - 1
    assert record.cosine == pytest.approx(mean_cosine(values), rel=1e-4)


def mean_cosine(values: Tensor, keep: Tensor | None = None) -> float:
    """Reference: mean over all pairs of different tokens of one sequence."""
    total, pairs = 0.0, 0
    for i, sequence in enumerate(values.double()):
        chosen = sequence if keep is None else sequence[keep[i]]
        unit = torch.nn.functional.normalize(chosen, dim=-1)
        gram = unit @ unit.T
        total += float(gram.sum() - gram.trace())
        pairs += len(chosen) * (len(chosen) - 1)
    return total / pairs


BY_COLUMN = frozenset({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS})


def scattered() -> Tensor:
    return torch.randn(2, 300, 96)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        torch.relu,
        lambda x: x * 1e-30,
        lambda x: x * 1e30,
        lambda x: x + 1000.0,
        lambda x: x + 50.0 * torch.arange(-48, 48),
        lambda x: x.index_put((torch.tensor(1), torch.tensor(7), torch.tensor(3)), torch.tensor(-3e4)),
        lambda x: x.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(9)), torch.tensor(math.inf)),
        torch.zeros_like,
    ],
)
def test_reducing_by_column_gives_what_the_sums_give(change: Any) -> None:
    values = change(scattered())
    quick, full = observed(values, wanted=BY_COLUMN, parts=2), observed(values, parts=2)
    for name in ("mean", "variance", "rms", "zeros"):
        assert getattr(quick, name) == pytest.approx(getattr(full, name), rel=1e-5, abs=1e-5 * (full.rms or 0.0)), name
    for name in ("minimum", "maximum", "non_finite", "count", "tokens"):
        assert getattr(quick, name) == getattr(full, name), name
    assert quick.channel_active == pytest.approx(full.channel_active)
    assert quick.channel_max == pytest.approx(full.channel_max)
    assert quick.channel_rms == pytest.approx(full.channel_rms, rel=1e-5)
    assert quick.channel_mean == pytest.approx(full.channel_mean, rel=1e-5, abs=1e-5 * (full.rms or 0.0))


def test_one_zero_among_many_values_is_found() -> None:
    values = torch.randn(1, 512, 1536)
    values[0, 500, 9] = 0.0
    record = observed(values, wanted=BY_COLUMN)
    assert record.zeros == 1 / values.numel()
    assert record.channel_active is not None
    assert record.channel_active.argmin() == 9
    assert observed(values + 10, wanted=BY_COLUMN).zeros == 0.0


def test_moments_alone_are_those_of_a_wide_site() -> None:
    values = torch.randn(1, 40, 49152) * 3 - 1
    assert_moments_match(observed(values, wanted=frozenset({Stat.MOMENTS})), values)


def test_peaks_are_the_largest_entries_with_their_places() -> None:
    values = torch.randn(6, 50, 20)
    record = observed(values, parts=3)
    flat = values.flatten().abs().topk(8)
    assert [abs(p.value) for p in record.peaks] == flat.values.tolist()
    for peak in record.peaks:
        assert values[peak.sequence, peak.token, peak.channel].item() == peak.value


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_peaks_found_by_channel_are_the_peaks(seed: int, size: int) -> None:
    x = torch.randn(9, 11, generator=torch.Generator().manual_seed(seed)).mul(4).round()  # with ties
    statistics = SiteStatistics(frozenset({Stat.PEAKS}), Peaks(size))
    observe(x, 9, statistics, Scratch())
    found = np.abs(statistics.peaks.rows[:, 0]).tolist()
    assert found == x.abs().flatten().double().topk(min(size, 99)).values.tolist()


def test_per_channel_figures_match_their_definition() -> None:
    values = torch.randn(3, 40, 12) + torch.arange(12)
    record = observed(values, parts=2)
    x = values.double()
    assert record.channel_mean == pytest.approx(x.mean((0, 1)).numpy(), rel=1e-6, abs=1e-6)
    assert record.channel_rms == pytest.approx(x.square().mean((0, 1)).sqrt().numpy(), rel=1e-6)
    assert record.channel_max == pytest.approx(x.abs().amax((0, 1)).numpy(), rel=1e-7)


def test_zeros_and_activity_are_counted_exactly() -> None:
    values = torch.relu(torch.randn(3, 40, 12))
    values[..., 7] = 0.0
    values[0, 0, 1] = 1e-30  # small is not zero, though its square is
    record = observed(values, parts=3)
    assert record.zeros == float((values == 0).double().mean())
    assert record.channel_active is not None
    assert record.channel_active.tolist() == (values != 0).double().mean((0, 1)).tolist()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histogram_median_is_within_its_stated_error(scale: float, dtype: torch.dtype) -> None:
    values = (torch.randn(2, 100, 64) * scale).to(dtype)
    record = observed(values, parts=2)
    true = float(np.median(values.double().abs().numpy()))
    assert 0 < record.median_error < 0.017
    assert record.median == pytest.approx(true, rel=record.median_error)


def token_and_channel_structure() -> Tensor:
    """Values as a stream has them: channels of unlike size, tokens that resemble their neighbours, one huge entry."""
    values = torch.randn(1, 512, 576).cumsum(1) * torch.rand(576).mul(4).exp()
    values[0, 0, 7] = 2e6
    return values


@pytest.mark.parametrize("make", [lambda: torch.randn(1, 512, 576), token_and_channel_structure])
def test_sampled_median_is_within_its_stated_error(make: Any) -> None:
    values = make()
    record = observed(values)
    true = float(np.median(values.double().abs().numpy()))
    assert 0.017 < record.median_error < 0.2
    assert record.median == pytest.approx(true, rel=record.median_error)


def test_more_batches_narrow_a_sampled_medians_error() -> None:
    values = torch.randn(8, 512, 576)
    errors = [observed(part, parts=len(part), wanted=frozenset({Stat.MEDIAN})).median_error for part in
              (values[:1], values[:4], values)]  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > 0


@given(st.integers(1, 1 << 22), st.integers(1, 4096))
def test_a_sample_is_large_and_visits_every_channel(size: int, width: int) -> None:
    stride = sample_stride(size, width)
    assert size // stride >= min(size, 1 << 15)
    assert len({position * stride % width for position in range(width)}) == width


def test_a_sampled_median_of_mostly_zeros_is_zero() -> None:
    record = observed(torch.randn(1, 512, 576).sub(1).relu())
    assert (record.median, record.median_error) == (0.0, 0.0)


def test_exact_median_is_exact() -> None:
    values = torch.randn(3, 31, 7)
    record = observed(values, parts=3, exact=True)
    assert record.median == float(np.median(values.double().abs().numpy()))
    assert record.median_error == 0.0


def test_magnitude_bins_cover_the_float_range_in_order() -> None:
    edges = [bin_edge(i) for i in range(255 << MANTISSA_BITS)]
    assert all(a < b for a, b in itertools.pairwise(edges))
    assert BINS == 256 << MANTISSA_BITS


def test_cosine_is_the_mean_over_pairs_of_tokens_in_a_sequence() -> None:
    values = torch.randn(3, 33, 10) + 0.5
    assert observed(values, parts=2).cosine == pytest.approx(mean_cosine(values), rel=1e-5)


def test_equal_tokens_have_cosine_one() -> None:
    assert observed(torch.randn(1, 1, 16).expand(2, 20, 16)).cosine == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0, 30.0])
def test_step_keeps_its_digits_from_tiny_to_huge(size: float) -> None:
    before = torch.randn(2, 50, 64)
    after = before + size * torch.randn(2, 50, 64)
    record = observed(after, stream=Stream(before.flatten(0, 1)))
    b, a = before.double(), after.double()
    cosine = torch.nn.functional.cosine_similarity(b, a, dim=-1)
    assert record.angle == pytest.approx(torch.rad2deg(cosine.clamp(-1, 1).acos()).mean().item(), rel=1e-3)
    assert record.step_ratio == pytest.approx(((a - b).square().mean() / b.square().mean()).sqrt().item(), rel=1e-4)


def test_a_block_that_does_nothing_turns_nothing() -> None:
    x = torch.randn(1, 20, 8)
    record = observed(x, stream=Stream(x.flatten(0, 1)))
    assert (record.angle, record.step_ratio) == (0.0, 0.0)


def test_opposite_vectors_are_180_degrees_apart() -> None:
    x = torch.randn(1, 20, 8)
    assert observed(-x, stream=Stream(x.flatten(0, 1))).angle == pytest.approx(180.0, abs=0.1)


def test_padding_is_left_out_of_everything() -> None:
    values = torch.randn(3, 20, 8)
    keep = torch.rand(3, 20) < 0.7
    padded = torch.where(keep[..., None], values, 1e5)
    record = observed(padded, selection=Selection(keep.flatten().nonzero().squeeze(1)))
    assert record.tokens == int(keep.sum())
    assert_moments_match(record, values[keep])
    assert record.cosine == pytest.approx(mean_cosine(values, keep), rel=1e-5)
    for peak in record.peaks:
        assert values[peak.sequence, peak.token, peak.channel].item() == peak.value


def test_groups_have_their_own_norm_and_angle() -> None:
    before, after = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    mask = torch.rand(2, 30) < 0.4
    record = observed(after, stream=Stream(before.flatten(0, 1)), selection=Selection(groups={"some": mask.flatten()}))
    group = record.groups["some"]
    angles = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).acos().rad2deg()
    assert group.tokens == int(mask.sum())
    assert group.norm == pytest.approx(after.double().norm(dim=-1)[mask].mean().item(), rel=1e-6)
    assert group.angle == pytest.approx(angles[mask].mean().item(), rel=1e-4)


def test_only_what_is_wanted_is_filled() -> None:
    record = observed(torch.randn(1, 8, 4), wanted=frozenset({Stat.MOMENTS}))
    assert record.mean is not None
    others = (record.fourth_moment, record.median, record.channel_max, record.zeros, record.cosine, record.angle)
    assert others == (None,) * 6
    assert record.peaks == ()


def test_statistics_of_two_processes_join_like_one() -> None:
    values = torch.randn(6, 20, 8)
    halves = [SiteStatistics(EVERYTHING, Peaks(8)) for _ in range(2)]
    for half, part in zip(halves, values.chunk(2), strict=True):
        observe(part.flatten(0, 1), 20, half, Scratch())
    halves[0].add(halves[1], first_sequence=3)
    joined, whole = halves[0].record(SITE), observed(values)
    assert [(p.sequence, p.token, p.channel) for p in joined.peaks] == [
        (p.sequence, p.token, p.channel) for p in whole.peaks
    ]
    assert joined.median == whole.median
    for name in ("mean", "variance", "fourth_moment", "cosine", "zeros", "tokens", "count"):
        assert getattr(joined, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    assert joined.channel_rms == pytest.approx(whole.channel_rms, rel=1e-6)


def test_scratch_stays_small_however_many_values_pass() -> None:
    scratch = Scratch()
    statistics = SiteStatistics(EVERYTHING, Peaks(8))
    observe(torch.randn(8192, 512), 8192, statistics, scratch)
    assert scratch.bytes < 12 << 20


def test_scratch_made_under_inference_mode_serves_outside_it() -> None:
    scratch, statistics = Scratch(), SiteStatistics(EVERYTHING, Peaks(8))
    with torch.inference_mode():
        observe(torch.randn(8, 4), 8, statistics, scratch)
    observe(torch.randn(8, 4), 8, statistics, scratch)


def test_work_put_off_gives_what_work_done_at_once_gives() -> None:
    values, before = torch.randn(3, 40, 12), torch.randn(3, 40, 12)
    later: Later = []
    statistics, scratch = SiteStatistics(EVERYTHING, Peaks(8)), Scratch()
    observe(values.flatten(0, 1), 40, statistics, scratch, later=later, stream=Stream(before.flatten(0, 1)))
    assert statistics.tokens == 0
    settle_all(later, scratch)
    put_off, at_once = statistics.record(SITE), observed(values, stream=Stream(before.flatten(0, 1)))
    assert put_off.peaks == at_once.peaks
    for name in ("mean", "variance", "fourth_moment", "median", "cosine", "angle", "step_ratio", "zeros", "tokens"):
        assert getattr(put_off, name) == pytest.approx(getattr(at_once, name), rel=1e-6), name


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e25])
def test_sum_of_squares_survives_any_scale(scale: float) -> None:
    x = torch.randn(1000) * scale
    assert sum_of_squares(x) == pytest.approx(float(x.double().square().sum()), rel=1e-5)


def test_sum_of_squares_shows_nan_and_infinity() -> None:
    assert math.isnan(sum_of_squares(torch.tensor([1.0, math.nan])))
    assert sum_of_squares(torch.tensor([1.0, math.inf])) == math.inf
    assert sum_of_squares(torch.zeros(4)) == 0.0


def test_channels_with_means_far_out_keep_their_spread() -> None:
    hidden = frozenset({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS})
    for offset in (3.0, 9.0, 50.0, 3e4):
        values = torch.randn(2, 64, 48, generator=torch.Generator().manual_seed(0)) + offset
        record = observed(values, wanted=hidden)
        assert_moments_match(record, values)
        assert record.channel_mean == pytest.approx(values.double().mean((0, 1)).numpy(), rel=1e-5)


class Operations(TorchDispatchMode):
    """Counts the operations that run while it is active."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("wanted", "most"),
    [
        ({Stat.MOMENTS, Stat.CHANNELS, Stat.ZEROS}, 12),
        ({Stat.MOMENTS, Stat.TAILS, Stat.CHANNELS}, 10),
        (EVERYTHING - {Stat.STEP, Stat.ZEROS}, 30),
    ],
)
def test_a_site_takes_few_operations(wanted: set[Stat], most: int) -> None:
    """In a forward pass an operation costs 30 us however small it is: they are what recording costs."""
    statistics, scratch = SiteStatistics(frozenset(wanted), Peaks(8)), Scratch()
    later: Later = []
    values = torch.randn(128, 96)
    for _ in range(3):  # the first makes the buffers
        with torch.no_grad(), Operations() as operations:
            observe(values, 128, statistics, scratch, later=later)
    settle_all(later, scratch)
    assert operations.count <= most

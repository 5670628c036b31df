"""Recordings made by hand, one healthy and one for every known ailment, to try probes on without a model.

All describe the same small network: 12 pre-norm blocks, 256 channels, 4 heads, 4 sequences of 32 tokens. The ailing
ones differ from the healthy one in exactly what their name says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from setpoint.types import AttentionRecord, GroupRecord, ParameterRecord, Peak, Record, Site, SiteRole, Tap, Trace

BLOCKS = 12
CHANNELS = 256
HEADS = 4
TOKENS = 128


def healthy_trace() -> Trace:
    """A recording of a network in which nothing is wrong.

    Returns:
        A trace with every statistic of every role filled in.

    >>> trace = healthy_trace()
    >>> trace.blocks, len(trace.by_role("residual")), len(trace.attention)
    (12, 12, 12)
    """
    records = [_record("embedding", "embedding", None, scale=1.0)]
    for block in range(BLOCKS):
        records += [
            _record(f"blocks.{block}.norm", "norm", block, scale=1.0),
            _record(f"blocks.{block}.attn branch", "branch", block, scale=0.4),
            replace(_record(f"blocks.{block}.mlp hidden", "hidden", block, scale=0.5), zeros=0.4),
            _record(f"blocks.{block} residual", "residual", block, scale=(1 + 0.5 * (block + 1)) ** 0.5),
        ]
    records += [_record("logits", "logits", None, scale=2.0)]
    attention = [_attention(block) for block in range(BLOCKS)]
    parameters = [
        ParameterRecord(f"blocks.{block}.{name}", block, CHANNELS**2, 8.0, 0.1, 0.1 / CHANNELS)
        for block in range(BLOCKS)
        for name in ("attn.weight", "mlp.weight")
    ]
    return Trace(
        records={r.site.name: r for r in records},
        attention={a.site.name: a for a in attention},
        parameters={p.name: p for p in parameters},
        blocks=BLOCKS,
        task="language-model",
        sequences=4,
        tokens=TOKENS,
        loss=3.0,
        facts={"vocabulary": 256.0, "parameters": float(sum(p.size for p in parameters))},
        structure=frozenset({"attention", "feed_forward", "rms-norm", "head", "pre"}),
    )


def convolutional_trace() -> Trace:
    """A recording of a convolutional network with nothing wrong: no tokens, no attention, no loss.

    >>> {record.site.role for record in convolutional_trace().records.values()}
    {'convolution'}
    """
    records = [
        replace(_record(f"stage.{i}", "convolution", i, scale=1.0, axis=1), zeros=0.4, cosine=None, angle=None)
        for i in range(BLOCKS)
    ]
    return Trace(
        records={r.site.name: r for r in records},
        attention={},
        parameters={},
        blocks=BLOCKS,
        task="image-classification",
        sequences=4,
        tokens=4 * 49,
        structure=frozenset({"convolution", "batch-norm"}),
    )


def empty_trace() -> Trace:
    """A recording of nothing at all.

    >>> empty_trace().tokens
    0
    """
    return Trace(records={}, attention={}, parameters={}, blocks=0, task="other", sequences=0, tokens=0)


def ailing_traces() -> dict[str, Trace]:
    """One recording per ailment that setpoint's own probes know.

    Returns:
        Finding code to a trace that has what the code stands for, and nothing else wrong.

    >>> worst = max(abs(r.maximum) for r in ailing_traces()["massive-activation"].by_role("residual"))
    >>> worst > 1e4
    True
    """
    return {
        "variance-growth": _each("residual", lambda r: _scaled(r, 4.0 ** _block(r))),
        "gradient-imbalance": _gradients(lambda block: 1e6 ** (1 - block / BLOCKS)),
        "massive-activation": _each("residual", lambda r: _massive(r) if 2 <= _block(r) < 11 else r),
        "outlier-channels": _each("residual", _outlier_channels),
        "dead-units": _each("hidden", _dead),
        "activation-sparsity": _each("hidden", lambda r: replace(r, zeros=0.97, channel_active=_filled(0.03))),
        "idle-layers": _each("residual", lambda r: replace(r, angle=0.05, step_ratio=1e-4) if _block(r) >= 6 else r),
        "attention-collapse": _attentions(_uniform),
        "attention-saturation": _attentions(_one_hot),
        "rank-collapse": _each("residual", lambda r: replace(r, cosine=0.9999)),
        "norm-mismatch": _each("residual", _mismatched),
        "precision-risk": _each("residual", lambda r: _scaled(r, 3e4)),
        "non-finite": _each("residual", lambda r: replace(r, non_finite=7) if _block(r) >= 5 else r),
    }


def _record(name: str, role: SiteRole, block: int | None, *, scale: float, axis: int = -1) -> Record:
    """What a Gaussian signal of standard deviation ``scale`` gives."""
    top = 4.0 * scale
    return Record(
        site=Site(name, role, Tap(name.split(" ")[0], "output"), block, channel_axis=axis, module=name.split(" ")[0]),
        count=TOKENS * CHANNELS,
        tokens=TOKENS,
        mean=0.0,
        variance=scale**2,
        rms=scale,
        fourth_moment=3 * scale**4,
        minimum=-top,
        maximum=top,
        median=0.6745 * scale,
        peaks=tuple(Peak(top * (1 - 0.05 * i), i % 4, 3 + 5 * i, (7 * i) % CHANNELS) for i in range(4)),
        channel_mean=np.zeros(CHANNELS),
        channel_rms=_filled(scale),
        channel_max=scale * np.linspace(2.5, 4.0, CHANNELS),
        zeros=0.0,
        channel_active=_filled(0.6 if role in ("hidden", "convolution") else 1.0),
        cosine=0.2,
        angle=20.0,
        step_ratio=0.4,
        gradient_rms=1e-3,
        dtype="float32",
    )


def _attention(block: int) -> AttentionRecord:
    name = f"blocks.{block}.attn core"
    return AttentionRecord(
        site=Site(name, "attention", Tap(f"blocks.{block}.attn", "output"), block, module=f"blocks.{block}.attn"),
        entropy=np.linspace(0.55, 0.75, HEADS),
        sink=np.linspace(0.05, 0.2, HEADS),
        largest=np.linspace(0.2, 0.4, HEADS),
        logit_max=np.linspace(4.0, 9.0, HEADS),
        saturated=np.zeros(HEADS),
        queries=TOKENS,
        keys=32,
    )


def _filled(value: float, size: int = CHANNELS) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.full(size, value)


def _each(role: SiteRole, change: Callable[[Record], Record]) -> Trace:
    """The healthy trace with the records of one role changed."""
    trace = healthy_trace()
    records: Mapping[str, Record] = {
        name: change(record) if record.site.role == role else record for name, record in trace.records.items()
    }
    return replace(trace, records=records)


def _block(record: Record) -> int:
    return record.site.block or 0


def _attentions(change: Callable[[int], Mapping[str, float]]) -> Trace:
    """The healthy trace with every head of a block set to the figures that ``change(block)`` gives."""
    trace = healthy_trace()
    attention = {}
    for name, record in trace.attention.items():
        figures: dict[str, Any] = {f: _filled(v, HEADS) for f, v in change(record.site.block or 0).items()}
        attention[name] = replace(record, **figures)
    return replace(trace, attention=attention)


def _gradients(factor: Callable[[int], float]) -> Trace:
    trace = _each("residual", lambda r: replace(r, gradient_rms=1e-3 * factor(_block(r))))
    parameters = {
        name: replace(
            p,
            gradient_norm=(p.gradient_norm or 0.0) * factor(p.block or 0),
            gradient_rms=(p.gradient_rms or 0.0) * factor(p.block or 0),
        )
        for name, p in trace.parameters.items()
    }
    return replace(trace, parameters=parameters)


def _scaled(record: Record, by: float) -> Record:
    """The record of the same signal times ``by``."""
    linear = ("mean", "rms", "minimum", "maximum", "median", "channel_mean", "channel_rms", "channel_max")
    return replace(
        record,
        **{name: getattr(record, name) * by for name in linear},
        variance=(record.variance or 0.0) * by**2,
        fourth_moment=(record.fourth_moment or 0.0) * by**4,
        peaks=tuple(replace(peak, value=peak.value * by) for peak in record.peaks),
    )


def _with_entry(record: Record, value: float, channel: int, share: float) -> Record:
    """The record after ``share`` of the tokens carry ``value`` at ``channel``."""
    assert record.channel_max is not None
    assert record.channel_rms is not None
    weight = share / CHANNELS
    variance = (record.variance or 0.0) + weight * value**2
    largest, rms = record.channel_max.copy(), record.channel_rms.copy()
    largest[channel], rms[channel] = abs(value), abs(value) * share**0.5
    return replace(
        record,
        variance=variance,
        rms=variance**0.5,
        fourth_moment=(record.fourth_moment or 0.0) + weight * value**4,
        maximum=value,
        peaks=(Peak(value, 0, 0, channel), *record.peaks),
        channel_max=largest,
        channel_rms=rms,
    )


def _massive(record: Record) -> Record:
    return _with_entry(record, 2e4, channel=5, share=1 / 32)


def _outlier_channels(record: Record) -> Record:
    return _with_entry(record, 60 * (record.rms or 1.0), channel=9, share=1.0)


def _dead(record: Record) -> Record:
    """Half of the units never active."""
    active, largest, rms = _filled(0.6), _filled(2.0), _filled(0.5)
    for values in (active, largest, rms):
        values[: CHANNELS // 2] = 0.0
    return replace(record, zeros=0.7, channel_active=active, channel_max=largest, channel_rms=rms)


def _mismatched(record: Record) -> Record:
    """Two groups of tokens, one thirty times as long as the other and turning thirty times less."""
    groups = {"text": GroupRecord(8.0, 20.0, TOKENS // 2), "image": GroupRecord(240.0, 0.7, TOKENS // 2)}
    return replace(record, groups=groups)


def _uniform(block: int) -> Mapping[str, float]:
    """Logits so small that every key counts alike."""
    return {"entropy": 0.9999, "sink": 2 / TOKENS, "largest": 2 / TOKENS, "logit_max": 1e-3 * (1 + block)}


def _one_hot(block: int) -> Mapping[str, float]:
    """One token has all the weight: the first one in even blocks, another one in odd blocks."""
    sink = 0.9999 if block % 2 == 0 else 0.0
    return {"entropy": 1e-4, "sink": sink, "largest": 0.9999, "logit_max": 400.0, "saturated": 1.0}

"""A report like the one a small language model gives: 30 blocks, 576 channels, 9 heads, a massive activation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from setpoint.report import ModelInfo, Report
from setpoint.types import (
    AttentionRecord,
    Chart,
    Finding,
    ParameterRecord,
    Peak,
    Record,
    Remedy,
    Series,
    Site,
    SiteRole,
    Tap,
    Trace,
)

BLOCKS, CHANNELS, HIDDEN, HEADS = 30, 576, 1536, 9


def stream_record(site: Site, rms: float, massive: float | None, rng: np.random.Generator, width: int) -> Record:
    channel_max = (np.abs(rng.normal(size=width)) + 3) * rms
    if massive:
        channel_max[507] = massive
        channel_max[84] = massive / 6
    return Record(
        site=site,
        count=2048 * width,
        tokens=2048,
        mean=rms / 50,
        variance=rms**2,
        rms=rms,
        fourth_moment=rms**4 * (3.2 if massive is None else 900.0),
        minimum=-massive if massive else -6 * rms,
        maximum=5 * rms,
        median=rms / 2,
        median_error=0.01,
        peaks=(Peak(value=-(massive or 6 * rms), sequence=0, token=0, channel=507),),
        channel_mean=rng.normal(size=width).astype(np.float32) * rms / 10,
        channel_rms=(channel_max / 4).astype(np.float32),
        channel_max=channel_max.astype(np.float32),
        cosine=0.1 + 0.02 * (site.block or 0),
        angle=None if site.block is None else 40.0 / (1 + site.block),
        step_ratio=None if site.block is None else 0.9 / (1 + site.block),
        gradient_rms=1e-5 * math.exp(-0.05 * (site.block or 0)),
        dtype="float32",
    )


def make_site(name: str, role: SiteRole, block: int | None, module: str) -> Site:
    return Site(name=name, role=role, tap=Tap(module, "output"), block=block, module=module)


def make_trace(blocks: int = BLOCKS, channels: int = CHANNELS, hidden: int = HIDDEN, heads: int = HEADS) -> Trace:
    rng = np.random.default_rng(0)
    sites = [make_site("model.embed_tokens embedding", "embedding", None, "model.embed_tokens")]
    records: dict[str, Record] = {}
    attention: dict[str, AttentionRecord] = {}
    for b in range(blocks):
        base = f"model.layers.{b}"
        sites += [
            make_site(f"{base}.self_attn branch", "branch", b, f"{base}.self_attn"),
            make_site(f"{base}.mlp hidden", "hidden", b, f"{base}.mlp"),
            make_site(f"{base}.mlp branch", "branch", b, f"{base}.mlp"),
            make_site(f"{base} residual", "residual", b, base),
        ]
        core = make_site(f"{base}.self_attn attention", "attention", b, f"{base}.self_attn")
        sink = rng.uniform(0.1, 0.95, size=heads) * (0.2 if b < 2 else 1.0)
        attention[core.name] = AttentionRecord(
            site=core,
            entropy=rng.uniform(0.1, 0.8, size=heads),
            sink=sink,
            largest=np.maximum(sink, 0.3),
            logit_max=rng.uniform(5, 40, size=heads),
            saturated=rng.uniform(0, 0.1, size=heads),
            queries=256,
            keys=512,
        )
    for site in sites:
        rms = 0.15 * math.exp(0.1 * (site.block or 0))
        if site.role == "hidden":
            records[site.name] = Record(
                site=site,
                count=2048 * hidden,
                tokens=2048,
                mean=0.0,
                variance=rms**2,
                rms=rms,
                zeros=0.02 * (site.block or 0) / blocks,
                channel_max=rng.uniform(1, 9, size=hidden).astype(np.float32),
                channel_active=np.ones(hidden, dtype=np.float32),
                dtype="float32",
            )
        else:
            inside = site.role == "residual" and 11 <= (site.block or 0) <= 27
            massive = 21634.2 if inside and channels > 507 else None
            records[site.name] = stream_record(site, rms, massive, rng, channels)
    parameters = {
        f"model.layers.{b}.mlp.down_proj.weight": ParameterRecord(
            f"model.layers.{b}.mlp.down_proj.weight", b, channels * hidden, 30.0, 0.1 / (1 + b), 1e-4 / (1 + b)
        )
        for b in range(blocks)
    }
    return Trace(
        records=records,
        attention=attention,
        parameters=parameters,
        blocks=blocks,
        task="language-model",
        sequences=4,
        tokens=2048,
        loss=2.871,
        facts={"vocabulary": 49152.0},
        structure=frozenset({"attention", "feed_forward", "rms-norm", "pre", "head"}),
    )


def make_finding(**changes: Any) -> Finding:
    values: dict[str, Any] = {
        "code": "massive-activation",
        "id": "massive-activation@model.layers.11:507",
        "severity": "warning",
        "value": 41873.0,
        "unit": "x median",
        "threshold": 1000.0,
        "source": "Sun et al., 2024 · arXiv 2402.17762",
        "sites": tuple(f"model.layers.{b} residual" for b in range(11, 28)),
        "evidence": "channel 507 holds −21,634 on token 0 of every sequence, 41,873 × the median, from block 11 to 27",
        "explanation": "A handful of entries in the residual stream are thousands of times larger than the rest. "
        "The model uses them as a constant: attention heads park their mass on that token. It is harmless in float32 "
        "and costs precision wherever one scale is shared by a whole tensor.",
        "remedies": (
            Remedy("massive-refined", "learn key and value biases", "training", "Sun et al., 2024 · arXiv 2402.17762"),
            Remedy(
                "outliertune",
                "scale per channel, folded",
                "now",
                "Wang et al., 2024 · arXiv 2406.18832",
                available=True,
                shell="setpoint fix MODEL --with outliertune -o OUT",
                python='setpoint.fix(model, "outliertune", batches)',
                proof="outliertune",
            ),
            Remedy("osp", "train without outliers", "training", "Park et al., 2025 · arXiv 2506.19697"),
        ),
        "numbers": {"token": 0, "channel": 507, "value": -21634.2, "first block": 11, "last block": 27},
        "chart": Chart(
            kind="heatmap",
            title="Largest magnitude per channel and block",
            x="channel",
            y="block",
            series=tuple(
                Series(
                    f"{b}",
                    tuple(float(c) for c in range(500, 540)),
                    tuple(21634.2 if c == 507 and 11 <= b <= 27 else 0.5 + c % 7 for c in range(500, 540)),
                )
                for b in range(BLOCKS)
            ),
            log=True,
        ),
    }
    return Finding(**{**values, **changes})


def make_findings() -> tuple[Finding, ...]:
    growth = Chart(
        kind="profile",
        title="Variance of the residual stream",
        x="block",
        y="variance",
        series=(
            Series("measured", tuple(map(float, range(30))), tuple(0.02 * math.exp(0.2 * b) for b in range(30))),
            Series("fit", tuple(map(float, range(30))), tuple(0.021 * math.exp(0.19 * b) for b in range(30))),
        ),
        log=True,
        threshold=5.0,
    )
    return (
        make_finding(),
        make_finding(
            code="attention-saturation",
            id="attention-saturation@model.layers.3",
            severity="info",
            value=0.83,
            unit="share",
            threshold=0.5,
            sites=("model.layers.3.self_attn attention",),
            evidence="83 % of the attention mass falls on the first token (7 of 9 heads)",
            chart=None,
            remedies=(),
        ),
        make_finding(
            code="variance-growth",
            id="variance-growth@residual",
            severity="error",
            value=1.22,
            unit="x per block",
            threshold=1.1,
            sites=tuple(f"model.layers.{b} residual" for b in range(30)),
            evidence="variance grows by 22 % a block, exponentially (R² 0.99): 0.02 after block 0, 7.9 after block 29",
            chart=growth,
        ),
    )


def make_report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "model": ModelInfo(
            name="LlamaForCausalLM",
            source="smollm2",
            task="language-model",
            parameters=134515008,
            dtype="float32",
            notes=("weights are 4-bit (Q4_1 in groups of 32, embeddings Q8_0), dequantized to float32",),
        ),
        "findings": make_findings(),
        "trace": make_trace(),
        "settings": {"data": "default", "deep": False, "loss": True, "unread": ["model.rotary: never called"]},
    }
    return Report(**{**values, **changes})


@pytest.fixture(scope="session")
def report() -> Report:
    return make_report()

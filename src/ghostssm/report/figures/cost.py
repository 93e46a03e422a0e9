"""Figures of what pruning cost and bought: loss by size and by window, decode speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from ghostssm.report.figures import (
    COLOURS,
    Figure,
    chosen,
    index_axis,
    legend_of,
    log_scale,
    names_scale,
    rule,
    selector,
    table,
    tooltip,
)
from ghostssm.units import text_name
from ghostssm.workflows.comparison import DENSE, Row
from ghostssm.workflows.record import DecodeSpeed, WindowLosses

_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_SPREAD = 0.03
"""Methods at one size are drawn beside each other, over this part of a doubling of the size at most."""


def size_figure(rows: Sequence[Row]) -> Figure:
    """Perplexity against N' by method, with bars of one standard error of the paired loss difference."""
    dense, *others = rows
    methods = list(dict.fromkeys(row.label for row in others))
    shown = []
    for row in others:
        offset = _SPREAD * (methods.index(row.label) - (len(methods) - 1) / 2)
        error = 0.0 if math.isnan(row.standard_error) else row.standard_error
        shown.append(
            {
                "method": row.label,
                "size": row.state_size,
                "place": row.state_size * 2**offset,
                "perplexity": row.perplexity,
                "low": row.perplexity * math.exp(-error),
                "high": row.perplexity * math.exp(error),
                "excess": row.excess,
                "error": row.standard_error,
                "state_bytes": row.state_bytes,
            }
        )
    best = min(others, key=lambda row: row.perplexity)
    return Figure(
        "sizes",
        "Perplexity against state size",
        f"Lower is better; the dashed line is the dense model (N = {dense.state_size}, {dense.perplexity:.3f}). Bars "
        "are one standard error of the paired difference to it. Methods are drawn slightly apart.",
        f"Line chart of perplexity against state size for {len(methods)} methods, both axes logarithmic. The dense "
        f"model has {dense.perplexity:.3f}; the lowest of the others is {best.perplexity:.3f}, {best.label} at "
        f"{best.state_size}.",
        _size_chart(methods, sorted({row.state_size for row in others})),
        {"rows": shown, "dense": [{"perplexity": dense.perplexity}]},
    )


def _size_chart(methods: list[str], sizes: list[int]) -> alt.LayerChart:
    legend = legend_of(methods)
    places = table("rows").encode(
        alt.X("place:Q", scale=log_scale(24, base=2), axis=alt.Axis(values=sizes, format="d", grid=False)).title(
            "state size N'"
        ),
        alt.Y("perplexity:Q", scale=log_scale(16), axis=alt.Axis(format=".4~g", tickCount=6)),
        alt.Color("method:N", title=None, scale=names_scale(methods, COLOURS), legend=legend),
    )
    points = places.mark_point(filled=True, size=60, opacity=1).encode(
        alt.Shape("method:N", title=None, scale=names_scale(methods, _SHAPES), legend=legend),
        tooltip=tooltip(
            method="method", size="N'", perplexity="perplexity", excess="excess loss", error="standard error"
        ),
    )
    bars = places.mark_rule(strokeWidth=1.5).encode(alt.Y("low:Q", title="perplexity"), alt.Y2("high"))
    dense = rule("dense").encode(alt.Y("perplexity:Q"))
    return alt.LayerChart(layer=[places.mark_line(strokeWidth=1.5), bars, points, dense], height=360)


def decode_figure(speeds: Sequence[DecodeSpeed]) -> Figure:
    """Decode tokens per second against batch size, measured and predicted, by model."""
    models = list(dict.fromkeys(speed.model for speed in speeds))
    batches = sorted({speed.batch for speed in speeds})
    largest = {speed.model: speed.tokens_per_second for speed in speeds if speed.batch == batches[-1]}
    others = models[1] if len(models) == 2 else "the model that is chosen"
    return Figure(
        "decode",
        "Decode speed",
        "Tokens per second of all sequences together. Dashed: what memory bandwidth and arithmetic of this machine "
        "predict (each weight is read once per step, each sequence's state read and written once); nothing else is "
        f"counted, so measured speeds lie below. Blue is {models[0]}, orange {others}.",
        f"Line chart of decode speed against batch size, both logarithmic. At batch {batches[-1]}: "
        + ", ".join(f"{model} {value:,.0f}" for model, value in largest.items())
        + " tokens per second.",
        _decode_chart(models, batches),
        {
            "rows": [
                {"model": speed.model, "batch": speed.batch, "kind": kind, "speed": value}
                for speed in speeds
                for kind, value in (
                    ("measured", speed.tokens_per_second),
                    ("predicted", speed.predicted_tokens_per_second),
                )
                if value is not None
            ]
        },
    )


def _decode_chart(models: list[str], batches: list[int]) -> alt.LayerChart:
    others = [model for model in models if model != DENSE]
    selectors = [selector("model", others)] if len(others) > 1 else []
    colours = [COLOURS[0], *[COLOURS[1]] * (len(models) - 1)]
    places = table("rows").encode(
        alt.X("batch:Q", scale=log_scale(16, base=2), axis=alt.Axis(values=batches, format="d", grid=False)).title(
            "batch size"
        ),
        alt.Y("speed:Q", scale=log_scale(16), axis=alt.Axis(format="~s", tickCount=6)).title("tokens per second"),
        alt.Color(
            "model:N",
            title=None,
            scale=names_scale(models, colours),
            legend=None if selectors else legend_of(models),
        ),
    )
    for model in selectors:
        places = places.transform_filter((alt.datum.model == DENSE) | (alt.datum.model == model))
    dashes = alt.Scale(domain=["measured", "predicted"], range=[[1, 0], [5, 4]])
    lines = places.mark_line(strokeWidth=1.8).encode(
        # a phone has no room for two legends side by side
        alt.StrokeDash("kind:N", title=None, scale=dashes, legend=alt.Legend(orient="bottom"))
    )
    points = places.mark_point(filled=True, size=45, opacity=1).encode(
        tooltip=tooltip(model="model", batch="batch", kind="kind", speed="tokens/s")
    )
    return alt.LayerChart(layer=[lines, points], height=320).add_params(*selectors)


def window_figure(losses: WindowLosses) -> Figure:
    """Loss difference to the dense model by window, of one model or of several to choose from."""
    rows: list[dict[str, Any]] = []
    worse = []
    for model, found in losses.pruned.items():
        excess = [loss - dense for loss, dense in zip(found, losses.dense, strict=True)]
        worse.append(f"{model}: {sum(value > 0 for value in excess)}, mean {statistics.fmean(excess):.4f}")
        for window, value in enumerate(excess):
            row = {"model": model, "window": window, "dense": losses.dense[window], "loss": found[window]}
            rows.append({**row, "excess": value, "sign": "worse" if value > 0 else "better"})
    bars = (
        table("windows")
        .mark_bar()
        .encode(
            alt.X("window:O", axis=index_axis(len(losses.dense))),
            alt.Y("excess:Q", title="excess loss, nats per token"),
            alt.Color("sign:N", title=None, scale=names_scale(["worse", "better"], [COLOURS[1], COLOURS[0]])),
            tooltip=tooltip(window="window", dense="dense", loss="pruned", excess="difference"),
        )
    )
    mean = rule("windows").encode(alt.Y("mean(excess):Q"))
    selectors = [selector("model", list(losses.pruned))] if len(losses.pruned) > 1 else []
    parts = [chosen(part, *selectors) for part in (bars, mean)]
    return Figure(
        "windows",
        "Loss difference by window",
        f"Loss minus the dense model's on each window of {losses.window_length} tokens of {text_name(losses.text)}, "
        "nats per token. The dashed line is the mean.",
        f"Bar chart of the loss difference on {len(losses.dense)} windows. Windows on which the pruned model is worse: "
        + "; ".join(worse)
        + ".",
        alt.LayerChart(layer=parts, height=260).add_params(*selectors),
        {"windows": rows},
    )

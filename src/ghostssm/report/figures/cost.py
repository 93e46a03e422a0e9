"""Figures of what pruning cost and bought: loss by size and by window, decode speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from ghostssm.engines.capacity import Footprint
from ghostssm.plan.measurement import Measurement
from ghostssm.report.figures import (
    COLOURS,
    INK,
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
from ghostssm.units import counted, text_name
from ghostssm.workflows.compare_result import Row
from ghostssm.workflows.report_record import DecodeSpeed, WindowLosses

_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_SPREAD = 0.03
"""Methods at one size are drawn beside each other, over this part of a doubling of the size at most."""
_EXCESS, _SPEED = "excess loss, nats per token", "tokens per second"
_OWN = "this checkpoint"
_BARS = "Bars are one standard error of the paired loss difference."


def size_figure(rows: Sequence[Row]) -> Figure:
    """Excess loss against the state's bytes per sequence by method, with bars of one standard error."""
    dense, *others = rows
    methods = list(dict.fromkeys(row.series for row in others))
    unit, name = (2**20, "MiB") if max(row.state_bytes for row in rows) >= 2**20 else (2**10, "KiB")
    shown = []
    for row in others:
        place = row.state_bytes / unit * 2 ** (_SPREAD * (methods.index(row.series) - (len(methods) - 1) / 2))
        shown.append({**_loss(row, others), "place": place, "bytes": row.state_bytes})
    best = min(others, key=lambda row: row.excess)
    ticks = sorted({row.state_bytes / unit for row in rows})
    places = alt.X("place:Q", scale=log_scale(24, base=2), title=f"state per sequence, {name}")
    return Figure(
        "sizes",
        "Loss against bytes per sequence",
        f"Lower is better. {_BARS} Dashed: the dense model's state (N = {dense.state_size}, perplexity "
        f"{dense.perplexity:.3f}). Methods are drawn slightly apart.",
        f"Line chart of excess loss against bytes of state per sequence for {len(methods)} methods. The dense model "
        f"has a perplexity of {dense.perplexity:.3f}; the lowest excess loss is {best.excess:.4f}, {best.method} at "
        f"{best.state_size}.",
        _loss_chart(others, places.axis(values=ticks, format=".3~g", grid=False), {"bytes": "bytes"}),
        {"rows": shown, "dense": [{"place": dense.state_bytes / unit}]},
    )


def speed_figure(rows: Sequence[Row]) -> Figure:
    """Excess loss against decode speed by method at every batch size, with bars of one standard error and of rounds."""
    whole, *others = rows
    batches = list(whole.tokens_per_second)
    dense = [{"batch": batch, "place": speed} for batch, speed in whole.tokens_per_second.items()]
    shown = []
    for row in others:
        for batch in batches:
            rate = row.rate(batch)
            speeds = {"place": rate.median, "slowest": rate.low, "fastest": rate.high}
            shown.append({**_loss(row, others), "batch": batch, **speeds})
    last = batches[-1]
    times = [
        f"{row.label} at {row.state_size}: {row.tokens_per_second[last] / whole.tokens_per_second[last]:.2f}"
        for row in others
    ]
    places = alt.X("place:Q", scale=log_scale(24), title=_SPEED).axis(format="~s", tickCount=6)
    return Figure(
        "speeds",
        "Loss against decode speed",
        f"Lower and further right is better. {_BARS} Those of the speed are its range over rounds. Dashed: the dense "
        "model's speed. All sequences of a batch together; each stock shape is timed once, since which channels are "
        "kept makes no difference.",
        f"Scatter plot of excess loss against decode speed. Times the dense model's speed at batch {last}: "
        f"{', '.join(times)}.",
        _loss_chart(others, places, {"place": "tokens/s"}, selector("batch", batches)),
        {"rows": shown, "dense": dense},
    )


def _loss(row: Row, others: Sequence[Row]) -> dict[str, Any]:
    """A row's loss; its error bar ends above zero where the axis is logarithmic."""
    error = 0.0 if math.isnan(row.standard_error) else row.standard_error
    least = min(row.excess for row in others)
    low = max(row.excess - error, least / 2) if least > 0 else row.excess - error
    return {
        "method": row.series,
        "size": row.state_size,
        "dtype": row.state_dtype,
        "perplexity": row.perplexity,
        "excess": row.excess,
        "error": row.standard_error,
        "low": low,
        "high": row.excess + error,
    }


def _loss_chart(
    others: Sequence[Row], places: alt.X, hovered: Mapping[str, str], *selectors: alt.Parameter
) -> alt.LayerChart:
    """A chart of the tables "rows" and "dense"; with a choice among batches it has bars of the speed too."""
    methods = list(dict.fromkeys(row.series for row in others))
    positive = min(row.excess for row in others) > 0
    scale = log_scale(16) if positive else alt.Scale(zero=False, padding=16)
    losses = alt.Y("excess:Q", title=_EXCESS, scale=scale).axis(format=".2~g", tickCount=6)
    legend = legend_of(methods)
    colours = alt.Color("method:N", title=None, scale=names_scale(methods, COLOURS), legend=legend)
    shapes = alt.Shape("method:N", title=None, scale=names_scale(methods, _SHAPES), legend=legend)
    points = table("rows").encode(places, losses, colours)
    titles = {"method": "method", "size": "N'", "dtype": "state", "perplexity": "perplexity", "excess": "excess loss"}
    shown = tooltip(**titles, error="standard error", **hovered)
    bars = points.mark_rule(strokeWidth=1.5).encode(alt.Y("low:Q", title=_EXCESS), alt.Y2("high"))
    parts = [
        bars,
        points.mark_point(filled=True, size=60, opacity=1).encode(shapes, tooltip=shown),
        rule("dense").encode(places),
    ]
    if selectors:
        speeds = points.encode(alt.X("slowest:Q", title=_SPEED), alt.X2("fastest"))
        parts.insert(0, speeds.mark_rule(strokeWidth=1.5))
    else:
        parts.insert(0, points.mark_line(strokeWidth=1.5))
    return alt.LayerChart(layer=[chosen(part, *selectors) for part in parts], height=340).add_params(*selectors)


def baselines_figure(measured: Measurement) -> Figure:
    """Excess loss of the pruned model and of the baselines beside it, with bars of one standard error."""
    finite = [each for each in measured.compared if math.isfinite(each.excess.mean)]
    ranked = sorted(finite, key=lambda each: each.excess.mean)
    shown = []
    for each in ranked:
        mean, error = each.excess.mean, each.excess.standard_error
        reach = 0.0 if math.isnan(error) else error
        shown.append(
            {
                "method": each.recipe,
                "is": _OWN if each is measured.compared[0] else "baseline",
                "size": each.state_size,
                "dtype": each.state_dtype,
                "bytes": each.state_bytes,
                "excess": mean,
                "error": error,
                "low": mean - reach,
                "high": mean + reach,
            }
        )
    kinds = [_OWN, "baseline"]
    losses = alt.X("excess:Q", title=_EXCESS).axis(format=".2~g", tickCount=6)
    methods = alt.Y("method:N", title=None, sort=[each.recipe for each in ranked]).axis(labelLimit=260, grid=False)
    colours = alt.Color("is:N", title=None, scale=names_scale(kinds, COLOURS), legend=legend_of(kinds))
    titles = {"method": "method", "size": "N'", "dtype": "state", "bytes": "bytes", "excess": "excess loss"}
    bars = table("rows").mark_bar(height=16).encode(losses, methods, colours)
    bars = bars.encode(tooltip=tooltip(**titles, error="standard error"))
    errors = table("rows").mark_rule(strokeWidth=1.5, color=INK).encode(alt.X("low:Q"), alt.X2("high"), methods)
    return Figure(
        "baselines",
        "Beside baselines",
        f"Shorter is better. {_BARS} On {counted(measured.windows, 'window')} of {text_name(measured.text)}.",
        f"Bar chart of excess loss: {', '.join(f'{each.recipe} {each.excess.mean:.4f}' for each in ranked)}.",
        alt.LayerChart(layer=[bars, errors], height=28 * len(ranked)),
        {"rows": shown},
    )


def decode_figure(speeds: Sequence[DecodeSpeed]) -> Figure:
    """Decode tokens per second against batch size, measured and predicted, by model."""
    models = list(dict.fromkeys(speed.model for speed in speeds))
    batches = sorted({speed.batch for speed in speeds})
    largest = {speed.model: speed.tokens_per_second for speed in speeds if speed.batch == batches[-1]}
    rows = []
    for speed in speeds:
        measured, predicted = speed.tokens_per_second, speed.predicted_tokens_per_second
        kinds = [("measured", measured, *(speed.spread or (measured, measured)))]
        kinds += [] if predicted is None else [("predicted", predicted, predicted, predicted)]
        for kind, value, low, high in kinds:
            at = {"model": speed.model, "batch": speed.batch, "kind": kind}
            rows.append({**at, "speed": value, "low": low, "high": high})
    return Figure(
        "decode",
        "Decode speed",
        "Tokens per second of all sequences together; bars are the range over rounds where it is known. Dashed: what "
        "memory bandwidth and arithmetic of this machine predict (each weight is read once per step, each sequence's "
        "state read and written once); nothing else is counted, so measured speeds lie below.",
        f"Line chart of decode speed against batch size, both logarithmic. At batch {batches[-1]}: "
        + ", ".join(f"{model} {value:,.0f}" for model, value in largest.items())
        + " tokens per second.",
        _decode_chart(models, batches),
        {"rows": rows},
    )


def _decode_chart(models: list[str], batches: list[int]) -> alt.LayerChart:
    legend = legend_of(models)
    places = table("rows").encode(
        alt.X("batch:Q", scale=log_scale(16, base=2), axis=alt.Axis(values=batches, format="d", grid=False)).title(
            "batch size"
        ),
        alt.Y("speed:Q", scale=log_scale(16), axis=alt.Axis(format="~s", tickCount=6)).title(_SPEED),
        alt.Color("model:N", title=None, scale=names_scale(models, COLOURS), legend=legend),
    )
    dashes = alt.Scale(domain=["measured", "predicted"], range=[[1, 0], [5, 4]])
    lines = places.mark_line(strokeWidth=1.8).encode(
        # a phone has no room for two legends side by side
        alt.StrokeDash("kind:N", title=None, scale=dashes, legend=alt.Legend(orient="bottom"))
    )
    points = places.mark_point(filled=True, size=45, opacity=1).encode(
        alt.Shape("model:N", title=None, scale=names_scale(models, _SHAPES), legend=legend),
        tooltip=tooltip(model="model", batch="batch", kind="kind", speed="tokens/s"),
    )
    bars = places.mark_rule(strokeWidth=1.5).encode(alt.Y("low:Q", title=_SPEED), alt.Y2("high"))
    return alt.LayerChart(layer=[lines, bars, points], height=320)


def capacity_figure(footprints: Mapping[str, Footprint], memories: Sequence[int], context: int) -> Figure:
    """How many sequences GPUs' memories hold, at every state size.

    Args:
        footprints: by the state size's label. memories: bytes. context: tokens whose keys and values are counted.
    """
    labels = list(footprints)
    gpus = [f"{memory / 2**30:g} GiB" for memory in memories]
    rows: list[dict[str, Any]] = [
        {"gpu": gpu, "state": label, "sequences": each.sequences(memory)}
        for gpu, memory in zip(gpus, memories, strict=True)
        for label, each in footprints.items()
    ]
    most = max([1, *(row["sequences"] for row in rows)])
    cached = f" keys and values of {context} tokens," if any(each.cache for each in footprints.values()) else ""
    bars = table("rows").encode(
        alt.X("sequences:Q", scale=alt.Scale(domain=[0, 1.3 * most]), axis=alt.Axis(format="~s", tickCount=5)),
        alt.Y("gpu:N", title=None, sort=gpus, axis=alt.Axis(grid=False)),
        alt.YOffset("state:N", sort=labels),
        tooltip=tooltip(gpu="GPU", state="state", sequences="sequences"),
    )
    numbers = bars.mark_text(align="left", dx=4, color=INK).encode(alt.Text("sequences:Q", format=","))
    return Figure(
        "capacity",
        "Sequences per GPU",
        "How many sequences fit beside the weights, from the sizes alone: state in float32 where no other dtype is "
        f"named,{cached} weights and convolution windows in bfloat16. Activations and what an engine keeps for itself "
        "are left out.",
        "Bar chart of sequences per GPU. "
        + "; ".join(f"{row['gpu']}, {row['state']}: {row['sequences']:,}" for row in rows)
        + ".",
        alt.LayerChart(
            layer=[
                bars.mark_bar().encode(
                    alt.Color("state:N", title=None, scale=names_scale(labels, COLOURS), legend=legend_of(labels))
                ),
                numbers,
            ],
            height=max(150, 26 * len(rows)),
        ),
        {"rows": rows},
    )


def window_figure(losses: WindowLosses) -> Figure:
    """Loss difference to the dense model by window, of one model or of several to choose from."""
    rows: list[dict[str, Any]] = []
    worse = []
    for model, pruned in losses.pruned.items():
        excess = [loss - dense for loss, dense in zip(pruned, losses.dense, strict=True)]
        worse.append(f"{model}: {sum(value > 0 for value in excess)}, mean {statistics.fmean(excess):.4f}")
        for window, value in enumerate(excess):
            row = {"model": model, "window": window, "dense": losses.dense[window], "loss": pruned[window]}
            rows.append({**row, "excess": value, "sign": "worse" if value > 0 else "better"})
    bars = (
        table("windows")
        .mark_bar()
        .encode(
            alt.X("window:O", axis=index_axis(len(losses.dense))),
            alt.Y("excess:Q", title=_EXCESS),
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

"""Figures of what pruning cost and bought: loss by size and by window, decode speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ghostssm.report.figure import RULE, Figure, legend_of, quantity, selector, tooltip
from ghostssm.report.record import DecodeSpeed, WindowLosses
from ghostssm.units import text_name
from ghostssm.workflows.compare import DENSE, Row

_COLOURS = ("#1F86C9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
"""After Okabe & Ito (2008), which colour-blind readers can tell apart, without its yellow and black."""
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_SPREAD = 0.03
"""Methods at one size are drawn beside each other, over this part of a doubling of the size at most."""


def size_figure(rows: Sequence[Row]) -> Figure:
    """Perplexity against N' by method, with bars of one standard error of the paired loss difference."""
    dense, *others = rows
    methods = list(dict.fromkeys(row.method for row in others))
    keys = ("method", "size", "place", "perplexity", "low", "high", "excess", "error", "state_bytes")
    table: dict[str, list[Any]] = {key: [] for key in keys}
    for row in others:
        offset = _SPREAD * (methods.index(row.method) - (len(methods) - 1) / 2)
        error = 0.0 if math.isnan(row.standard_error) else row.standard_error
        values = {
            "method": row.method,
            "size": row.state_size,
            "place": row.state_size * 2**offset,
            "perplexity": row.perplexity,
            "low": row.perplexity * math.exp(-error),
            "high": row.perplexity * math.exp(error),
            "excess": row.excess,
            "error": row.standard_error,
            "state_bytes": row.state_bytes,
        }
        for key, value in values.items():
            table[key].append(value)
    best = min(others, key=lambda row: row.perplexity)
    return Figure(
        "sizes",
        "Perplexity against state size",
        f"Lower is better; the dashed line is the dense model (N = {dense.state_size}, {dense.perplexity:.3f}). Bars "
        "are one standard error of the paired difference to it. Methods are drawn slightly apart.",
        f"Line chart of perplexity against state size for {len(methods)} methods, both axes logarithmic. The dense "
        f"model has {dense.perplexity:.3f}; the lowest of the others is {best.perplexity:.3f}, {best.method} at "
        f"{best.state_size}.",
        _size_spec(methods, sorted({row.state_size for row in others}), dense.perplexity),
        {"rows": table},
    )


def _size_spec(methods: list[str], sizes: list[int], dense: float) -> dict[str, Any]:
    scale = {"type": "log", "base": 2, "nice": False, "padding": 24}
    x = quantity("place", "state size N'", scale, values=sizes, format="d", grid=False)
    y = quantity("perplexity", "perplexity", {"type": "log", "nice": False, "padding": 16}, format=".4~g", tickCount=6)
    colour = {
        "field": "method",
        "type": "nominal",
        "title": None,
        "scale": {"domain": methods, "range": _cycled(_COLOURS, methods)},
        "legend": legend_of(methods),
    }
    shape = {**colour, "scale": {"domain": methods, "range": _cycled(_SHAPES, methods)}}
    shown = tooltip(method="method", size="N'", perplexity="perplexity", excess="excess loss", error="standard error")
    return {
        "height": 360,
        "params": [],
        "data": {"name": "rows"},
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": {"x": x, "y": y, "color": colour}},
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": shown},
            },
            {
                "mark": RULE,
                "encoding": {"y": {"datum": dense, "type": "quantitative"}},
            },
        ],
    }


def decode_figure(speeds: Sequence[DecodeSpeed]) -> Figure:
    """Decode tokens per second against batch size, measured and predicted, by model."""
    models = list(dict.fromkeys(speed.model for speed in speeds))
    table: dict[str, list[Any]] = {key: [] for key in ("model", "batch", "kind", "speed")}
    for speed in speeds:
        for kind, value in (("measured", speed.tokens_per_second), ("predicted", speed.predicted_tokens_per_second)):
            if value is not None:
                for key, entry in zip(table, (speed.model, speed.batch, kind, value), strict=True):
                    table[key].append(entry)
    batches = sorted({speed.batch for speed in speeds})
    others = models[1] if len(models) == 2 else "the model that is chosen"
    largest = {speed.model: speed.tokens_per_second for speed in speeds if speed.batch == batches[-1]}
    return Figure(
        "decode",
        "Decode speed",
        "Tokens per second of all sequences together. Dashed: what memory bandwidth and arithmetic of this machine "
        "predict (each weight is read once per step, each sequence's state read and written once); nothing else is "
        f"counted, so measured speeds lie below. Blue is {models[0]}, orange {others}.",
        f"Line chart of decode speed against batch size, both logarithmic. At batch {batches[-1]}: "
        + ", ".join(f"{model} {value:,.0f}" for model, value in largest.items())
        + " tokens per second.",
        _decode_spec(models, batches),
        {"rows": table},
    )


def _decode_spec(models: list[str], batches: list[int]) -> dict[str, Any]:
    others = [model for model in models if model != DENSE]
    encoding: dict[str, Any] = {
        "x": quantity(
            "batch",
            "batch size",
            {"type": "log", "base": 2, "nice": False, "padding": 16},
            values=batches,
            format="d",
            grid=False,
        ),
        "y": quantity(
            "speed", "tokens per second", {"type": "log", "nice": False, "padding": 16}, format="~s", tickCount=6
        ),
        "color": {
            "field": "model",
            "type": "nominal",
            "title": None,
            "scale": {"domain": models, "range": [_COLOURS[0], *[_COLOURS[1]] * (len(models) - 1)]},
            "legend": None if len(others) > 1 else legend_of(models),
        },
        "strokeDash": {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "scale": {"domain": ["measured", "predicted"], "range": [[1, 0], [5, 4]]},
            "legend": {"orient": "bottom"},  # a phone has no room for two legends side by side
        },
    }
    point = {key: value for key, value in encoding.items() if key != "strokeDash"}
    point["tooltip"] = tooltip(model="model", batch="batch", kind="kind", speed="tokens/s")
    return {
        "height": 320,
        "params": [selector("model", "Model", others)] if len(others) > 1 else [],
        "data": {"name": "rows"},
        "transform": [{"filter": f"datum.model == '{DENSE}' || datum.model == model"}] if len(others) > 1 else [],
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoding},
            {"mark": {"type": "point", "filled": True, "size": 45, "opacity": 1}, "encoding": point},
        ],
    }


def window_figure(losses: WindowLosses) -> Figure:
    """Loss difference to the dense model by window, of one model or of several to choose from."""
    table: dict[str, list[Any]] = {key: [] for key in ("model", "window", "dense", "loss", "excess", "sign")}
    means: dict[str, list[Any]] = {"model": [], "mean": []}
    worse = []
    for model, found in losses.pruned.items():
        excess = [loss - dense for loss, dense in zip(found, losses.dense, strict=True)]
        table["model"] += [model] * len(excess)
        table["window"] += range(len(excess))
        table["dense"] += losses.dense
        table["loss"] += found
        table["excess"] += excess
        table["sign"] += ["worse" if value > 0 else "better" for value in excess]
        means["model"].append(model)
        means["mean"].append(statistics.fmean(excess))
        worse.append(f"{model}: {sum(value > 0 for value in excess)}, mean {means['mean'][-1]:.4f}")
    return Figure(
        "windows",
        "Loss difference by window",
        f"Loss minus the dense model's on each window of {losses.window_length} tokens of {text_name(losses.text)}, "
        "nats per token. The dashed line is the mean.",
        f"Bar chart of the loss difference on {len(losses.dense)} windows. Windows on which the pruned model is worse: "
        + "; ".join(worse)
        + ".",
        _window_spec(list(losses.pruned), len(losses.dense)),
        {"windows": table, "means": means},
    )


def _window_spec(models: list[str], windows: int) -> dict[str, Any]:
    params = [selector("model", "Model", models)] if len(models) > 1 else []
    chosen = [{"filter": "datum.model == model"}] if params else []
    return {
        "height": 260,
        "params": params,
        "layer": [
            {
                "data": {"name": "windows"},
                "transform": chosen,
                "mark": {"type": "bar"},
                "encoding": {
                    "x": {
                        "field": "window",
                        "type": "ordinal",
                        "title": "window",
                        "axis": {
                            "values": list(range(0, windows, max(1, windows // 8))),
                            "labelAngle": 0,
                            "grid": False,
                        },
                    },
                    "y": {"field": "excess", "type": "quantitative", "title": "excess loss, nats per token"},
                    "color": {
                        "field": "sign",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": ["worse", "better"], "range": ["#D55E00", "#1F86C9"]},
                    },
                    "tooltip": tooltip(window="window", dense="dense", loss="pruned", excess="difference"),
                },
            },
            {
                "data": {"name": "means"},
                "transform": chosen,
                "mark": RULE,
                "encoding": {"y": {"field": "mean", "type": "quantitative"}},
            },
        ],
    }


def _cycled(values: Sequence[str], names: Sequence[str]) -> list[str]:
    return [values[index % len(values)] for index in range(len(names))]

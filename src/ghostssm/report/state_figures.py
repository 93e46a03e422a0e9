"""Figures of the state: what its channels do, and which of them were kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ghostssm.plan.plan import Plan
from ghostssm.report.figure import RULE, Figure, LegendColumns, quantity, selector, shown_groups, tooltip
from ghostssm.report.record import Observations
from ghostssm.units import text_name

_LEAST_LEVEL = -4.0
"""Saliency below 10^-4 of a layer's largest is drawn like that."""
_KINDS = ("phantom", "corporeal", "both small", "both large")
_KIND_COLOURS = ("#D55E00", "#1F86C9", "#999999", "#999999")
_PLACES = {
    "phantom": ("left", "top", 6, 6),
    "corporeal": ("right", "bottom", {"expr": "width - 6"}, {"expr": "height - 6"}),
}


def phantom_figure(seen: Observations, plan: Plan | None = None) -> Figure:
    """Weight norm against runtime energy of every channel, cut into quadrants at each layer's medians.

    Phantom channels have small weights and large energy, corporeal ones large weights and small energy (Menezes &
    Kyrillidis 2026).
    """
    rows: dict[str, list[Any]] = {key: [] for key in ("layer", "group", "channel", "norm", "energy", "kind")}
    if plan is not None:
        rows["kept"] = []
    by_layer: dict[str, list[Any]] = {
        key: [] for key in ("layer", "norm", "energy", "correlation", "phantom", "corporeal")
    }
    kinds: list[Tensor] = []
    n_groups, n = next(iter(seen.energies.values())).shape
    groups = shown_groups(len(seen.energies), n_groups, n)
    for layer, (name, energy) in enumerate(seen.energies.items()):
        norm = seen.weight_norms[name]
        kind = quadrants(norm, energy)
        kinds.append(kind)
        _extend(
            by_layer,
            layer=layer,
            norm=norm.median().item(),
            energy=energy.median().item(),
            correlation=f"correlation {correlation(norm, energy):.2f}",
            phantom=f"phantom {_share(kind, 0)}",
            corporeal=f"corporeal {_share(kind, 1)}",
        )
        channels = range(groups * n)
        rows["layer"] += [layer] * len(channels)
        rows["group"] += [index // n for index in channels]
        rows["channel"] += [index % n for index in channels]
        rows["norm"] += [value or None for value in norm[:groups].flatten().tolist()]
        rows["energy"] += [value or None for value in energy[:groups].flatten().tolist()]
        rows["kind"] += [_KINDS[index] for index in kind[:groups].flatten().tolist()]
        if plan is not None:
            rows["kept"] += ["kept" if kept else "removed" for kept in _kept(plan, name)[:groups].flatten().tolist()]
    everything = torch.cat([kind.flatten() for kind in kinds])
    together = correlation(*(torch.cat([value.flatten() for value in part.values()]) for part in _norms(seen)))
    caption = (
        f"Each point is a state channel, on {seen.tokens:,} tokens of {text_name(seen.text)} through the unpruned "
        f"model. The lines are the layer's medians. Over all layers {_share(everything, 0)} of the channels are "
        "phantom (small weights, large energy: weights alone would remove them wrongly), "
        f"{_share(everything, 1)} corporeal (large weights, small energy). "
        f"Correlation of the logarithms over all channels (Pearson): {together:.2f}."
    )
    return Figure(
        "phantom",
        "Weights and runtime energy",
        caption + _groups_note(groups, n_groups),
        "Scatter plot of the product of a channel's B and C weight norms against its runtime energy, both logarithmic, "
        f"for one layer at a time. {_share(everything, 0)} of all channels are phantom, {_share(everything, 1)} "
        f"corporeal; the correlation is {together:.2f}.",
        _phantom_spec(len(seen.energies), plan is not None),
        {"channels": rows, "layers": by_layer},
    )


def _phantom_spec(layers: int, with_kept: bool) -> dict[str, Any]:
    titles = {"layer": "layer", "group": "group", "channel": "channel", "norm": "weight norm", "energy": "energy"}
    half = LegendColumns(180)  # two legends share a line
    point: dict[str, Any] = {
        "x": quantity(
            "norm", "weight norm |B row| |C row|", {"type": "log", "nice": False, "padding": 12}, format="~g"
        ),
        "y": quantity("energy", "runtime energy (rms)", {"type": "log", "nice": False, "padding": 12}, format="~g"),
        "color": {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(_KINDS), "range": list(_KIND_COLOURS)},
            "legend": {"values": list(_KINDS[:2]), "columns": half},
        },
        "tooltip": tooltip(**titles, kind="quadrant", **({"kept": "in the plan"} if with_kept else {})),
    }
    if with_kept:
        ink = {"symbolFillColor": {"expr": "ink"}, "symbolStrokeColor": {"expr": "ink"}}
        shapes = {"domain": ["kept", "removed"], "range": ["circle", "cross"]}
        legend = {**ink, "columns": half}
        point["shape"] = {"field": "kept", "type": "nominal", "title": None, "scale": shapes, "legend": legend}
    medians = [
        {
            "data": {"name": "layers"},
            "transform": [{"filter": "datum.layer == layer"}],
            "mark": RULE,
            "encoding": {axis: {"field": field, "type": "quantitative"}},
        }
        for axis, field in (("x", "norm"), ("y", "energy"))
    ]
    texts = [
        {
            "data": {"name": "layers"},
            "transform": [{"filter": "datum.layer == layer"}],
            "mark": {
                "type": "text",
                "align": align,
                "baseline": baseline,
                "x": x,
                "y": y,
                "fontWeight": "bold",
                "color": _KIND_COLOURS[_KINDS.index(field)],
            },
            "encoding": {"text": {"field": field}},
        }
        for field, (align, baseline, x, y) in _PLACES.items()
    ]
    texts.append(
        {
            "data": {"name": "layers"},
            "transform": [{"filter": "datum.layer == layer"}],
            "mark": {
                "type": "text",
                "align": "right",
                "baseline": "top",
                "x": {"expr": "width - 6"},
                "y": 6,
                "color": {"expr": "ink"},
            },
            "encoding": {"text": {"field": "correlation"}},
        }
    )
    points = {
        "data": {"name": "channels"},
        "transform": [{"filter": "datum.layer == layer && isValid(datum.norm) && isValid(datum.energy)"}],
        "mark": {"type": "point", "filled": True, "size": 42, "opacity": 0.85},
        "encoding": point,
    }
    return {
        "height": 360,
        "params": [selector("layer", "Layer", range(layers))],
        "layer": [points, *medians, *texts],
    }


def hankel_figure(seen: Observations, plan: Plan | None = None) -> Figure:
    """The Hankel singular values of every layer's state: how small a state could be in the best basis."""
    n_groups, n = next(iter(seen.hankel.values())).shape
    layers = len(seen.hankel)
    groups = shown_groups(layers, n_groups, n)
    rows: dict[str, list[Any]] = {key: [] for key in ("layer", "group", "index", "value", "relative")}
    for layer, values in enumerate(seen.hankel.values()):
        largest = values.max().item() or 1.0
        for group in range(groups):
            found = values[group].tolist()
            rows["layer"] += [layer] * n
            rows["group"] += [group] * n
            rows["index"] += range(1, n + 1)
            rows["value"] += found
            rows["relative"] += [value / largest or None for value in found]
    sizes: dict[str, list[Any]] = {"layer": [], "size": []}
    if plan is not None:
        alike = len(set(plan.state_sizes)) == 1
        for layer, size in enumerate(plan.state_sizes[:1] if alike else plan.state_sizes):
            _extend(sizes, layer=-1 if alike else layer, size=size)
    energy = torch.stack([values.square() for values in seen.hankel.values()])
    half = (energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(1e-300) < 0.99).sum(-1).double().mean() + 1
    caption = (
        "How much each direction of a layer's state matters to the block's output when the basis is chosen best; "
        f"relative to the layer's largest value. On average {half:.0f} of {n} directions hold 99% of the squared "
        "values. A steep curve is a state that can be small."
    )
    if sizes["layer"]:
        caption += " The dashed line is the state size kept" + (
            "." if sizes["layer"] == [-1] else ", of the layer that is chosen."
        )
    return Figure(
        "hankel",
        "Hankel singular values",
        caption + _groups_note(groups, n_groups),
        f"Line chart of the Hankel singular values of {layers} layers in descending order, on a logarithmic axis. On "
        f"average {half:.0f} of {n} hold 99 percent of the squared values.",
        _hankel_spec(layers, bool(sizes["layer"])),
        {"values": rows, **({"sizes": sizes} if sizes["layer"] else {})},
    )


def _hankel_spec(layers: int, with_sizes: bool) -> dict[str, Any]:
    chosen = "layer < 0 || datum.layer == layer"
    encoding: dict[str, Any] = {
        "x": quantity("index", "singular value number", {"nice": False}, format="d", tickCount=8),
        "y": quantity("relative", "relative to the largest", {"type": "log", "nice": False}, format="~g"),
        "color": {
            "field": "layer",
            "type": "quantitative",
            "title": "layer",
            "scale": {"scheme": {"name": "viridis", "extent": [0.25, 0.92]}},
            "legend": {"type": "gradient", "format": "d", "tickMinStep": 1},
        },
        "detail": [{"field": "layer"}, {"field": "group"}],
        "opacity": {"condition": {"test": chosen, "value": 0.9}, "value": 0.08},
    }
    shown = tooltip(layer="layer", group="group", index="number", value="value", relative="relative")
    valid = {"filter": "isValid(datum.relative)"}
    sizes = {
        "data": {"name": "sizes"},
        "transform": [{"filter": "datum.layer < 0 || datum.layer == layer"}],
        "mark": RULE,
        "encoding": {"x": {"field": "size", "type": "quantitative"}},
    }
    return {
        "height": 320,
        "params": [selector("layer", "Layer", [-1, *range(layers)], ["all", *map(str, range(layers))])],
        "layer": [
            {
                "data": {"name": "values"},
                "transform": [valid],
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": encoding,
            },
            {
                "data": {"name": "values"},
                "transform": [valid],
                "mark": {"type": "circle", "size": 14},
                "encoding": {**encoding, "tooltip": shown},
            },
            *([sizes] if with_sizes else []),
        ],
    }


def saliency_figure(plans: Mapping[str, Plan]) -> Figure:
    """Scores by layer and channel of one plan or of several to choose from, and what each kept.

    All plans must have scores, and be of one model.
    """
    first = next(iter(plans.values()))
    layers, n_groups, n = len(first.selections), first.n_groups, first.state_size
    groups = shown_groups(layers * len(plans), n_groups, n)
    rows: dict[str, list[Any]] = {key: [] for key in ("plan", "layer", "group", "channel", "score", "level", "kept")}
    for label, plan in plans.items():
        for layer, name in enumerate(plan.selections):
            score = plan.scores[name][:groups].flatten()
            largest = plan.scores[name].max().clamp_min(1e-300)
            level = (score.clamp_min(0) / largest).log10().clamp_min(_LEAST_LEVEL)
            rows["plan"] += [label] * len(score)
            rows["layer"] += [layer] * len(score)
            rows["group"] += [index // n for index in range(len(score))]
            rows["channel"] += [index % n for index in range(len(score))]
            rows["score"] += score.tolist()
            rows["level"] += level.tolist()
            rows["kept"] += ["kept" if kept else "removed" for kept in _kept(plan, name)[:groups].flatten().tolist()]
    projected = any(plan.is_projected for plan in plans.values())
    caption = (
        "Colour: a channel's score over the largest of its layer, as a power of ten (-1 is a tenth). Full cells were "
        "kept, thin ones removed."
    )
    if projected:
        caption += " Of a projected state the columns are Hankel singular values in descending order, not channels."
    kept = ", ".join(f"{label}: {kept_share(plan):.0%}" for label, plan in plans.items())
    params = [selector("plan", "Plan", list(plans))] if len(plans) > 1 else []
    if groups > 1:
        params.append(selector("group", "Group", range(groups)))
    return Figure(
        "saliency",
        "Saliency, and what was kept",
        caption + _groups_note(groups, n_groups),
        f"Heat map of scores with a row for each of {layers} layers and a column for each of {n} state channels. Kept "
        f"of all channels: {kept}.",
        _saliency_spec(params, layers, n, min(rows["level"])),
        {"channels": rows},
    )


def _saliency_spec(params: list[dict[str, Any]], layers: int, n: int, least: float) -> dict[str, Any]:
    chosen = [f"datum.{param['name']} == {param['name']}" for param in params]
    encoding = {
        "x": {
            "field": "channel",
            "type": "ordinal",
            "title": "state channel",
            "axis": {"values": list(range(0, n, max(1, n // 8))), "labelAngle": 0, "grid": False},
        },
        "y": {
            "field": "layer",
            "type": "ordinal",
            "title": "layer",
            "axis": {"grid": False, "labelOverlap": True},
        },
        "color": {
            "field": "level",
            "type": "quantitative",
            "title": "log10 of relative score",
            "scale": {"scheme": "viridis", "domain": [min(-0.5, math.floor(2 * least) / 2), 0]},
        },
        "tooltip": tooltip(layer="layer", group="group", channel="channel", score="score", kept="in the plan"),
    }
    return {
        "height": max(160, min(900, 15 * layers)),
        "params": params,
        "data": {"name": "channels"},
        "transform": [{"filter": " && ".join(chosen)}] if chosen else [],
        "layer": [
            {
                "transform": [{"filter": f"datum.kept == '{kept}'"}],
                "mark": {"type": "rect", "height": {"band": band}},
                "encoding": encoding,
            }
            for kept, band in (("kept", 0.94), ("removed", 0.28))
        ],
    }


def quadrants(norm: Tensor, energy: Tensor) -> Tensor:
    """0 phantom, 1 corporeal, 2 both small, 3 both large: above or not above the layer's medians; (g, n), int64."""
    heavy, loud = norm > norm.median(), energy > energy.median()
    kind = torch.where(heavy, 3, 2)
    kind[loud & ~heavy] = 0
    kind[heavy & ~loud] = 1
    return kind


def correlation(norm: Tensor, energy: Tensor) -> float:
    """Pearson's, of the logarithms; of the channels where both are above 0. NaN where one of them is constant."""
    both = (norm > 0) & (energy > 0)
    if both.sum() < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([norm[both].log(), energy[both].log()]))[0, 1].item()


def _kept(plan: Plan, name: str) -> Tensor:
    """(g, n), whether a plan keeps a mixer's channels; of a projection, its directions."""
    kept = torch.zeros(plan.n_groups, plan.state_size, dtype=torch.bool)
    if name in plan.projections:
        kept[:, : plan.projections[name].B.shape[-1]] = True
        return kept
    for group, channels in enumerate(plan.selections[name].kept):
        kept[group, list(channels)] = True
    return kept


def kept_share(plan: Plan) -> float:
    """Of all channels of all layers, the share that stays; of projections, the share of directions."""
    return sum(_kept(plan, name).double().mean().item() for name in plan.selections) / len(plan.selections)


def has_scores(plan: Plan) -> bool:
    """Whether every mixer of a plan has a score for each of its channels."""
    shape = (plan.n_groups, plan.state_size)
    return all(name in plan.scores and plan.scores[name].shape == shape for name in plan.selections)


def _norms(seen: Observations) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    return seen.weight_norms, seen.energies


def _share(kind: Tensor, which: int) -> str:
    return f"{(kind == which).double().mean().item():.1%}"


def _groups_note(shown: int, n_groups: int) -> str:
    return "" if shown == n_groups else f" Drawn: the first {shown} of {n_groups} groups."


def _extend(table: dict[str, list[Any]], **row: Any) -> None:
    for key, value in row.items():
        table[key].append(value)

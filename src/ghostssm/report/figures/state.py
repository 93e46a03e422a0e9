"""Figures of the state: what its channels do, and which of them were kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import torch
from torch import Tensor

from ghostssm.plan.plan import Plan
from ghostssm.report.figures import (
    COLOURS,
    INK,
    Figure,
    chosen,
    columns,
    index_axis,
    log_scale,
    names_scale,
    rule,
    selector,
    shown_groups,
    table,
    tooltip,
)
from ghostssm.units import text_name
from ghostssm.workflows.report_record import Observations

_LEAST_LEVEL = -4.0
"""Saliency below 10^-4 of a layer's largest is drawn like that."""
_KINDS = ("phantom", "corporeal", "both small", "both large")


def phantom_figure(seen: Observations, plan: Plan | None = None) -> Figure:
    """Weight norm against runtime energy of every channel, cut into quadrants at each layer's medians.

    Phantom channels have small weights and large energy, corporeal ones large weights and small energy (Menezes &
    Kyrillidis 2026).
    """
    norms, energies = (torch.stack(list(part.values())) for part in (seen.weight_norms, seen.energies))
    kinds = torch.stack([quadrants(norm, energy) for norm, energy in zip(norms, energies, strict=True)])
    layers, n_groups, n = energies.shape
    groups = shown_groups(layers, n_groups, n)
    channels: list[dict[str, Any]] = []
    medians = []
    for layer, (name, norm, energy, kind) in enumerate(zip(seen.energies, norms, energies, kinds, strict=True)):
        shown = {"norm": _above_zero(norm), "energy": _above_zero(energy), "kind": np.array(_KINDS)[kind]}
        if plan is not None:
            shown["kept"] = _kept_words(plan, name)
        channels += _rows(layer, groups, shown)
        medians.append(
            {
                "layer": layer,
                "norm": norm.median().item(),
                "energy": energy.median().item(),
                "correlation": f"correlation {correlation(norm, energy):.2f}",
                "phantom": f"phantom {_share(kind, 0)}",
                "corporeal": f"corporeal {_share(kind, 1)}",
            }
        )
    together = correlation(norms, energies)
    caption = (
        f"Each point is a state channel, on {seen.tokens:,} tokens of {text_name(seen.text)} through the unpruned "
        f"model. The lines are the layer's medians. Over all layers {_share(kinds, 0)} of the channels are "
        "phantom (small weights, large energy: weights alone would remove them wrongly), "
        f"{_share(kinds, 1)} corporeal (large weights, small energy). "
        f"Correlation of the logarithms over all channels (Pearson): {together:.2f}."
    )
    return Figure(
        "phantom",
        "Weights and runtime energy",
        caption + _groups_note(groups, n_groups),
        "Scatter plot of the product of a channel's B and C weight norms against its runtime energy, both logarithmic, "
        f"for one layer at a time. {_share(kinds, 0)} of all channels are phantom, {_share(kinds, 1)} "
        f"corporeal; the correlation is {together:.2f}.",
        _phantom_chart(layers, plan is not None),
        {"channels": channels, "layers": medians},
    )


def _phantom_chart(layers: int, with_kept: bool) -> alt.LayerChart:
    layer = selector("layer", range(layers))
    half = columns(180)  # two legends share a line
    right = alt.ExprRef("width - 6")
    titles = {"layer": "layer", "group": "group", "channel": "channel", "norm": "weight norm", "energy": "energy"}
    titles |= {"kind": "quadrant"} | ({"kept": "in the plan"} if with_kept else {})
    points = (
        table("channels")
        .transform_filter("isValid(datum.norm) && isValid(datum.energy)")
        .mark_point(filled=True, size=42, opacity=0.85)
        .encode(
            alt.X("norm:Q", title="weight norm |B row| |C row|", scale=log_scale(12), axis=alt.Axis(format="~g")),
            alt.Y("energy:Q", title="runtime energy (rms)", scale=log_scale(12), axis=alt.Axis(format="~g")),
            alt.Color(
                "kind:N",
                title=None,
                scale=names_scale(_KINDS, [COLOURS[1], COLOURS[0], "#b0b0b0", "#808080"]),
                legend=alt.Legend(columns=half),
            ),
            tooltip=tooltip(**titles),
        )
    )
    if with_kept:
        legend = alt.Legend(symbolFillColor=INK, symbolStrokeColor=INK, columns=half)
        shapes = names_scale(["kept", "removed"], ["circle", "cross"])
        points = points.encode(alt.Shape("kept:N", title=None, scale=shapes, legend=legend))
    phantom = table("layers").mark_text(align="left", baseline="top", x=6, y=6, fontWeight="bold", color=COLOURS[1])
    corporeal = table("layers").mark_text(
        align="right", baseline="bottom", x=right, y=alt.ExprRef("height - 6"), fontWeight="bold", color=COLOURS[0]
    )
    correlated = table("layers").mark_text(align="right", baseline="top", x=right, y=6, color=INK)
    texts = [
        phantom.encode(alt.Text("phantom:N")),
        corporeal.encode(alt.Text("corporeal:N")),
        correlated.encode(alt.Text("correlation:N")),
    ]
    medians = [rule("layers").encode(alt.X("norm:Q")), rule("layers").encode(alt.Y("energy:Q"))]
    parts = [chosen(part, layer) for part in (points, *medians, *texts)]
    return alt.LayerChart(layer=parts, height=360).add_params(layer)


def hankel_figure(seen: Observations, plan: Plan | None = None) -> Figure:
    """The Hankel singular values of every layer's state: how small a state could be in the best basis."""
    values = torch.stack(list(seen.hankel.values()))
    layers, n_groups, n = values.shape
    groups = shown_groups(layers, n_groups, n)
    rows: list[dict[str, Any]] = []
    for layer, value in enumerate(values):
        relative = _above_zero(value / (value.max().item() or 1.0))
        rows += _rows(layer, groups, {"value": value, "relative": relative}, place="index", first=1)
    energy = values.square()
    half = (energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(1e-300) < 0.99).sum(-1).double().mean() + 1
    caption = (
        "How much each direction of a layer's state matters to the block's output when the basis is chosen best; "
        f"relative to the layer's largest value. On average {half:.0f} of {n} directions hold 99% of the squared "
        "values. A steep curve is a state that can be small."
    )
    tables = {"values": rows}
    if plan is not None:
        alike = len(set(plan.state_sizes)) == 1
        sizes = {-1: plan.state_sizes[0]} if alike else dict(enumerate(plan.state_sizes))
        tables["sizes"] = [{"layer": layer, "size": size} for layer, size in sizes.items()]
        caption += " The dashed line is the state size kept" + ("." if alike else ", of the layer that is chosen.")
    return Figure(
        "hankel",
        "Hankel singular values",
        caption + _groups_note(groups, n_groups),
        f"Line chart of the Hankel singular values of {layers} layers in descending order, on a logarithmic axis. On "
        f"average {half:.0f} of {n} hold 99 percent of the squared values.",
        _hankel_chart(layers, n, plan is not None),
        tables,
    )


def _hankel_chart(layers: int, n: int, with_sizes: bool) -> alt.LayerChart:
    layer = selector("layer", [-1, *range(layers)], ["all", *map(str, range(layers))])
    of_layer = alt.datum.layer == layer
    values = (
        table("values")
        .transform_filter("isValid(datum.relative)")
        .encode(
            alt.X(
                "index:Q",
                title="singular value number",
                scale=alt.Scale(domain=[1, n], nice=False),
                axis=alt.Axis(format="d", tickCount=8),
            ),
            alt.Y("relative:Q", title="relative to the largest", scale=log_scale(0), axis=alt.Axis(format="~g")),
            alt.Color(
                "layer:Q",
                scale=alt.Scale(scheme=alt.SchemeParams(name="viridis", extent=[0.25, 0.92])),
                legend=alt.Legend(type="gradient", format="d", tickMinStep=1),
            ),
            detail=["layer:N", "group:N"],
            opacity=alt.when((layer < 0) | of_layer).then(alt.value(0.9)).otherwise(alt.value(0.08)),
        )
    )
    shown = tooltip(layer="layer", group="group", index="number", value="value", relative="relative")
    parts = [values.mark_line(strokeWidth=1.5), values.mark_circle(size=14).encode(tooltip=shown)]
    if with_sizes:
        parts.append(rule("sizes").transform_filter((alt.datum.layer < 0) | of_layer).encode(alt.X("size:Q")))
    return alt.LayerChart(layer=parts, height=320).add_params(layer)


def saliency_figure(plans: Mapping[str, Plan]) -> Figure:
    """Scores by layer and channel of one plan or of several to choose from, and what each kept.

    All plans must have scores, and be of one model.
    """
    first = next(iter(plans.values()))
    layers, n_groups, n = len(first.selections), first.n_groups, first.state_size
    groups = shown_groups(layers * len(plans), n_groups, n)
    rows: list[dict[str, Any]] = []
    for label, plan in plans.items():
        for layer, name in enumerate(plan.selections):
            score = plan.scores[name]
            level = (score.clamp_min(0) / score.max().clamp_min(1e-300)).log10().clamp_min(_LEAST_LEVEL)
            shown = {"score": score, "level": level, "kept": _kept_words(plan, name)}
            rows += [{"plan": label, **row} for row in _rows(layer, groups, shown)]
    caption = (
        "Colour: a channel's score over the largest of its layer, as a power of ten (-1 is a tenth). Full cells were "
        "kept, thin ones removed."
    )
    if any(plan.is_projected for plan in plans.values()):
        caption += " Of a projected state the columns are Hankel singular values in descending order, not channels."
    kept = ", ".join(f"{label}: {plan.kept_share:.0%}" for label, plan in plans.items())
    selectors = [selector("plan", list(plans))] if len(plans) > 1 else []
    selectors += [selector("group", range(groups))] if groups > 1 else []
    least = min(row["level"] for row in rows)
    colours = alt.Scale(scheme="viridis", domain=[min(-0.5, math.floor(2 * least) / 2), 0])
    cells = table("channels").encode(
        alt.X("channel:O", title="state channel", axis=index_axis(n)),
        alt.Y("layer:O", axis=alt.Axis(grid=False, labelOverlap=True)),
        alt.Color("level:Q", title="log10 of relative score", scale=colours),
        tooltip=tooltip(layer="layer", group="group", channel="channel", score="score", kept="in the plan"),
    )
    parts = [
        chosen(cells, *selectors).transform_filter(alt.datum.kept == word).mark_rect(height=alt.RelativeBandSize(band))
        for word, band in (("kept", 0.94), ("removed", 0.28))
    ]
    return Figure(
        "saliency",
        "Saliency, and what was kept",
        caption + _groups_note(groups, n_groups),
        f"Heat map of scores with a row for each of {layers} layers and a column for each of {n} state channels. Kept "
        f"of all channels: {kept}.",
        alt.LayerChart(layer=parts, height=max(160, min(900, 15 * layers))).add_params(*selectors),
        {"channels": rows},
    )


def quadrants(norm: Tensor, energy: Tensor) -> Tensor:
    """For each channel 0 phantom, 1 corporeal, 2 both small or 3 both large, by the layer's medians; (g, n), int64."""
    heavy, loud = norm > norm.median(), energy > energy.median()
    return torch.where(heavy, torch.where(loud, 3, 1), torch.where(loud, 0, 2))


def correlation(norm: Tensor, energy: Tensor) -> float:
    """Pearson's correlation of the logarithms, over channels where both are above 0; NaN where one is constant."""
    both = (norm > 0) & (energy > 0)
    if both.sum() < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([norm[both].log(), energy[both].log()]))[0, 1].item()


def _rows(
    layer: int, groups: int, values: Mapping[str, Any], place: str = "channel", first: int = 0
) -> list[dict[str, Any]]:
    """A row for each channel of a layer's first groups, counted from ``first``; the values are arrays (g, n)."""
    n = next(iter(values.values())).shape[1]
    entries = zip(*(value[:groups].flatten().tolist() for value in values.values()), strict=True)
    return [
        {"layer": layer, "group": index // n, place: first + index % n, **dict(zip(values, entry, strict=True))}
        for index, entry in enumerate(entries)
    ]


def _above_zero(value: Tensor) -> Tensor:
    """NaN in place of numbers that have no place on a logarithmic axis; a page leaves these out."""
    return value.masked_fill(value <= 0, math.nan)


def _kept_words(plan: Plan, name: str) -> Any:
    return np.where(plan.kept(name), "kept", "removed")


def _share(kind: Tensor, which: int) -> str:
    return f"{(kind == which).double().mean().item():.1%}"


def _groups_note(shown: int, n_groups: int) -> str:
    return "" if shown == n_groups else f" Drawn: the first {shown} of {n_groups} groups."

"""The figure of a distillation: held-out loss against tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import altair as alt

from ghostssm.plan.distillation import MOVED, Distillation
from ghostssm.report.figures import COLOURS, INK, Figure, chosen, rule, selector, table, tooltip
from ghostssm.units import text_name


def distillation_figure(trainings: Mapping[str, Distillation]) -> Figure:
    """Held-out excess loss against the tokens spent, of one training or of several to choose from."""
    rows: list[dict[str, Any]] = []
    told = []
    for label, training in trainings.items():
        for point in training.curve:
            mean, error = point.excess.mean, point.excess.standard_error
            half = 0.0 if math.isnan(error) else error
            seen = {"training": label, "step": point.step, "tokens": point.tokens, "excess": mean, "error": error}
            kept = "kept" if point.step == training.kept_step else ""
            rows.append({**seen, "low": mean - half, "high": mean + half, "divergence": point.divergence, "kept": kept})
        told.append(
            f"{label}: {training.tokens:,} tokens of {text_name(training.text)} in {training.steps} steps moved "
            f"{MOVED[training.trained]}; excess loss on {training.held_out_windows} held-out windows of that text "
            f"{training.curve[0].excess_text} before, {training.best.excess_text} after step {training.kept_step}, "
            f"which was kept{training.rounded_text}"
        )
    return Figure(
        "distillation",
        "Loss against tokens of distillation",
        "The excess loss over the teacher's on held-out windows of the text that was trained on; the band is one "
        "standard error of the paired difference. Dashed: the teacher's own loss. The parameters of the marked step "
        f"were kept. {'. '.join(told)}.",
        f"Line chart of excess loss against tokens that a training spent. {'. '.join(told)}.",
        _chart([selector("training", list(trainings))] if len(trainings) > 1 else []),
        {"points": rows},
    )


def _chart(selectors: list[alt.Parameter]) -> alt.LayerChart:
    losses = "excess loss, nats per token"
    looks = (
        table("points")
        .transform_filter("isValid(datum.excess)")
        .encode(
            alt.X("tokens:Q", title="tokens trained on", scale=alt.Scale(nice=False, padding=16)).axis(
                format="~s", tickCount=6, grid=False
            ),
            alt.Y("excess:Q", title=losses, scale=alt.Scale(zero=True, padding=16)).axis(format="~g", tickCount=6),
        )
    )
    band = looks.mark_area(opacity=0.2, color=COLOURS[0]).encode(alt.Y("low:Q", title=losses), alt.Y2("high"))
    titles = {"step": "step", "tokens": "tokens", "excess": "excess loss", "error": "standard error"}
    points = looks.mark_circle(size=45, opacity=1, color=COLOURS[0]).encode(
        tooltip=tooltip(**titles, divergence="divergence", kept="parameters")
    )
    kept = looks.transform_filter(alt.datum.kept == "kept")
    parts = [
        band,
        looks.mark_line(strokeWidth=1.8, color=COLOURS[0]),
        points,
        kept.mark_point(size=170, strokeWidth=2, opacity=1, color=COLOURS[1]),
        kept.mark_text(dy=-18, fontWeight="bold", color=INK).encode(alt.Text("kept:N")),
        rule("points").encode(alt.YDatum(0)),
    ]
    return alt.LayerChart(layer=[chosen(part, *selectors) for part in parts], height=300).add_params(*selectors)

"""The frontier of loss against bytes of state per sequence, over size and dtype together: a table and its picture.

    python benchmarks/frontier.py
    python benchmarks/frontier.py MODEL --calibration TEXT --text OTHER_TEXT --picture frontier.svg
    python benchmarks/frontier.py --distilled HEALED_60 HEALED_28 HEALED_12
    PYTHONPATH=tools python benchmarks/frontier.py RECALL_MODEL --recall 64 --windows 128 --text-windows 256

Every family of choices is a set of recipes and dtypes. At each share of the dense float32 state a family takes, for
each of its dtypes, the largest N' that fits, scales included, and shows the one that loses least; tiers of bits are
divided over the channels of all heads for each share. States are rounded to nearest after every token. The best is
chosen on the windows that it is shown on, so that it looks a little better than it is where several are alike.
--distilled takes stock checkpoints that ``ghostssm distill`` has written, and adds the best of them at those shares
where they lose less than what was not distilled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import altair as alt
import distillation
import torch
import vl_convert
from interleaved import print_machine
from transformers import PreTrainedModel

import ghostssm
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.ops.state_format import FLOAT32, FORMATS, TIERS, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import widest_fit
from ghostssm.pruning.tiers import in_tiers, widest_tiered
from ghostssm.report.figures import COLOURS
from ghostssm.units import bytes_text, plus_minus

SHARES = tuple(Fraction(1, 2**power) for power in range(1, 6))
DISTILLED = "distilled"
FLOOR = 1e-4
"""Nats per token; what loses less, or gains, is drawn there."""


@dataclass(frozen=True)
class Family:
    """Choices that are drawn as one line: the best recipe and dtype count."""

    name: str
    recipes: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """What one choice costs.

    Attributes:
        state_size: asked for. share: of the dense float32 state's bytes. excess, error: nats per token.
    """

    recipe: str
    state_size: int
    dtype: str
    share: float
    excess: float
    error: float

    @property
    def text(self) -> str:
        return f"{plus_minus(self.excess, self.error)}<br>{self.recipe} {self.state_size}, {self.dtype}"


def families(refit: int | None, dtypes: Sequence[str], distilled: bool) -> tuple[Family, ...]:
    stock = ("output+repair", *([f"output+refit{refit}+repair"] if refit else []))
    own, pure = ("balanced+per-layer",), ("float32",)
    return (
        Family("GHOST, size only", ("ghost",), pure),
        Family("stock class, size only", stock, pure),
        Family("our class, size only", own, pure),
        Family("stock class, size and dtype", stock, tuple(dtypes)),
        *([Family("stock class, distilled", (DISTILLED,), tuple(dtypes))] if distilled else []),
        Family("our class, size and dtype", own, tuple(dtypes)),
        Family("our class, tiers of bits", own, (TIERS.name,)),
    )


class OnText:
    """A model, and the text that it is calibrated and measured on."""

    unit = "nats per token"

    def __init__(self, args: argparse.Namespace):
        checkpoint = ghostssm.load(args.model, dtype=torch.float32)
        vocabulary, length = checkpoint.require_tokenizer(), args.window_length
        calibration = ghostssm.read_text(args.calibration, "calibration")
        self.windows = ghostssm.cut_windows(calibration, vocabulary, length, args.windows, seed=42)
        text = ghostssm.read_text(args.text, "evaluation")
        self.model, self.measured_on = checkpoint.model, Path(args.text).name
        self._held_out = ghostssm.cut_windows(text, vocabulary, length, args.text_windows, seed=1)

    def losses(self, model: PreTrainedModel, dtype: str) -> Evaluation:
        return evaluate(model, self._held_out, storage=StateStorage.of(dtype))


class OnRecall(distillation.OnRecall):
    """A model of associative recall: wrong answers take the place of losses."""

    unit, measured_on = "share of answers", "associative recall"

    def losses(self, model: PreTrainedModel, dtype: str) -> Evaluation:
        return self.wrong_answers(model, StateStorage.of(dtype))


class Frontier:
    """Points of one model; every plan is made once, and every dtype of its state measured once."""

    def __init__(self, args: argparse.Namespace):
        task = OnRecall(args) if args.recall else OnText(args)
        self.model, self.losses, windows, self.unit = task.model, task.losses, task.windows, task.unit
        self.calibration = Calibration(self.model, windows)
        layout = layout_of(self.model.config)
        self.limit, self.row_bytes = layout.state_size, FLOAT32.row_bytes(layout.state_size)
        self.bytes = len(mixers_of(self.model)) * layout.intermediate_size * self.row_bytes
        self.whole = self.losses(self.model, "float32")
        healed = [ghostssm.load(folder, dtype=torch.float32).model for folder in args.distilled]
        self.healed = {layout_of(model.config).state_size: model for model in healed}
        self.points: dict[tuple[str, int, str], Point] = {}
        self.plans: dict[tuple[str, int], Plan] = {}
        print(
            f"calibrated on {len(windows)} x {windows.length} tokens of {Path(windows.text_name).name}, measured on "
            f"{len(self.whole.losses)} x {windows.length} of {task.measured_on}; dense: {self.whole.loss:.5f} "
            f"{task.unit}, {self.bytes:,} bytes of state per sequence\n",
            flush=True,
        )

    def best(self, family: Family, share: Fraction) -> Point | None:
        """Of a family at a share of the dense state; None where nothing of it fits.

        A choice is not measured where its recipe, at the same or a larger size in float32, lost more than the best.
        """
        distilled = family.recipes == (DISTILLED,)
        sizes = sorted(self.healed) if distilled else range(1, self.limit + 1)
        fitting = widest_fit(self.row_bytes * float(share), sizes, family.dtypes)
        best = None
        if TIERS.name in family.dtypes:
            size = widest_tiered(self.row_bytes * float(share), range(1, self.limit + 1))
            return None if size is None else self.tiered(family.recipes[0], size, share)
        for dtype, size in sorted(fitting.items(), key=lambda item: -item[1]):
            for recipe in family.recipes:
                if best is None or (recipe, size, dtype) in self.points or self.least(recipe, size) < best.excess:
                    best = min(filter(None, (best, self.point(recipe, size, dtype))), key=lambda point: point.excess)
        return best

    def least(self, recipe: str, size: int) -> float:
        """That a recipe loses at a size, as far as is known."""
        known = [
            p.excess
            for p in self.points.values()
            if (p.recipe, p.dtype) == (recipe, "float32") and p.state_size >= size
        ]
        return max(known, default=0.0)

    def point(self, recipe: str, size: int, dtype: str) -> Point:
        """Of one choice; the recipes ``dense`` and ``distilled`` leave their models as they are."""
        key = recipe, size, dtype
        if key not in self.points:
            if recipe in ("dense", DISTILLED):
                whole = self.model if recipe == "dense" else self.healed[size]
                losses, kept = self.losses(whole, dtype), float(size)
            else:
                plan = self.plan(recipe, size)
                with pruned(self.model, plan) as smaller:
                    losses, kept = self.losses(smaller, dtype), plan.mean_state_size
            form = FORMATS[dtype]
            share = (kept * form.bits / 8 + form.scale_bytes) / self.row_bytes
            self.points[key] = self.told(*key, share, losses)
        return self.points[key]

    def tiered(self, recipe: str, size: int, share: Fraction) -> Point:
        """Of a state whose bits are divided over its channels."""
        plan = self.plan(recipe, size)
        plan = in_tiers(self.model, plan, self.calibration.windows, int(self.bytes * share))
        with pruned(self.model, plan) as smaller:
            losses = self.losses(smaller, TIERS.name)
        taken = plan.state_bytes(layout_of(self.model.config), TIERS.name)
        return self.told(recipe, size, TIERS.name, taken / self.bytes, losses)

    def plan(self, recipe: str, size: int) -> Plan:
        if (recipe, size) not in self.plans:
            self.plans[recipe, size] = self.calibration.plan(recipe, size, progress=None)
        return self.plans[recipe, size]

    def told(self, recipe: str, size: int, dtype: str, share: float, losses: Evaluation) -> Point:
        excess = losses.excess_over(self.whole)
        point = Point(recipe, size, dtype, share, excess.mean, excess.standard_error)
        print(f"{point}", file=sys.stderr, flush=True)
        return point


def table(lines: Mapping[str, Mapping[Fraction, Point]], dense_bytes: int) -> str:
    """Markdown: a row for every share."""
    rows = [["bytes per sequence", *lines], ["---", *["---:"] * len(lines)]]
    for share in SHARES:
        cells = [points[share].text if share in points else "" for points in lines.values()]
        rows.append([f"{share}: {bytes_text(int(dense_bytes * share))}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def picture(lines: Mapping[str, Sequence[Point]], title: str, unit: str) -> str:
    """SVG: loss by share of bytes, a line for every family, in colours that suit light and dark pages."""
    rows = [
        {
            "family": name,
            "share": point.share,
            "excess": max(point.excess, FLOOR),
            "low": max(point.excess - point.error, FLOOR),
            "high": max(point.excess + point.error, FLOOR),
        }
        for name, points in lines.items()
        for point in points
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("share:Q", title="bytes of state per sequence, as a share of dense float32")
        .scale(type="log", base=2, domain=[1 / 36, 0.58], reverse=True)
        .axis(values=[float(share) for share in SHARES], labelExpr="'1/' + round(1 / datum.value)", grid=False),
        color=alt.Color("family:N", title=None).scale(domain=list(lines), range=[*COLOURS, "#7F7F7F"][: len(lines)]),
    )
    label = f"excess loss, {unit}"
    losses = (
        alt.Y("excess:Q", title=label)
        .scale(type="log", domainMin=FLOOR)
        .axis(format=".1~g", values=[10.0**power for power in range(-4, 1)])
    )
    marks = base.encode(y=losses)
    bars = base.mark_rule(strokeWidth=2, opacity=0.6).encode(y=alt.Y("low:Q", title=label), y2="high:Q")
    chart = (marks.mark_line(strokeWidth=3) + marks.mark_point(size=70, filled=True, opacity=1) + bars).properties(
        width=620, height=380, title=title
    )
    return vl_convert.vegalite_to_svg(configured(chart).to_dict())


def configured(chart: alt.LayerChart) -> alt.LayerChart:
    """Large letters, and a grey that is seen on white and on black."""
    grey = "#768390"
    chart = chart.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(
        labelFontSize=15,
        titleFontSize=16,
        labelColor=grey,
        titleColor=grey,
        gridColor=grey,
        gridOpacity=0.25,
        domain=False,
        tickColor=grey,
        titleFontWeight="normal",
    )
    chart = chart.configure_legend(
        orient="bottom",
        columns=2,
        labelFontSize=15,
        labelColor=grey,
        labelLimit=320,
        symbolSize=120,
        symbolStrokeWidth=3,
    )
    return chart.configure_title(color=grey, fontSize=17, fontWeight="normal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--text-windows", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "int8", "int4"])
    parser.add_argument("--refit", type=int, metavar="STEPS", help="also with so many steps of refit, in stock classes")
    parser.add_argument("--recall", type=int, metavar="PAIRS", help="associative recall instead of text")
    parser.add_argument("--distilled", nargs="+", default=[], metavar="FOLDER", help="stock checkpoints, healed")
    parser.add_argument("--picture", type=Path, help="SVG to write")
    args = parser.parse_args()

    print_machine()
    frontier = Frontier(args)
    lines: dict[str, dict[Fraction, Point]] = {}
    for family in families(args.refit, args.dtypes, bool(args.distilled)):
        found = {share: point for share in SHARES if (point := frontier.best(family, share)) is not None}
        if family.recipes == (DISTILLED,):
            plain = lines["stock class, size and dtype"]
            found = {share: point for share, point in found.items() if point.excess < plain[share].excess}
        lines[family.name] = found
    whole = [frontier.point("dense", frontier.limit, dtype) for dtype in ("bfloat16", "int8", "fp8", "int4")]
    print(table(lines, frontier.bytes))
    print(f"\nThe whole state (N = {frontier.limit}) in a narrower dtype:\n\n| dtype | share of bytes | excess loss |")
    print("|---|---:|---:|")
    for point in whole:
        print(f"| {point.dtype} | {point.share:.3f} | {plus_minus(point.excess, point.error)} |")
    if args.picture:
        drawn = {name: list(points.values()) for name, points in lines.items()}
        drawn["dtype only"] = [point for point in whole if point.dtype != "fp8"]
        args.picture.write_text(
            picture(drawn, f"{Path(args.model).name}: loss against bytes", frontier.unit), encoding="utf-8"
        )


if __name__ == "__main__":
    main()

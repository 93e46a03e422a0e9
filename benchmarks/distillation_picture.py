"""Draw what ``benchmarks/distillation.py`` printed: excess loss against the tokens of a training, for each start.

python benchmarks/distillation.py --steps 75 300 1200 --batch 2 > lines.txt
python benchmarks/distillation_picture.py lines.txt distillation.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import altair as alt
import vl_convert
from frontier import configured

from ghostssm.report.figures import COLOURS

LINE = re.compile(r"(?P<start>\S+) .* (?P<tokens>[\d,]+) tokens +(?P<excess>[\d.]+) ± (?P<error>[\d.]+) ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, help="what the benchmark printed")
    parser.add_argument("picture", type=Path, help="SVG to write")
    args = parser.parse_args()
    found = [match.groupdict() for line in args.lines.read_text().splitlines() if (match := LINE.match(line))]
    rows = [
        {
            "start": row["start"],
            "tokens": int(row["tokens"].replace(",", "")),
            "excess": float(row["excess"]),
            "low": float(row["excess"]) - float(row["error"]),
            "high": float(row["excess"]) + float(row["error"]),
        }
        for row in found
    ]
    args.picture.write_text(picture(rows), encoding="utf-8")


def picture(rows: list[dict[str, object]]) -> str:
    """SVG: a line for every start; what it loses without a training is at the left edge."""
    trained = sorted({row["tokens"] for row in rows if row["tokens"]})
    left = trained[0] / 2
    rows = [row | {"tokens": row["tokens"] or left} for row in rows]
    starts = list(dict.fromkeys(row["start"] for row in rows))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("tokens:Q", title="tokens of the distillation")
        .scale(type="log", domain=[left, trained[-1]])
        .axis(values=[left, *trained], labelExpr=f"datum.value == {left} ? '0' : format(datum.value, ',')", grid=False),
        color=alt.Color("start:N", title=None).scale(domain=starts, range=COLOURS[: len(starts)]),
    )
    label = "excess loss, nats per token"
    marks = base.encode(y=alt.Y("excess:Q", title=label).scale(type="log"))
    bars = base.mark_rule(strokeWidth=2, opacity=0.6).encode(y=alt.Y("low:Q", title=label), y2="high:Q")
    chart = marks.mark_line(strokeWidth=3) + marks.mark_point(size=70, filled=True, opacity=1) + bars
    return vl_convert.vegalite_to_svg(configured(chart.properties(width=620, height=320)).to_dict())


if __name__ == "__main__":
    main()

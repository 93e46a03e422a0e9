"""The result of a comparison: one row per method and state size, and the table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ghostssm.checkpoint.description import Description
from ghostssm.evaluation.perplexity import Evaluation
from ghostssm.evaluation.roofline import Machine
from ghostssm.evaluation.speed import Rate
from ghostssm.extras import check_installed
from ghostssm.plan.plan import Plan
from ghostssm.text.windows import Windows
from ghostssm.units import bytes_text, plus_minus
from ghostssm.values import Value
from ghostssm.workflows.report_record import Observations, Samples
from ghostssm.workflows.requests import CompareRequest

Cell = tuple[str, int]
"""A method's name and a state size."""
DENSE = "dense"


def labelled(method: str, state_dtype: str) -> str:
    return method if state_dtype == "float32" else f"{method}, {state_dtype}"


@dataclass(frozen=True, repr=False)
class Row(Value):
    """One line of the table.

    Attributes:
        method: `DENSE` for the unpruned model.
        state_size: N' as asked for, or as chosen within bounds on the bytes.
        stored_state_size: what the checkpoint has, on average over the layers: larger where uneven groups or layers are
            padded.
        perplexity: exp of the loss.
        bits_per_byte: the loss in bits per byte of the text; NaN of token ids.
        excess: loss minus the dense model's on the same windows, nats per token.
        standard_error: of the excess, over paired windows.
        state_bytes: recurrent state of one sequence over all layers, with its scales.
        tokens_per_second: batch size to decode speed, all sequences together.
        seconds: to calibrate and decide.
        speed_range: batch size to the speeds of the slowest and the fastest round.
        state_dtype: in which the state was kept, rounded after every token.
        distilled_tokens: on which gradients went through the whole model; 0 where all was local.
        within: the bounds on the bytes for which size and dtype were chosen together, as they were given.
    """

    method: str
    state_size: int
    stored_state_size: float
    perplexity: float
    bits_per_byte: float
    excess: float
    standard_error: float
    state_bytes: int
    tokens_per_second: dict[int, float]
    seconds: float
    speed_range: dict[int, tuple[float, float]] = field(default_factory=dict)
    state_dtype: str = "float32"
    distilled_tokens: int = 0
    within: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        return self.label == DENSE

    @property
    def label(self) -> str:
        """The method, and the state's dtype where it is not float32."""
        return labelled(self.method, self.state_dtype)

    @property
    def series(self) -> str:
        """What rows are drawn under: the label; where bounds on the bytes chose the dtypes, the method."""
        return self.method if self.within else self.label

    def rate(self, batch: int) -> Rate:
        """The decode speed at a batch size; without a range where there is none."""
        speed = self.tokens_per_second[batch]
        return Rate(speed, *self.speed_range.get(batch, (speed, speed)))


@dataclass(frozen=True, repr=False, eq=False)
class Basis(Value):
    """What a comparison was made from.

    Attributes:
        request: with its methods named. description: of the dense model.
        calibration: what the methods saw. evaluation: what the losses were measured on.
        observations, machine, samples: what the dense model does with its state, what the machine does at the batch
            sizes of the comparison, and how the best models go on; where a report was asked for.
    """

    request: CompareRequest
    description: Description
    calibration: Windows
    evaluation: Windows
    observations: Observations | None = None
    machine: Machine | None = None
    samples: Samples | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Value):
    """What every method loses at every size.

    A notebook shows it as a table with a figure; `ghostssm.plot` draws it, `ghostssm.write_report` makes a page of it.

    Attributes:
        rows: the dense model first.
        plans: method and state size to the plan behind the row.
        evaluations: a row's label and state size to the losses per window.
        basis: what the comparison was made from; None where it was put together by hand.
    """

    rows: tuple[Row, ...]
    plans: dict[Cell, Plan]
    evaluations: dict[Cell, Evaluation] = field(default_factory=dict, repr=False)
    basis: Basis | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        methods = ", ".join(dict.fromkeys(row.method for row in self.rows))
        sizes = ", ".join(map(str, dict.fromkeys(row.state_size for row in self.rows)))
        return f"<Comparison: {methods[:120]} at state sizes {sizes[:80]}>"

    @property
    def contests(self) -> list[int | str]:
        """What methods compete for: bounds on the bytes as they were given, or state sizes, the largest first."""
        rows = [row for row in self.rows if row.method != DENSE]
        bounds = dict.fromkeys(bound for row in rows for bound in row.within)
        return [*bounds] or sorted({row.state_size for row in rows}, reverse=True)

    def best(self, contest: int | str) -> list[Row]:
        """The row of a size or bound that loses least in a stock checkpoint; then that of any, if it loses less."""
        rows = [row for row in self.rows if contest in (row.state_size, *row.within) and row.method != DENSE]
        ranked = sorted(rows, key=lambda row: row.excess)
        stock = [row for row in ranked if not self.plans[row.method, row.state_size].needs_own_class]
        return [*stock[:1], *(row for row in ranked[:1] if row not in stock[:1])]

    def to_dict(self) -> dict[str, Any]:
        """What was asked for, as ``request``, and the table, as ``rows``; JSON values, but for numbers that are NaN."""
        return {
            "request": None if self.basis is None else self.basis.request.as_json(),
            "rows": [asdict(row) for row in self.rows],
        }

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame; decode speeds in a column per batch size, ``tokens_per_second_32``.

        Raises:
            InputError: pandas is not installed.
        """
        check_installed("A DataFrame", "pandas")
        import pandas

        speeds = [
            {f"tokens_per_second_{batch}": speed for batch, speed in row.tokens_per_second.items()} for row in self.rows
        ]
        rows = [asdict(row) | speed for row, speed in zip(self.rows, speeds, strict=True)]
        return pandas.DataFrame(rows).drop(columns=["tokens_per_second", "speed_range"])


def comparison_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines, the most bytes per sequence and the smallest loss first.

    A stored state that is larger than the one asked for stands in brackets behind it.
    """
    batches = list(rows[0].tokens_per_second)
    one_dtype = len({row.state_dtype for row in rows}) == 1
    bounded = any(row.within for row in rows)
    headers = ["method", *["within"] * bounded, "N'", *["dtype"] * (not one_dtype)]
    headers += ["perplexity", "bits per byte", "excess loss", "state per sequence"]
    headers += [f"tok/s, batch {batch}" for batch in batches]
    ranked = sorted(rows, key=lambda row: (-row.state_bytes, row.excess))
    return headers, [[*_cells(row, one_dtype, bounded), *(row.rate(batch).text for batch in batches)] for row in ranked]


def _cells(row: Row, one_dtype: bool, bounded: bool) -> list[str]:
    padded = "" if row.stored_state_size == row.state_size else f" ({row.stored_state_size:g})"
    return [
        row.method,
        *[" ".join(row.within)] * bounded,
        f"{row.state_size}{padded}",
        *[row.state_dtype] * (not one_dtype),
        f"{row.perplexity:.3f}",
        f"{row.bits_per_byte:.4f}",
        "" if row.is_dense else plus_minus(row.excess, row.standard_error),
        bytes_text(row.state_bytes),
    ]

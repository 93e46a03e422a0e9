"""Methods side by side: one row per method and state size, on one model and one text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from transformers import PreTrainedModel

from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.evaluation.speed import decode_speeds, first_channels
from ghostssm.methods.selection import Groups
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, silent
from ghostssm.pruning.feasibility import check_recipe, check_state_size
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_SEED, Calibration
from ghostssm.text.windows import Windows
from ghostssm.units import bytes_text, plus_minus

Cell = tuple[str, int]
"""A method's name and a state size."""
DENSE = "dense"
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Outcome(Generic[Measured]):
    """A cell's plan, what was measured of the model that it prunes, and the seconds to calibrate and decide."""

    plan: Plan
    measured: Measured
    seconds: float


def measure_cell(
    calibration: Calibration,
    cell: Cell,
    measure: Callable[[PreTrainedModel], Measured],
    *,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    progress: Progress = silent,
) -> Outcome[Measured]:
    """Prune by a method to a state size, and measure. The model is left as it was.

    Args:
        calibration: the same for all cells of a model, so that they share evidence.
        measure: gets the pruned model.
    """
    begun = time.perf_counter()
    plan = calibration.plan(*cell, groups=groups, seed=seed, progress=progress)
    seconds = time.perf_counter() - begun
    with pruned(calibration.model, plan) as smaller:
        return Outcome(plan, measure(smaller), seconds)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: `DENSE` for the unpruned model.
        state_size: N' as asked for; ``stored_state_size`` is what the checkpoint has, on average over the layers:
            larger where uneven groups or layers are padded.
        excess, standard_error: loss minus the dense model's on the same windows, nats per token.
        state_bytes: recurrent state of one sequence over all layers, float32.
        tokens_per_second: batch size to decode speed, all sequences together.
        seconds: to calibrate and decide.
        distilled_tokens: on which gradients went through the whole model; 0 where all was local.
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
    distilled_tokens: int = 0

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE


@dataclass(frozen=True)
class Comparison:
    """Rows, the dense one first; the plans behind them and what was measured, by method and state size."""

    rows: tuple[Row, ...]
    plans: dict[Cell, Plan]
    evaluations: dict[Cell, Evaluation] = field(default_factory=dict, repr=False)


def compare(
    checkpoint: Checkpoint,
    calibration_windows: Windows,
    windows: Windows,
    methods: Sequence[str],
    state_sizes: Sequence[int],
    *,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    batches: Iterable[int] = (1, 32),
    progress: Progress = silent,
) -> Comparison:
    """Prune by every method to every size, and measure loss, state and decode speed. The model is left as it was.

    Args:
        methods: recipes (`ghostssm.pruning.recipe.Recipe`), such as ``ghost`` or ``output+repair``.
        calibration_windows: what the methods see. windows: what the losses are measured on.
        batches: batch sizes at which to measure decoding; empty for none.
    """
    model = checkpoint.model
    layout = layout_of(model.config)
    for state_size in state_sizes:
        check_state_size(state_size, layout.state_size)
    recipes = [Recipe.parse(method) for method in methods]
    for recipe in recipes:
        check_recipe(recipe, model.config.model_type)
    cells = [(str(recipe), state_size) for recipe in recipes for state_size in state_sizes]
    calibration = Calibration(model, calibration_windows)
    progress("models", 0, len(cells) + 1)
    dense = evaluate(model, windows)
    outcomes: dict[Cell, Outcome[Evaluation]] = {}
    for done, cell in enumerate(cells, 1):
        progress("models", done, len(cells) + 1)
        outcomes[cell] = measure_cell(calibration, cell, partial(evaluate, windows=windows), groups=groups, seed=seed)
    progress("models", len(cells) + 1, len(cells) + 1)

    plans = {cell: outcome.plan for cell, outcome in outcomes.items()}
    whole = first_channels(model, layout.state_size)
    # Which channels a stock model keeps has no influence on its speed: each size is timed once.
    shape: dict[Cell, Cell | int] = {
        cell: cell if plan.needs_own_class else plan.kept_state_size for cell, plan in plans.items()
    }
    timed = {layout.state_size: whole} | {
        key: plans[key] if isinstance(key, tuple) else first_channels(model, key) for key in shape.values()
    }
    speeds = decode_speeds(model, timed, tuple(batches), progress)
    numbers_per_channel = len(mixers_of(model)) * layout.intermediate_size

    def row(cell: Cell, plan: Plan, evaluation: Evaluation, seconds: float) -> Row:
        excess = evaluation.excess_over(dense)
        return Row(
            method=cell[0],
            state_size=cell[1],
            stored_state_size=plan.mean_state_size,
            perplexity=evaluation.perplexity,
            bits_per_byte=evaluation.bits_per_byte,
            excess=excess.mean,
            standard_error=excess.standard_error,
            state_bytes=round(4 * numbers_per_channel * plan.mean_state_size),
            tokens_per_second=speeds[shape.get(cell, layout.state_size)],
            seconds=seconds,
            distilled_tokens=sum(each.tokens for each in plan.distillations),
        )

    rows = [row((DENSE, layout.state_size), whole, dense, 0.0)]
    rows += [row(cell, outcome.plan, outcome.measured, outcome.seconds) for cell, outcome in outcomes.items()]
    evaluations = {(DENSE, layout.state_size): dense} | {cell: outcome.measured for cell, outcome in outcomes.items()}
    return Comparison(tuple(rows), plans, evaluations)


def comparison_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines, the largest state and the smallest loss first.

    A stored state that is larger than the one asked for stands in brackets behind it.
    """
    batches = list(rows[0].tokens_per_second)
    headers = ["method", "N'", "perplexity", "bits/byte", "excess loss", "state/seq"]
    headers += [f"tok/s, batch {batch}" for batch in batches]
    ranked = sorted(rows, key=lambda row: (-row.state_size, row.excess))
    return headers, [[*_cells(row), *(f"{row.tokens_per_second[batch]:,.0f}" for batch in batches)] for row in ranked]


def _cells(row: Row) -> list[str]:
    padded = "" if row.stored_state_size == row.state_size else f" ({row.stored_state_size:g})"
    return [
        row.method,
        f"{row.state_size}{padded}",
        f"{row.perplexity:.3f}",
        f"{row.bits_per_byte:.4f}",
        "" if row.is_dense else plus_minus(row.excess, row.standard_error),
        bytes_text(row.state_bytes),
    ]

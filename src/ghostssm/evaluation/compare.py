"""Methods side by side: one row per method and state size, on one model and one text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghostssm.bench.decode import decode_speeds
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.data.windows import Windows
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.families import family_of, mixers_of
from ghostssm.methods.selection import Groups
from ghostssm.plan import Plan
from ghostssm.progress import Progress, silent
from ghostssm.pruning import DEFAULT_SEED, Calibration, check_state_size
from ghostssm.surgery import pruned


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: ``dense`` for the unpruned model.
        state_size: N' as asked for; ``stored_state_size`` is what the checkpoint has, larger where uneven groups or
            layers are padded.
        excess, standard_error: loss minus the dense model's on the same windows, nats per token.
        state_bytes: recurrent state of one sequence over all layers, float32.
        tokens_per_second: batch size to decode speed, all sequences together.
        seconds: to calibrate and decide.
    """

    method: str
    state_size: int
    stored_state_size: int
    perplexity: float
    bits_per_byte: float
    excess: float
    standard_error: float
    state_bytes: int
    tokens_per_second: dict[int, float]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Rows, the dense one first, and what lies behind them, keyed by (method, state size)."""

    rows: tuple[Row, ...]
    plans: dict[tuple[str, int], Plan]
    evaluations: dict[tuple[str, int], Evaluation]


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
        calibration_windows: what the methods see. windows: what the losses are measured on.
        batches: batch sizes at which to measure decoding; empty for none.
    """
    model = checkpoint.model
    layout = family_of(model.config).layout(model.config)
    for state_size in state_sizes:
        check_state_size(state_size, layout.state_size)
    cells = [(method, size) for method in methods for size in state_sizes]
    calibration = Calibration(model, calibration_windows)
    progress("models", 0, len(cells) + 1)
    dense = evaluate(model, windows)
    plans: dict[tuple[str, int], Plan] = {}
    evaluations: dict[tuple[str, int], Evaluation] = {}
    seconds: dict[tuple[str, int], float] = {}
    for done, cell in enumerate(cells, 1):
        progress("models", done, len(cells) + 1)
        begun = time.perf_counter()
        plans[cell] = calibration.plan(*cell, groups=groups, seed=seed)
        seconds[cell] = time.perf_counter() - begun
        with pruned(model, plans[cell]):
            evaluations[cell] = evaluate(model, windows)
    progress("models", len(cells) + 1, len(cells) + 1)

    stored = sorted({plan.kept_state_size for plan in plans.values()} | {layout.state_size}, reverse=True)
    speeds = decode_speeds(model, stored, tuple(batches), progress)
    layers = len(mixers_of(model))

    def row(method: str, asked: int, kept: int, evaluation: Evaluation, spent: float) -> Row:
        excess = evaluation.excess_over(dense)
        return Row(
            method=method,
            state_size=asked,
            stored_state_size=kept,
            perplexity=evaluation.perplexity,
            bits_per_byte=evaluation.bits_per_byte,
            excess=excess.mean,
            standard_error=excess.standard_error,
            state_bytes=4 * layers * layout.with_state_size(kept).state_numbers,
            tokens_per_second=speeds[kept],
            seconds=spent,
        )

    rows = [row("dense", layout.state_size, layout.state_size, dense, 0.0)]
    rows += [row(*cell, plans[cell].kept_state_size, evaluations[cell], seconds[cell]) for cell in cells]
    return Comparison(tuple(rows), plans, evaluations)


def as_json(row: Row) -> dict[str, object]:
    return dataclasses.asdict(row)

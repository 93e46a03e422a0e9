"""Methods side by side: one row per method and state size, on one model and one text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ghostssm.checkpoint.description import Description
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.evaluation.roofline import measure_machine
from ghostssm.evaluation.speed import Rate, first_channels, measure
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Notify, Progress, expect, silent, unheard
from ghostssm.pruning.fitting import Fitting, fits_in
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare_checks import checked, storage_of, storages
from ghostssm.workflows.comparison import DENSE, Basis, Cell, Comparison, Row, labelled
from ghostssm.workflows.inputs import Inputs, calibration_windows, windows_of
from ghostssm.workflows.observing import observe, sample
from ghostssm.workflows.remarks import idle_gpu_remark, same_text_remark, tell
from ghostssm.workflows.requests import CompareRequest
from ghostssm.workflows.state_size import bound_on_bytes

_CALIBRATION_COST = 3.0
"""Of GHOST for a token, beside the cost of measuring the loss on one; for estimates of the time left."""
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


def compare(request: CompareRequest, *, progress: Progress = silent, notify: Notify = unheard) -> Comparison:
    """Prune by every method to every size, and measure loss, state and decode speed: what ``ghostssm compare`` does.

    Args:
        progress: told how far the work is. notify: told what a person should know, in sentences.

    Raises:
        InputError: a fault of the request or of what it names, found before anything is loaded where it can be.
        NumericalError: numbers that are not finite; names the layer.
    """
    request, described = checked(request)
    tell(notify, idle_gpu_remark(request.device))
    checkpoint = load(request.model, dtype=torch.float32, device=request.device, tokenizer=request.tokenizer)
    vocabulary = checkpoint.require_tokenizer()
    windows, held_out = calibration_windows(request, vocabulary), windows_of(request, request.text, vocabulary)
    return compare_at_hand(Inputs(checkpoint, windows, held_out), request, described, progress, notify)


def compare_at_hand(
    inputs: Inputs[Checkpoint], request: CompareRequest, described: Description, progress: Progress, notify: Notify
) -> Comparison:
    """Carry a checked request out, and keep with the comparison what it was made from; otherwise as `compare_on`."""
    checkpoint, windows, held_out = inputs.checkpoint, inputs.calibration, inputs.held_out
    assert held_out is not None
    tell(notify, same_text_remark(windows, held_out))
    notify(
        f"windows of {windows.length} tokens: calibrating on {len(windows)} of {windows.text_name}, measuring "
        f"on {len(held_out)} of {held_out.text_name}"
    )
    comparison = compare_on(inputs, request, progress)
    basis = Basis(request, described, windows, held_out)
    if request.report:
        observations = observe(checkpoint.model, windows, progress)
        smallest = comparison.best(comparison.contests[-1])
        plans = {
            f"{row.method}, N' = {row.state_size}": comparison.plans[row.method, row.state_size] for row in smallest
        }
        basis = replace(
            basis,
            observations=observations,
            machine=measure_machine(request.batches, str(checkpoint.model.device)),
            samples=sample(checkpoint, plans, held_out),
        )
    return replace(comparison, basis=basis)


def compare_on(inputs: Inputs[Checkpoint], request: CompareRequest, progress: Progress = silent) -> Comparison:
    """Carry a checked request out on a loaded model and windows, whatever it says of these; the model stays as it was.

    Args:
        inputs: with windows to measure the losses on.
    """
    model, windows = inputs.checkpoint.model, inputs.held_out
    assert windows is not None
    layout = layout_of(model.config)
    work = _Cells(request, model, inputs.calibration, windows)
    expect("models", [windows.ids.numel(), *work.costs()])
    progress("models", 0, len(work))
    kept = {storage.format.name: storage for storage in (StateStorage(), *storages(request))}
    measured = _losses(model, windows, list(kept.values()))
    dense = measured[FLOAT32.name]
    outcomes = work.outcomes(progress)
    plans = {cell: outcome.plan for cell, outcome in outcomes.items()}
    outcomes = {(DENSE, layout.state_size): Outcome(first_channels(model, layout.state_size), measured, 0.0)} | outcomes
    speeds = _speeds(model, outcomes, request, progress)

    def row(cell: Cell, outcome: Outcome[dict[str, Evaluation]], dtype: str) -> Row:
        evaluation = outcome.measured[dtype]
        excess = evaluation.excess_over(dense)
        by_batch = speeds[cell, dtype]
        return Row(
            method=cell[0],
            state_size=cell[1],
            stored_state_size=outcome.plan.mean_state_size,
            perplexity=evaluation.perplexity,
            bits_per_byte=evaluation.bits_per_byte,
            excess=excess.mean,
            standard_error=excess.standard_error,
            state_bytes=outcome.plan.state_bytes(layout, dtype),
            tokens_per_second={batch: speed.median for batch, speed in by_batch.items()},
            seconds=outcome.seconds,
            speed_range={batch: (speed.low, speed.high) for batch, speed in by_batch.items()},
            state_dtype=dtype,
            distilled_tokens=sum(each.tokens for each in outcome.plan.distillations),
            within=tuple(work.bounds.get((cell, dtype), ())),
        )

    rows = [row(cell, outcome, dtype) for cell, outcome in outcomes.items() for dtype in outcome.measured]
    evaluations = {
        (labelled(cell[0], dtype), cell[1]): evaluation
        for cell, outcome in outcomes.items()
        for dtype, evaluation in outcome.measured.items()
    }
    return Comparison(tuple(rows), plans, evaluations)


class _Cells:
    """The plans of a comparison and what they lose: at every size that was asked for, or within every bound.

    Attributes:
        bounds: cell and dtype to the bounds on the bytes within which they were chosen.
    """

    def __init__(self, request: CompareRequest, model: PreTrainedModel, calibration: Windows, windows: Windows):
        self.request, self.model, self.calibration, self.windows = request, model, calibration, windows
        self.recipes = [Recipe.parse(method) for method in request.methods]
        self.bounds: dict[tuple[Cell, str], list[str]] = {}

    def __len__(self) -> int:
        """The dense model is one as well."""
        return 1 + len(self.recipes) * len(self.request.state_sizes or self.request.state_bytes)

    def costs(self) -> list[float]:
        """About what each takes, beside the loss on one token."""
        tokens, calibrated = self.windows.ids.numel(), _CALIBRATION_COST * self.calibration.ids.numel()
        plans = [len(set(self._fits(bound).values())) for bound in self.request.state_bytes]
        return [
            tokens + number * calibrated * recipe.cost
            for recipe in self.recipes
            for number in plans or [1] * len(self.request.state_sizes)
        ]

    def outcomes(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        """Plans and losses by method and state size; in every dtype that was asked for, or in those chosen."""
        found = self._within_bounds(progress) if self.request.state_bytes else self._at_sizes(progress)
        progress("models", len(self), len(self))
        return found

    def _at_sizes(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        calibration, request = Calibration(self.model, self.calibration), self.request
        losses = partial(_losses, windows=self.windows, storages=storages(request))
        cells = [(str(recipe), size) for recipe in self.recipes for size in request.state_sizes]
        found = {}
        for done, cell in enumerate(cells, 1):
            progress("models", done, len(self))
            found[cell] = measure_cell(calibration, cell, losses, groups=request.groups, seed=request.seed)
        return found

    def _within_bounds(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        """As ``prune --state-bytes`` chooses; bounds within which one method takes one size share its plan.

        But not its tiers, which fill the bytes of one bound: such a plan is named after its bound.
        """
        fitting, request = Fitting.of(self.model, self.calibration), self.request
        found: dict[Cell, Outcome[dict[str, Evaluation]]] = {}
        for done, (recipe, bound) in enumerate(product(self.recipes, request.state_bytes), 1):
            progress("models", done, len(self))
            begun = time.perf_counter()
            plan = fitting.plan(recipe, self._bytes_of(bound), groups=request.groups, seed=request.seed, progress=None)
            seconds = time.perf_counter() - begun
            assert plan.provenance is not None
            name = f"{recipe} in {bound}" if plan.tiers else str(recipe)
            cell, dtype = (name, plan.provenance.requested_state_size), plan.provenance.state_dtype
            assert dtype is not None
            with pruned(self.model, plan) as smaller:
                measured = _losses(smaller, self.windows, [StateStorage.of(dtype)])
            known = found[cell].measured if cell in found else {}
            found[cell] = Outcome(plan, known | measured, seconds)
            self.bounds.setdefault((cell, dtype), []).append(bound)
        return found

    def _fits(self, bound: str) -> dict[str, int]:
        return fits_in(self._bytes_of(bound), layout_of(self.model.config), len(mixers_of(self.model)))

    def _bytes_of(self, bound: str) -> int:
        layout = layout_of(self.model.config)
        rows = len(mixers_of(self.model)) * layout.intermediate_size
        return bound_on_bytes(bound, rows * FLOAT32.state_bytes(1, layout.state_size))


def _losses(model: PreTrainedModel, windows: Windows, storages: Sequence[StateStorage]) -> dict[str, Evaluation]:
    """A model's loss by the dtype in which its state is kept."""
    return {storage.format.name: evaluate(model, windows, storage=storage) for storage in storages}


def _speeds(
    model: PreTrainedModel,
    outcomes: Mapping[Cell, Outcome[dict[str, Evaluation]]],
    request: CompareRequest,
    progress: Progress,
) -> dict[tuple[Cell, str], dict[int, Rate]]:
    """Decode speed by cell, dtype and batch size.

    Which channels a stock model keeps has no influence on its speed: each size is timed once.
    """
    shapes: dict[Cell, Cell | int] = {
        cell: cell if outcome.plan.needs_own_class else outcome.plan.kept_state_size
        for cell, outcome in outcomes.items()
    }
    timed = {
        (shapes[cell], dtype): outcome.plan
        if outcome.plan.needs_own_class
        else first_channels(model, outcome.plan.kept_state_size)
        for cell, outcome in outcomes.items()
        for dtype in outcome.measured
    }
    storages = {(shape, dtype): storage_of(request, dtype) for shape, dtype in timed}
    timings = measure(model, timed, request.batches, prompt=8, progress=progress, storages=storages)
    return {
        (cell, dtype): {batch: timings[(shapes[cell], dtype), batch].decode(batch) for batch in request.batches}
        for cell, outcome in outcomes.items()
        for dtype in outcome.measured
    }

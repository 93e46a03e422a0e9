"""Methods side by side: one row per method and state size, on one model and one text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ghostssm.checkpoint.description import Description
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.evaluation.roofline import measure_machine
from ghostssm.evaluation.speed import first_channels, measure
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Notify, Progress, expect, silent, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare_checks import checked, storages
from ghostssm.workflows.comparison import DENSE, Basis, Cell, Comparison, Row, labelled
from ghostssm.workflows.inputs import Inputs, calibration_windows, windows_of
from ghostssm.workflows.observing import observe, sample
from ghostssm.workflows.remarks import idle_gpu_remark, same_text_remark, tell
from ghostssm.workflows.requests import CompareRequest

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
        smallest = comparison.best(min(request.state_sizes))
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
    recipes = [Recipe.parse(method) for method in request.methods]
    cells = [(str(recipe), state_size) for recipe in recipes for state_size in request.state_sizes]
    calibration = Calibration(model, inputs.calibration)
    tokens, calibrated = windows.ids.numel(), _CALIBRATION_COST * inputs.calibration.ids.numel()
    expect("models", [tokens, *(tokens + calibrated * Recipe.parse(method).cost for method, _ in cells)])
    progress("models", 0, len(cells) + 1)
    kept = {storage.format.name: storage for storage in (StateStorage(), *storages(request))}
    measured = _losses(model, windows, list(kept.values()))
    dense = measured[FLOAT32.name]
    whole = first_channels(model, layout.state_size)
    losses = partial(_losses, windows=windows, storages=storages(request))
    outcomes = {(DENSE, layout.state_size): Outcome(whole, measured, 0.0)}
    for done, cell in enumerate(cells, 1):
        progress("models", done, len(cells) + 1)
        outcomes[cell] = measure_cell(calibration, cell, losses, groups=request.groups, seed=request.seed)
    progress("models", len(cells) + 1, len(cells) + 1)

    plans = {cell: outcome.plan for cell, outcome in outcomes.items() if cell in cells}
    # Which channels a stock model keeps has no influence on its speed: each size is timed once.
    shape: dict[Cell, Cell | int] = {
        cell: cell if plan.needs_own_class else plan.kept_state_size for cell, plan in plans.items()
    }
    timed = {layout.state_size: whole} | {
        key: plans[key] if isinstance(key, tuple) else first_channels(model, key) for key in shape.values()
    }
    timings = measure(
        model,
        {(key, dtype): plan for key, plan in timed.items() for dtype in kept},
        request.batches,
        prompt=8,
        progress=progress,
        storages={(key, dtype): storage for key in timed for dtype, storage in kept.items()},
    )
    rows_per_channel = len(mixers_of(model)) * layout.intermediate_size

    def row(cell: Cell, outcome: Outcome[dict[str, Evaluation]], dtype: str) -> Row:
        evaluation, form, size = outcome.measured[dtype], kept[dtype].format, outcome.plan.mean_state_size
        excess = evaluation.excess_over(dense)
        shaped = shape.get(cell, layout.state_size)
        speeds = {batch: timings[(shaped, dtype), batch].decode(batch) for batch in request.batches}
        return Row(
            method=cell[0],
            state_size=cell[1],
            stored_state_size=size,
            perplexity=evaluation.perplexity,
            bits_per_byte=evaluation.bits_per_byte,
            excess=excess.mean,
            standard_error=excess.standard_error,
            state_bytes=round(rows_per_channel * (size * form.bits / 8 + form.scale_bytes)),
            tokens_per_second={batch: speed.median for batch, speed in speeds.items()},
            seconds=outcome.seconds,
            speed_range={batch: (speed.low, speed.high) for batch, speed in speeds.items()},
            state_dtype=dtype,
            distilled_tokens=sum(each.tokens for each in outcome.plan.distillations),
        )

    rows = [row(cell, outcome, dtype) for cell, outcome in outcomes.items() for dtype in outcome.measured]
    evaluations = {
        (labelled(cell[0], dtype), cell[1]): evaluation
        for cell, outcome in outcomes.items()
        for dtype, evaluation in outcome.measured.items()
    }
    return Comparison(tuple(rows), plans, evaluations)


def _losses(model: PreTrainedModel, windows: Windows, storages: Sequence[StateStorage]) -> dict[str, Evaluation]:
    """A model's loss by the dtype in which its state is kept."""
    return {storage.format.name: evaluate(model, windows, storage=storage) for storage in storages}

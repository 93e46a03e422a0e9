"""Compare methods: one row per method and state size, on one model and one text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.choices import DEFAULT_RECIPE, DEFAULT_SEED, Groups
from ghostssm.errors import InputError
from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.evaluation.roofline import measure_machine
from ghostssm.evaluation.speed import Rate, first_channels, measure
from ghostssm.methods import method_names
from ghostssm.models.families import layout_of
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Notify, Progress, expect, silent, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration, check_original
from ghostssm.pruning.search import Fitting, fits_in, formats_to_try
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare_result import DENSE, Basis, Cell, Comparison, Row, labelled
from ghostssm.workflows.inputs import Inputs, calibration_windows, tell_idle_gpu, tell_same_text, windows_of
from ghostssm.workflows.report_measuring import observe, sample
from ghostssm.workflows.request_checks import check_places, check_request
from ghostssm.workflows.requests import CompareRequest
from ghostssm.workflows.state_size import Target, check_dtypes, target_within

_CALIBRATION_COST = 3.0
"""What GHOST takes for a token; the loss on one is the unit. For estimates of the time left."""
Measured = TypeVar("Measured")


def checked(request: CompareRequest, described: Description | None = None) -> tuple[CompareRequest, Description]:
    """The request with its methods named, and its model's description; only config and file headers are read.

    Args:
        described: the model, if it is at hand.

    Raises:
        InputError: a fault of the request, or of what it names; says what was found and what was expected.
    """
    check_request(request)
    recipes = [Recipe.parse(method) for method in request.methods]
    described = described or describe(request.model)
    check_original(described.is_stock)
    for size in request.state_sizes:
        check_state_size(size, described.layout.state_size)
    for recipe, bound in product(recipes or [Recipe.parse(DEFAULT_RECIPE)], request.state_bytes):
        _within(request, described, recipe, bound)  # each must leave something to choose from
    every = (Recipe(name) for name in method_names())
    recipes = recipes or [recipe for recipe in every if _is_suited(request, described, recipe)]
    check_dtypes(request.state_dtypes)
    _storages(request)
    return replace(request, methods=tuple(map(str, recipes))), described


def _within(request: CompareRequest, described: Description, recipe: Recipe, bound: str) -> Target:
    """What ``prune --state-bytes`` chooses within; raises InputError as it does."""
    return target_within(bound, described, recipe, request.engines, request.groups)


def _is_suited(request: CompareRequest, described: Description, recipe: Recipe) -> bool:
    """Whether a recipe can be compared within the request's bounds, if there are any."""
    try:
        return all(_within(request, described, recipe, bound) for bound in request.state_bytes)
    except InputError:
        return False


def _storage(request: CompareRequest, state_dtype: str) -> StateStorage:
    """How a state is kept; a float32 one is not rounded."""
    rounding = "nearest" if state_dtype == FLOAT32.name else request.state_rounding
    return StateStorage.of(state_dtype, rounding, request.seed)


def _storages(request: CompareRequest) -> list[StateStorage]:
    """How states are kept, by dtype; raises InputError for an unknown one."""
    return [_storage(request, dtype) for dtype in request.state_dtypes]


@dataclass(frozen=True)
class Outcome(Generic[Measured]):
    """A cell's plan, what was measured of the pruned model, and the seconds to calibrate and decide."""

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
    state_dtype: str | None = None,
) -> Outcome[Measured]:
    """Prune by a method to a state size, and measure. The model is left as it was.

    Args:
        calibration: the same for all cells of a model, so that they share evidence.
        measure: gets the pruned model.
        state_dtype: that the state is to be kept in, for steps that train with its rounding.
    """
    begun = time.perf_counter()
    plan = calibration.plan(*cell, groups=groups, seed=seed, progress=progress, state_dtype=state_dtype)
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
    check_places(request)
    request, described = checked(request)
    tell_idle_gpu(notify, request.device)
    checkpoint = load(request.model, dtype=torch.float32, device=request.device, tokenizer=request.tokenizer)
    vocabulary = checkpoint.require_tokenizer()
    windows, held_out = calibration_windows(request, vocabulary), windows_of(request, request.text, vocabulary)
    return compare_at_hand(Inputs(checkpoint, windows, held_out), request, described, progress, notify)


def compare_at_hand(
    inputs: Inputs[Checkpoint], request: CompareRequest, described: Description, progress: Progress, notify: Notify
) -> Comparison:
    """As `compare_on`; the comparison also keeps what it was made from, and what a report needs."""
    checkpoint, windows, held_out = inputs.checkpoint, inputs.calibration, inputs.held_out
    assert held_out is not None
    tell_same_text(notify, windows, held_out)
    notify(
        f"windows of {windows.length} tokens: calibrating on {len(windows)} of {windows.text_name}, measuring "
        f"on {len(held_out)} of {held_out.text_name}"
    )
    comparison = compare_on(inputs, request, described, progress)
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


def compare_on(
    inputs: Inputs[Checkpoint], request: CompareRequest, described: Description, progress: Progress = silent
) -> Comparison:
    """Carry a checked request out on a loaded model and windows, in place of those that it names.

    The model stays as it was.

    Args:
        inputs: with windows to measure the losses on.
        described: the loaded model.
    """
    model, windows = inputs.checkpoint.model, inputs.held_out
    assert windows is not None
    layout = layout_of(model.config)
    work = _Cells(request, described, model, inputs.calibration, windows)
    expect("models", [windows.ids.numel(), *work.costs()])
    progress("models", 0, len(work))
    kept = {storage.format.name: storage for storage in (StateStorage(), *_storages(request))}
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

    def __init__(
        self,
        request: CompareRequest,
        described: Description,
        model: PreTrainedModel,
        calibration: Windows,
        windows: Windows,
    ):
        self.request, self.described, self.model = request, described, model
        self.calibration, self.windows = calibration, windows
        self.recipes = [Recipe.parse(method) for method in request.methods]
        self.bounds: dict[tuple[Cell, str], list[str]] = {}

    def __len__(self) -> int:
        """How many models are measured, the dense one included."""
        if self.request.state_bytes:
            return 1 + len(self.recipes) * len(self.request.state_bytes)
        return 1 + sum(len(self._by_training(recipe)) for recipe in self.recipes) * len(self.request.state_sizes)

    def costs(self) -> list[float]:
        """About how long each of them takes; the loss on one token is the unit. The dense model is left out."""
        tokens, calibrated = self.windows.ids.numel(), _CALIBRATION_COST * self.calibration.ids.numel()
        return [
            tokens + number * calibrated * recipe.cost for recipe in self.recipes for number in self._planned(recipe)
        ]

    def _planned(self, recipe: Recipe) -> list[int]:
        """How many plans are made for each model that is measured."""
        if not self.request.state_bytes:
            return [1] * len(self.request.state_sizes) * len(self._by_training(recipe))
        layout, layers = self.described.layout, self.described.layers
        numbers = []
        for bound in self.request.state_bytes:
            target = _within(self.request, self.described, recipe, bound)
            assert target.state_bytes is not None
            names = [form.name for form in formats_to_try(recipe, target.dtypes)]
            numbers.append(len(set(fits_in(target.state_bytes, layout, layers, target.sizes, names).values())))
        return numbers

    def outcomes(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        """Plans and losses by method and state size; in every dtype that was asked for, or in those chosen."""
        outcomes = self._within_bounds(progress) if self.request.state_bytes else self._at_sizes(progress)
        progress("models", len(self), len(self))
        return outcomes

    def _at_sizes(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        """A recipe that trains for some of the dtypes makes a plan of its own for these."""
        calibration, request = Calibration(self.model, self.calibration), self.request
        outcomes: dict[Cell, Outcome[dict[str, Evaluation]]] = {}
        for recipe, size in product(self.recipes, request.state_sizes):
            for trained_in, dtypes in self._by_training(recipe).items():
                progress("models", len(outcomes) + 1, len(self))
                losses = partial(_losses, windows=self.windows, storages=[_storage(request, each) for each in dtypes])
                how: dict[str, Any] = {"groups": request.groups, "seed": request.seed, "state_dtype": trained_in}
                outcomes[_trained(recipe, trained_in), size] = measure_cell(
                    calibration, (str(recipe), size), losses, **how
                )
        return outcomes

    def _by_training(self, recipe: Recipe) -> dict[str | None, list[str]]:
        """The dtypes that were asked for, by the one for which the recipe trains."""
        trained = [(recipe.trained_in(dtype), dtype) for dtype in self.request.state_dtypes]
        return {each: [dtype for in_, dtype in trained if in_ == each] for each, _ in trained}

    def _within_bounds(self, progress: Progress) -> dict[Cell, Outcome[dict[str, Evaluation]]]:
        """Sizes and dtypes as ``prune --state-bytes`` chooses them; one plan serves all bounds that choose its size.

        But tiers fill the bytes of one bound: a plan with them is named after it.
        """
        fitting, request = Fitting.of(self.model, self.calibration), self.request
        outcomes: dict[Cell, Outcome[dict[str, Evaluation]]] = {}
        for done, (recipe, bound) in enumerate(product(self.recipes, request.state_bytes), 1):
            progress("models", done, len(self))
            begun = time.perf_counter()
            target = _within(request, self.described, recipe, bound)
            assert target.state_bytes is not None
            how: dict[str, Any] = {"groups": request.groups, "seed": request.seed, "progress": None}
            plan = fitting.plan(recipe, target.state_bytes, state_sizes=target.sizes, dtypes=target.dtypes, **how)
            seconds = time.perf_counter() - begun
            assert plan.provenance is not None
            dtype = plan.provenance.state_dtype
            assert dtype is not None
            name = f"{recipe} in {bound}" if plan.tiers else _trained(recipe, recipe.trained_in(dtype))
            cell = name, plan.provenance.requested_state_size
            with pruned(self.model, plan) as smaller:
                measured = _losses(smaller, self.windows, [StateStorage.of(dtype)])
            known = outcomes[cell].measured if cell in outcomes else {}
            outcomes[cell] = Outcome(plan, known | measured, seconds)
            self.bounds.setdefault((cell, dtype), []).append(bound)
        return outcomes


def _trained(recipe: Recipe, dtype: str | None) -> str:
    """A recipe's name, with the dtype for which it trains if that is a narrow one."""
    return str(recipe) if dtype in (None, FLOAT32.name) else f"{recipe} trained in {dtype}"


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
    keys: dict[tuple[Cell, str], tuple[Cell | int, str]] = {}
    plans, storages = {}, {}
    for cell, outcome in outcomes.items():
        own_class, size = outcome.plan.needs_own_class, outcome.plan.kept_state_size
        for dtype in outcome.measured:
            key = keys[cell, dtype] = (cell if own_class else size, dtype)
            plans[key] = outcome.plan if own_class else first_channels(model, size)
            storages[key] = _storage(request, dtype)
    timings = measure(model, plans, request.batches, prompt=8, progress=progress, storages=storages)
    return {
        place: {batch: timings[key, batch].decode(batch) for batch in request.batches} for place, key in keys.items()
    }

"""The smallest state within a bound on the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.errors import InputError, NumericalError
from ghostssm.evaluation import Evaluation
from ghostssm.evaluation.measurement import evaluate_in_float32
from ghostssm.models.families import layout_of
from ghostssm.plan.measurement import Difference, Searched
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, listening, on_screen
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE, Calibration
from ghostssm.text.windows import Windows

_HELD_OUT_ONE_IN = 4


def smallest_plan(
    model: PreTrainedModel,
    windows: Windows,
    recipe: str | Recipe,
    max_excess_loss: float,
    *,
    multiple: int = DEFAULT_MULTIPLE,
    state_sizes: Sequence[int] | None = None,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    state_dtype: str = "float32",
    progress: Progress | None = on_screen,
) -> Plan:
    """The plan of the smallest state whose excess loss on held-out windows stays within a bound, found by bisection.

    Every fourth window is held out, where the loss is measured in float32; the others calibrate. The plan's provenance
    has the excess loss that was measured, with its standard error, as ``search``.

    Args:
        model: in memory; it stays as it is.
        windows: four at least: every fourth is held out, the others calibrate.
        recipe: a method's name, or what `Recipe` says.
        max_excess_loss: over the dense model's loss, nats per token.
        multiple: of the sizes that are tried.
        state_sizes: the sizes to try instead, ascending.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
        seed: of everything that is drawn at random.
        state_dtype: in which the pruned model's state is kept, rounded after every token.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.

    Raises:
        InputError: as `Calibration.plan`; fewer than four windows, a method that leaves the state whole, or no size
            below the model's own stays within the bound.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    if not recipe.registered.shrinks:
        raise InputError(f"{recipe} leaves the state whole, so no size can be searched for it; take another method.")
    windows, held_out = split(windows)
    limit = layout_of(model.config).state_size
    sizes = range(multiple, limit, multiple) if state_sizes is None else state_sizes
    if not sizes:
        raise InputError(
            f"No state size below {limit} is a multiple of {multiple} that suits; expected another multiple."
        )
    calibration = Calibration(model, windows)
    dense = evaluate_in_float32(model, held_out)
    low, high = -1, len(sizes)  # places in sizes: low is too small or -1, high is large enough
    best: tuple[Plan, Difference] | None = None
    with listening(progress) as tell:
        while high - low > 1:
            middle = (low + high) // 2
            plan = calibration.plan(recipe, sizes[middle], groups, seed, tell, multiple)
            with pruned(model, plan) as smaller:
                excess = excess_loss(smaller, held_out, dense, state_dtype)
            if excess.mean <= max_excess_loss:
                high, best = middle, (plan, excess)
            else:
                low = middle
    if best is None:
        among = f"in multiples of {multiple}" if state_sizes is None else f"among {', '.join(map(str, sizes))}"
        raise InputError(
            f"No state size below {limit} {among} keeps the excess loss within {max_excess_loss:g} "
            "nats per token; allow more, or try another method."
        )
    plan, excess = best
    searched = Searched(max_excess_loss, len(held_out), excess)
    assert plan.provenance is not None
    return dataclasses.replace(plan, provenance=dataclasses.replace(plan.provenance, search=searched))


def excess_loss(
    model: PreTrainedModel, windows: Windows, dense: Evaluation, state_dtype: str = "float32"
) -> Difference:
    """Over the dense loss; infinite where the model overflows, which a state that is too small may cause."""
    try:
        return evaluate_in_float32(model, windows, state_dtype=state_dtype).excess_over(dense)
    except NumericalError:
        return Difference(math.inf, math.nan)


def split(windows: Windows) -> tuple[Windows, Windows]:
    """The windows that calibrate and those that are held out.

    Raises:
        InputError: fewer than four windows.
    """
    if len(windows) < _HELD_OUT_ONE_IN:
        raise InputError(f"There are {len(windows)} calibration windows; a search needs at least 4: --windows 4.")
    apart = held_out_rows(len(windows))
    return windows.part(~apart), windows.part(apart)


def held_out_rows(count: int) -> Tensor:
    """Which of so many calibration windows a search holds out: (count,), bool."""
    return torch.arange(count) % _HELD_OUT_ONE_IN == 1

"""Searches over size and dtype of the state: the fewest bytes within a bound on the loss, and the other way round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.choices import DEFAULT_SEED, HELD_OUT_ONE_IN, Groups, check_searchable
from ghostssm.errors import InputError, NumericalError
from ghostssm.evaluation.perplexity import Evaluation, evaluate_in_float32
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.models.layout import SSDLayout
from ghostssm.ops.state_format import FLOAT32, FORMATS, TIERS, StateFormat
from ghostssm.plan.choice import Candidate, Choice
from ghostssm.plan.measurement import Difference, Searched
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, listening, named, on_screen, silent
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE, Calibration
from ghostssm.pruning.tiers import in_tiers, widest_tiered
from ghostssm.text.windows import Windows

_UNPRUNED = "unpruned model"


def smallest_plan(
    model: PreTrainedModel,
    windows: Windows,
    recipe: str | Recipe,
    max_excess_loss: float,
    *,
    dtypes: Sequence[str] | None = None,
    multiple: int = DEFAULT_MULTIPLE,
    state_sizes: Sequence[int] | None = None,
    groups: Groups = "equal",
    seed: int = DEFAULT_SEED,
    progress: Progress | None = on_screen,
) -> Plan:
    """The plan of the fewest bytes of state whose excess loss on held-out windows stays within a bound.

    Every fourth window is held out, where the loss is measured in float32, with a state that is rounded to its dtype
    after every token; the others calibrate. For each dtype a bisection finds the smallest size that stays within the
    bound, the narrowest dtype first: of the wider ones only sizes of fewer bytes than the best so far are tried. The
    plan's provenance has the dtype, and the excess loss that was measured with its standard error, as ``search``.

    Args:
        model: in memory; it stays as it is.
        windows: four at least: every fourth is held out, the others calibrate.
        recipe: a method's name, or what `Recipe` says.
        max_excess_loss: over the dense model's loss, nats per token.
        dtypes: names of dtypes of the state; all if not given.
        multiple: of the sizes that are tried, beside the model's own.
        state_sizes: the sizes to try instead, ascending; the model's own may be among them.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
        seed: of everything that is drawn at random.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.

    Raises:
        InputError: as `Calibration.plan`; fewer than four windows, a method that leaves the state whole, or no state
            smaller than the model's own stays within the bound.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    check_shrinks(recipe)
    windows, held_out = split(windows)
    limit = layout_of(model.config).state_size
    sizes = range(multiple, limit, multiple) if state_sizes is None else state_sizes
    if not sizes:
        raise InputError(
            f"No state size below {limit} is a multiple of {multiple} that suits; expected another multiple."
        )
    if state_sizes is None:
        sizes = [*sizes, limit]  # a narrower dtype alone may do
    forms = [form for form in map(StateFormat.of, FORMATS) if dtypes is None or form.name in dtypes]
    narrowest_first = sorted(forms, key=lambda form: form.state_bytes(1, limit))
    least = FLOAT32.state_bytes(1, limit)  # of a row, which all mixers have as many of
    calibration = Calibration(model, windows)
    plans: dict[tuple[int, str | None], Plan] = {}
    best: Plan | None = None
    with listening(progress) as tell:
        dense = evaluate_in_float32(model, held_out, named(tell, _UNPRUNED))
        for place, form in enumerate(narrowest_first):
            trials = _smaller(form, sizes, least)
            low, high = -1, len(trials)  # places in trials: low is too small or -1, high is large enough
            while high - low > 1:
                size = trials[middle := (low + high) // 2]
                most = [high - low - 1, *(len(_smaller(other, sizes, least)) for other in narrowest_first[place + 1 :])]
                left = sum(map(int.bit_length, most))  # a bisection's steps
                of_this = _candidate(tell, recipe, size, [form.name], left, "at most ")
                key = size, recipe.trained_in(form.name)
                if key not in plans:
                    plans[key] = calibration.plan(recipe, size, groups, seed, of_this, multiple, state_dtype=key[1])
                with pruned(model, plans[key]) as smaller:
                    excess = excess_loss(smaller, held_out, dense, form.name, of_this)
                if excess.mean <= max_excess_loss:
                    high, least = middle, form.state_bytes(1, size)
                    searched = Searched(max_excess_loss, len(held_out), form.name, excess)
                    best = plans[key].with_provenance(search=searched)
                else:
                    low = middle
    if best is None:
        among = f"in multiples of {multiple}" if state_sizes is None else f"among {', '.join(map(str, sizes))}"
        raise InputError(
            f"No state size below {limit} {among} keeps the excess loss within {max_excess_loss:g} nats per token in "
            f"{' or '.join(form.name for form in forms)}; allow more, or try another method."
        )
    return best


def _candidate(
    progress: Progress, recipe: Recipe, size: int, dtypes: Sequence[str], left: int, bound: str = ""
) -> Progress:
    """Who is told of one candidate, by its name and how many of those that are left come after it."""
    return named(progress, f"{recipe}, N' = {size} in {' and '.join(dtypes)}, {bound}{left - 1} more")


def _smaller(form: StateFormat, sizes: Iterable[int], row_bytes: int) -> list[int]:
    """The sizes of which a row takes less than so many bytes."""
    return [size for size in sizes if form.state_bytes(1, size) < row_bytes]


@dataclass(frozen=True)
class Fitting:
    """What searches for several recipes and bounds share: windows to calibrate and to measure on, and what they gave.

    Attributes:
        calibration: of three windows of four.
        held_out: the fourth ones.
        dense: the unpruned model's losses on them.
    """

    calibration: Calibration
    held_out: Windows
    dense: Evaluation

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Windows, progress: Progress = silent) -> Fitting:
        """Split the windows, and measure the unpruned model.

        Raises:
            InputError: fewer than four windows.
            NumericalError: the dense model's loss is not finite.
        """
        windows, held_out = split(windows)
        dense = evaluate_in_float32(model, held_out, named(progress, _UNPRUNED))
        return cls(Calibration(model, windows), held_out, dense)

    def plan(
        self,
        recipe: Recipe,
        state_bytes: int,
        *,
        dtypes: Sequence[str] | None = None,
        multiple: int = DEFAULT_MULTIPLE,
        state_sizes: Sequence[int] | None = None,
        groups: Groups = "equal",
        seed: int = DEFAULT_SEED,
        progress: Progress | None = on_screen,
    ) -> Plan:
        """The plan that loses least within a bound on the bytes of state per sequence, over state size and dtype.

        For every dtype the largest state that fits is measured with a state that is rounded after every token. Dtypes
        that fit the same size share one plan, unless the recipe trains the whole model for some of them. A projected
        state is tried in tiers too (`ghostssm.pruning.tiers`). The plan's provenance has what was chosen and what all
        candidates lost as ``choice``.

        Args:
            recipe: a method and its recovery steps.
            state_bytes: of one sequence over all layers, scales included.
            dtypes: names of dtypes of the state; all, and tiers, if not given.
            multiple: of the sizes that are considered.
            state_sizes: the sizes to consider instead; the model's own may be among them.
            groups: how the groups of a layer share the state.
            seed: for methods that draw at random, and for what is sampled.
            progress: told how far the work is; None for nobody.

        Raises:
            InputError: as `Calibration.plan`; a method that leaves the state whole, or no dtype in which a state of any
                of the sizes fits.
        """
        check_shrinks(recipe)
        model = self.calibration.model
        layout, layers = layout_of(model.config), len(mixers_of(model))
        fitting = fits_in(state_bytes, layout, layers, state_sizes, dtypes, multiple)
        sizes, tiered = set(fitting.values()), None
        if not recipe.registered.stock and (dtypes is None or TIERS.name in dtypes):
            row_bytes = state_bytes / (layers * layout.intermediate_size)
            tiered = widest_tiered(row_bytes, state_sizes or _sizes(layout.state_size, multiple))
            sizes |= set() if tiered is None else {tiered}
        candidates: list[tuple[Candidate, Plan]] = []
        with listening(progress) as tell:
            count = len(fitting) + (tiered is not None)
            for size in sorted(sizes, reverse=True):
                told = partial(_candidate, tell, recipe, size)
                shared = [dtype for dtype, fits in fitting.items() if fits == size] + [TIERS.name] * (size == tiered)
                for trained_in in dict.fromkeys(map(recipe.trained_in, shared)):
                    alike = [dtype for dtype in shared if recipe.trained_in(dtype) == trained_in]
                    stock = [dtype for dtype in alike if dtype != TIERS.name]
                    of_all = told(stock or alike, count - len(candidates))
                    plan = self.calibration.plan(recipe, size, groups, seed, of_all, multiple, state_dtype=trained_in)
                    for dtype in stock:
                        candidates.append(self._measured(plan, dtype, told([dtype], count - len(candidates))))
                    if TIERS.name in alike and plan.is_projected:
                        of_tiers = told([TIERS.name], count - len(candidates))
                        plan = in_tiers(model, plan, self.calibration.windows, state_bytes, of_tiers)
                        candidates.append(self._measured(plan, TIERS.name, of_tiers))
        candidates.sort(key=lambda each: each[0].excess.mean)
        choice = Choice(state_bytes, len(self.held_out), tuple(candidate for candidate, _ in candidates))
        return candidates[0][1].with_provenance(choice=choice)

    def _measured(self, plan: Plan, dtype: str, progress: Progress) -> tuple[Candidate, Plan]:
        """What a plan loses with its state in a dtype."""
        model = self.calibration.model
        taken = plan.state_bytes(layout_of(model.config), dtype)
        with pruned(model, plan) as smaller:
            excess = excess_loss(smaller, self.held_out, self.dense, dtype, progress)
        return Candidate(plan.mean_state_size, dtype, taken, excess), plan


def widest_fit(row_bytes: float, sizes: Iterable[int], dtypes: Iterable[str] | None = None) -> dict[str, int]:
    """The largest state size for each dtype whose rows fit, scales included; without the dtypes that don't fit at all.

    A row is the state of one element of a head's head_dim. All mixers of a model have as many, so that a row's share
    of the bytes is the sequence's.

    Args:
        row_bytes: that a row may take. sizes: to choose from. dtypes: names; all if not given.
    """
    sizes = list(sizes)
    forms = [StateFormat.of(name) for name in FORMATS if dtypes is None or name in dtypes]
    fits = {form.name: [size for size in sizes if form.state_bytes(1, size) <= row_bytes] for form in forms}
    return {name: max(fitting) for name, fitting in fits.items() if fitting}


def fits_in(
    state_bytes: int,
    layout: SSDLayout,
    layers: int,
    sizes: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    multiple: int = DEFAULT_MULTIPLE,
) -> dict[str, int]:
    """For each dtype the largest state size with which one sequence's state takes at most so many bytes.

    Args:
        state_bytes: over all layers, scales included.
        layout: of the model's mixers.
        layers: how many these are.
        sizes: to choose from; multiples of ``multiple`` and the model's own if not given.
        dtypes: names; all if not given.
        multiple: of the sizes.

    Raises:
        InputError: not one of them fits.
    """
    limit, rows = layout.state_size, layers * layout.intermediate_size
    sizes = _sizes(limit, multiple) if sizes is None else sizes
    fitting = widest_fit(state_bytes / rows, sizes, dtypes)
    fitting = {dtype: size for dtype, size in fitting.items() if (size, dtype) != (limit, "float32")}
    if not fitting:
        narrowest = min(map(StateFormat.of, dtypes or FORMATS), key=lambda form: form.state_bytes(rows, min(sizes)))
        raise InputError(
            f"No state fits into {state_bytes:,} bytes per sequence: the least, {min(sizes)} channels in "
            f"{narrowest.name}, takes {narrowest.state_bytes(rows, min(sizes)):,}, the model's own "
            f"{rows * 4 * limit:,} in float32."
        )
    return fitting


def _sizes(limit: int, multiple: int) -> list[int]:
    return [*range(multiple, limit, multiple), limit]


def check_shrinks(recipe: Recipe) -> None:
    """Raise InputError for a recipe whose method leaves the state whole."""
    if not recipe.registered.shrinks:
        raise InputError(f"{recipe} leaves the state whole, so no size can be chosen for it; take another method.")


def excess_loss(
    model: PreTrainedModel,
    windows: Windows,
    dense: Evaluation,
    state_dtype: str = "float32",
    progress: Progress = silent,
) -> Difference:
    """The loss minus the dense one; infinite where the model overflows, which a state that is too small may cause."""
    try:
        return evaluate_in_float32(model, windows, progress, state_dtype).excess_over(dense)
    except NumericalError:
        return Difference(math.inf, math.nan)


def split(windows: Windows) -> tuple[Windows, Windows]:
    """The windows that calibrate and those that are held out.

    Raises:
        InputError: fewer than four windows.
    """
    check_searchable(len(windows))
    apart = held_out_rows(len(windows))
    return windows.part(~apart), windows.part(apart)


def held_out_rows(count: int) -> Tensor:
    """Which of so many calibration windows a search holds out: (count,), bool."""
    return torch.arange(count) % HELD_OUT_ONE_IN == 1

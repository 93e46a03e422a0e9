"""Searches over size and dtype of the state: the fewest bytes within a bound on the loss, and the other way round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from ghostssm.pruning.tiers import in_tiers, tiered_bytes, widest_tiered
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
    bound, the narrowest dtype first: of the wider ones only sizes of fewer bytes than the best so far are tried. Last
    comes another, over the bytes of a projected state in tiers (`ghostssm.pruning.tiers`). The plan's provenance has
    the dtype, and the excess loss that was measured with its standard error, as ``search``.

    Args:
        model: in memory; it stays as it is.
        windows: four at least: every fourth is held out, the others calibrate.
        recipe: a method's name, or what `Recipe` says.
        max_excess_loss: over the dense model's loss, nats per token.
        dtypes: names of dtypes of the state; all, and tiers, if not given.
        multiple: of the sizes that are tried, beside the model's own.
        state_sizes: the sizes to try instead, ascending; the model's own may be among them.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
        seed: of everything that is drawn at random.
        progress: told how far the work is; a terminal or notebook shows it if not given; None for nobody.

    Raises:
        InputError: as `Calibration.plan`; fewer than four windows, a method that leaves the state whole, an unknown
            dtype, or no state smaller than the model's own stays within the bound.
    """
    recipe = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    check_shrinks(recipe)
    limit = layout_of(model.config).state_size
    sizes = [*range(multiple, limit, multiple)] if state_sizes is None else list(state_sizes)
    if not sizes:
        raise InputError(
            f"No state size below {limit} is a multiple of {multiple} that suits; expected another multiple."
        )
    if state_sizes is None:
        sizes.append(limit)  # a narrower dtype alone may do
    forms = formats_to_try(recipe, dtypes)
    forms.sort(key=lambda form: math.inf if form == TIERS else form.state_bytes(1, limit))
    with listening(progress) as tell:
        fitting = Fitting.of(model, windows, tell)
        best = fitting.smallest(recipe, max_excess_loss, forms, sizes, multiple, groups, seed, tell)
    if best is None:
        among = f"in multiples of {multiple}" if state_sizes is None else f"among {', '.join(map(str, sizes))}"
        raise InputError(
            f"No state size below {limit} {among} keeps the excess loss within {max_excess_loss:g} nats per token in "
            f"{' or '.join(form.name for form in forms)}; allow more, or try another method."
        )
    return best


def _candidate(progress: Progress, recipe: Recipe, size: int, dtype: str, left: str) -> Progress:
    """Who is told of one candidate, by its name and how many come after it."""
    return named(progress, f"{recipe}, N' = {size} in {dtype}, {left} more")


def formats_to_try(recipe: Recipe, dtypes: Sequence[str] | None) -> list[StateFormat]:
    """The formats of these names, or all; among them tiers, the last, for a recipe that projects the state only.

    Raises:
        InputError: a name of no format, or no format is left.
    """
    names = None if dtypes is None else {StateFormat.of(name).name for name in dtypes}
    all_forms = [*FORMATS.values()] if recipe.registered.stock else [*FORMATS.values(), TIERS]
    forms = [form for form in all_forms if names is None or form.name in names]
    if not forms:
        raise InputError(
            f"{recipe} gives no state in {' or '.join(dtypes or ())}; expected one or more of "
            f"{', '.join(form.name for form in all_forms)}."
        )
    return forms


@dataclass(frozen=True)
class _Trial:
    """A state size that is to be kept in a format, a row in so many bytes."""

    size: int
    form: StateFormat
    row_bytes: int


def _trials(form: StateFormat, sizes: Sequence[int], multiple: int, below: int) -> list[_Trial]:
    """What takes less than so many bytes of a row, ascending: by size, and in tiers by the bytes that are divided."""
    if form == TIERS:
        bounds = range(tiered_bytes(sizes[0]), below, tiered_bytes(multiple) - tiered_bytes(0))
        widest = [(widest_tiered(bound, sizes), bound) for bound in bounds]
        return [_Trial(size, form, bound) for size, bound in widest if size is not None]
    trials = [_Trial(size, form, form.state_bytes(1, size)) for size in sizes]
    return [trial for trial in trials if trial.row_bytes < below]


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

        For every dtype the largest state that fits is measured with a state that is rounded after every token. A
        projected state is tried in tiers too (`ghostssm.pruning.tiers`). The plan's provenance has what was chosen and
        what all candidates lost as ``choice``.

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
            InputError: as `Calibration.plan`; a method that leaves the state whole, an unknown dtype, or no dtype in
                which a state of any of the sizes fits.
        """
        check_shrinks(recipe)
        model = self.calibration.model
        layout = layout_of(model.config)
        names = [form.name for form in formats_to_try(recipe, dtypes)]
        wanted = fits_in(state_bytes, layout, len(mixers_of(model)), state_sizes, names, multiple)
        planned = self._planner(recipe, multiple, groups, seed)
        candidates: list[tuple[Candidate, Plan]] = []
        with listening(progress) as tell:
            for dtype, size in sorted(wanted.items(), key=lambda each: -each[1]):
                told = _candidate(tell, recipe, size, dtype, f"{len(wanted) - len(candidates) - 1}")
                candidates.append(self._measured(planned(size, dtype, told), dtype, state_bytes, told))
        candidates.sort(key=lambda each: each[0].excess.mean)
        choice = Choice(state_bytes, len(self.held_out), tuple(candidate for candidate, _ in candidates))
        return candidates[0][1].with_provenance(choice=choice)

    def smallest(
        self,
        recipe: Recipe,
        max_excess_loss: float,
        forms: Sequence[StateFormat],
        sizes: Sequence[int],
        multiple: int,
        groups: Groups,
        seed: int,
        progress: Progress,
    ) -> Plan | None:
        """The plan of the fewest bytes of state within a bound on the excess loss; None if no plan keeps it.

        Args:
            forms: to try, in this order; of the later ones only what takes fewer bytes than the best so far.
            sizes: to try, ascending.
        """
        planned = self._planner(recipe, multiple, groups, seed)
        best, least = None, FLOAT32.row_bytes(layout_of(self.calibration.model.config).state_size)
        for place, form in enumerate(forms):
            trials = _trials(form, sizes, multiple, least)
            low, high = -1, len(trials)  # places in trials: low is too small or -1, high is large enough
            while high - low > 1:
                trial = trials[middle := (low + high) // 2]
                others = (len(_trials(other, sizes, multiple, least)) for other in forms[place + 1 :])
                left = sum(map(int.bit_length, [high - low - 1, *others]))  # a bisection's steps
                told = _candidate(progress, recipe, trial.size, form.name, f"at most {left - 1}")
                plan = planned(trial.size, form.name, told)
                candidate, plan = self._measured(plan, form.name, trial.row_bytes * self._rows, told)
                if candidate.excess.mean <= max_excess_loss:
                    high, least = middle, trial.row_bytes
                    searched = Searched(max_excess_loss, len(self.held_out), form.name, candidate.excess)
                    best = plan.with_provenance(search=searched)
                else:
                    low = middle
        return best

    @property
    def _rows(self) -> int:
        """Of one sequence's state over all mixers, which have as many each."""
        model = self.calibration.model
        return len(mixers_of(model)) * layout_of(model.config).intermediate_size

    def _planner(
        self, recipe: Recipe, multiple: int, groups: Groups, seed: int
    ) -> Callable[[int, str, Progress], Plan]:
        """What makes a plan for a size and a dtype; dtypes share one, unless the model is trained for some of them."""
        plans: dict[tuple[int, str | None], Plan] = {}

        def planned(size: int, dtype: str, progress: Progress) -> Plan:
            key = size, recipe.trained_in(dtype)
            if key not in plans:
                plan = self.calibration.plan(recipe, size, groups, seed, progress, multiple, state_dtype=key[1])
                plans[key] = plan
            return plans[key]

        return planned

    def _measured(self, plan: Plan, dtype: str, state_bytes: int, progress: Progress) -> tuple[Candidate, Plan]:
        """What a plan loses with its state in a dtype, in tiers of at most so many bytes; and the plan with these."""
        model = self.calibration.model
        if dtype == TIERS.name:
            plan = in_tiers(model, plan, self.calibration.windows, state_bytes, progress)
        taken = plan.state_bytes(layout_of(model.config), dtype)
        with pruned(model, plan) as smaller:
            excess = excess_loss(smaller, self.held_out, self.dense, dtype, progress)
        return Candidate(plan.mean_state_size, dtype, taken, excess), plan


def widest_fit(row_bytes: float, sizes: Iterable[int], dtypes: Iterable[str] | None = None) -> dict[str, int]:
    """The largest state size for each dtype whose rows fit, scales included; without the dtypes that don't fit at all.

    A row is the state of one element of a head's head_dim. All mixers of a model have as many, so that a row's share
    of the bytes is the sequence's.

    Args:
        row_bytes: that a row may take. sizes: to choose from. dtypes: names; all but tiers if not given.
    """
    sizes = list(sizes)
    forms = map(StateFormat.of, FORMATS if dtypes is None else dtypes)
    fits = {form.name: [size for size in sizes if _row_bytes(form, size) <= row_bytes] for form in forms}
    return {name: max(fitting) for name, fitting in fits.items() if fitting}


def _row_bytes(form: StateFormat, size: int) -> int:
    """That a row takes; in tiers, the fewest that are divided over it."""
    return tiered_bytes(size) if form == TIERS else form.state_bytes(1, size)


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
        dtypes: names; all but tiers if not given.
        multiple: of the sizes.

    Raises:
        InputError: not one of them fits.
    """
    limit, rows = layout.state_size, layers * layout.intermediate_size
    sizes = _sizes(limit, multiple) if sizes is None else sizes
    fitting = widest_fit(state_bytes / rows, sizes, dtypes)
    fitting = {dtype: size for dtype, size in fitting.items() if (size, dtype) != (limit, "float32")}
    if not fitting:
        size, forms = min(sizes), map(StateFormat.of, dtypes or FORMATS)
        least, narrowest = min((rows * _row_bytes(form, size), form.name) for form in forms)
        raise InputError(
            f"No state fits into {state_bytes:,} bytes per sequence: the least, {size} channels in "
            f"{narrowest}, takes {least:,}, the model's own "
            f"{rows * 4 * limit:,} in float32. Give more bytes, or a smaller --multiple."
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

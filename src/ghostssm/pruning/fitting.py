"""The least loss within so many bytes of state per sequence, over size and dtype together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ghostssm.choices import DEFAULT_SEED, Groups
from ghostssm.errors import InputError
from ghostssm.evaluation import Evaluation
from ghostssm.evaluation.measurement import evaluate_in_float32
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.models.layout import SSDLayout
from ghostssm.ops.state_format import FORMATS, TIERS, StateFormat
from ghostssm.plan.choice import Candidate, Choice
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Progress, listening, on_screen
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE, Calibration
from ghostssm.pruning.smallest import excess_loss, split
from ghostssm.pruning.tiers import in_tiers, widest_tiered
from ghostssm.text.windows import Windows


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
    sizes = sizes or _sizes(limit, multiple)
    fitting = widest_fit(state_bytes / rows, sizes, dtypes)
    fitting = {dtype: size for dtype, size in fitting.items() if (size, dtype) != (limit, "float32")}
    if not fitting:
        raise InputError(
            f"No state fits into {state_bytes:,} bytes per sequence: the sizes are {', '.join(map(str, sizes))}, "
            f"the dtypes {', '.join(dtypes or FORMATS)}; the model's own takes {rows * 4 * limit:,} in float32."
        )
    return fitting


def _sizes(limit: int, multiple: int) -> list[int]:
    return [*range(multiple, limit, multiple), limit]


def check_shrinks(recipe: Recipe) -> None:
    """Raise InputError for a recipe whose method has no state sizes to choose from."""
    if not recipe.registered.shrinks:
        raise InputError(f"{recipe} leaves the state whole, so no size can be chosen for it; take another method.")


@dataclass(frozen=True)
class Fitting:
    """What recipes and bounds share: evidence from the windows that calibrate, and the others, to measure on.

    Attributes:
        calibration: of three windows of four.
        held_out: the fourth ones.
        dense: the unpruned model's losses on them.
    """

    calibration: Calibration
    held_out: Windows
    dense: Evaluation

    @classmethod
    def of(cls, model: PreTrainedModel, windows: Windows) -> Fitting:
        """Split the windows, and measure the unpruned model.

        Raises:
            InputError: fewer than four windows.
            NumericalError: the dense model's loss is not finite.
        """
        windows, held_out = split(windows)
        return cls(Calibration(model, windows), held_out, evaluate_in_float32(model, held_out))

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
        that fit the same size share one plan. A projected state is tried in tiers too
        (`ghostssm.pruning.tiers`). The plan's provenance has what was chosen and what all candidates lost as
        ``choice``.

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
        layout = layout_of(model.config)
        fitting = fits_in(state_bytes, layout, len(mixers_of(model)), state_sizes, dtypes, multiple)
        tiered = None if recipe.registered.stock else self._tiered_size(state_bytes, state_sizes, dtypes, multiple)
        sizes = set(fitting.values()) | (set() if tiered is None else {tiered})
        found: list[tuple[Candidate, Plan]] = []
        with listening(progress) as tell:
            for size in sorted(sizes, reverse=True):
                plan = self.calibration.plan(recipe, size, groups, seed, tell, multiple)
                names = [dtype for dtype, fits in fitting.items() if fits == size]
                found += self._measured(plan, names)
                if size == tiered and plan.is_projected:
                    plan = in_tiers(model, plan, self.calibration.windows, state_bytes, tell)
                    found += self._measured(plan, [TIERS.name])
        found.sort(key=lambda each: each[0].excess.mean)
        plan = found[0][1]
        choice = Choice(state_bytes, len(self.held_out), tuple(candidate for candidate, _ in found))
        assert plan.provenance is not None
        return dataclasses.replace(plan, provenance=dataclasses.replace(plan.provenance, choice=choice))

    def _measured(self, plan: Plan, dtypes: Sequence[str]) -> list[tuple[Candidate, Plan]]:
        """What a plan loses with its state in some dtypes."""
        model, size, found = self.calibration.model, plan.mean_state_size, []
        with pruned(model, plan) as smaller:
            for dtype in dtypes:
                taken = plan.state_bytes(layout_of(model.config), dtype)
                excess = excess_loss(smaller, self.held_out, self.dense, dtype)
                found.append((Candidate(size, dtype, taken, excess), plan))
        return found

    def _tiered_size(
        self, state_bytes: int, sizes: Sequence[int] | None, dtypes: Sequence[str] | None, multiple: int
    ) -> int | None:
        """Of the state that is divided into tiers, if it may be."""
        model = self.calibration.model
        if dtypes is not None and TIERS.name not in dtypes:
            return None
        layout = layout_of(model.config)
        rows = len(mixers_of(model)) * layout.intermediate_size
        return widest_tiered(state_bytes / rows, sizes or _sizes(layout.state_size, multiple))

"""The plan that a pruning request asks for, and what its baselines lose beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from ghostssm.errors import GhostError
from ghostssm.evaluation.perplexity import Evaluation
from ghostssm.models.families import layout_of
from ghostssm.models.layout import SSDLayout
from ghostssm.ops.state_format import FLOAT32
from ghostssm.plan.measurement import Compared, Difference
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import pruned
from ghostssm.progress import Notify, Progress, named
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import Fitting, excess_loss, smallest_plan
from ghostssm.text.windows import Windows
from ghostssm.workflows.prune_checks import PruneJob
from ghostssm.workflows.state_size import Target


@dataclass
class Planner:
    """Makes the plans of one request for one model, which share what the calibration found. The model stays as it was.

    Attributes:
        job: the checked request.
        model: in memory.
        windows: to calibrate on.
        progress: told how far the work is.
    """

    job: PruneJob
    model: PreTrainedModel
    windows: Windows
    progress: Progress

    def asked_for(self) -> Plan:
        """The request's own plan; raises what `Calibration.plan`, `Fitting.plan` and `smallest_plan` do."""
        return self._plan(self.job.recipe, self.job.target, self.progress)

    def baselines(self, plan: Plan, held_out: Windows, dense: Evaluation, notify: Notify) -> tuple[Compared, ...]:
        """What the request's baselines lose; one that can't be made is told of and left out.

        Args:
            plan: the request's own: where that was found within a bound on the loss, baselines get its bytes.
            held_out: windows to measure on.
            dense: the unpruned model's losses on them.
        """
        state_bytes = plan.state_bytes(layout_of(self.model.config), plan.state_dtype or FLOAT32.name)
        entries = []
        for number, (recipe, wanted) in enumerate(self.job.baselines, 1):
            found = wanted.max_excess_loss is not None
            target = replace(wanted, max_excess_loss=None, state_bytes=state_bytes) if found else wanted
            told = "" if target.size is None else f", {recipe}"  # a search names the recipe itself
            tell = named(self.progress, f"baseline {number} of {len(self.job.baselines)}{told}")
            entry = self._baseline(recipe, target, held_out, dense, tell, notify)
            entries += [] if entry is None else [entry]
        return tuple(entries)

    def _baseline(
        self, recipe: Recipe, target: Target, held_out: Windows, dense: Evaluation, progress: Progress, notify: Notify
    ) -> Compared | None:
        """What a recipe loses; None, and a note, where it can't be made, since the result is worth more than a line."""
        try:
            plan = self._plan(recipe, target, progress)
            with pruned(self.model, plan) as smaller:
                excess = excess_loss(smaller, held_out, dense, plan.state_dtype or FLOAT32.name, progress)
        except GhostError as error:
            notify(f"{recipe} is left out of the baselines: {error}")
            return None
        return compared(plan, layout_of(self.model.config), excess)

    def _plan(self, recipe: Recipe, target: Target, progress: Progress) -> Plan:
        asked = self.job.request
        how: dict[str, Any] = {
            "groups": asked.groups,
            "seed": asked.seed,
            "multiple": self.job.multiple,
            "progress": progress,
        }
        if target.size is not None:
            plan = self._calibration.plan(recipe, target.size, **how, state_dtype=asked.state_dtype)
            return plan.kept_in(asked.state_dtype)
        how |= {"state_sizes": target.sizes, "dtypes": target.dtypes}
        if target.state_bytes is not None:
            return self._fitting.plan(recipe, target.state_bytes, **how)
        assert target.max_excess_loss is not None
        return smallest_plan(self.model, self.windows, recipe, target.max_excess_loss, **how)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(self.model, self.windows)

    @cached_property
    def _fitting(self) -> Fitting:
        return Fitting.of(self.model, self.windows, self.progress)


def compared(plan: Plan, layout: SSDLayout, excess: Difference) -> Compared:
    """A plan beside others, in the dtype that its state is to be kept in.

    Args:
        layout: of the model that the plan is for. excess: that its model loses.
    """
    dtype = plan.state_dtype or FLOAT32.name
    taken = plan.state_bytes(layout, dtype)
    return Compared(plan.method, plan.needs_own_class, plan.mean_state_size, dtype, taken, excess)

"""Every check of a pruning run that needs no weights; the checked request, and the outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostssm.checkpoint.description import Description, describe
from ghostssm.checkpoint.hub import check_hub_target
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.checkpoint.saving import check_dialect
from ghostssm.plan.measurement import Measurement
from ghostssm.plan.plan import Plan
from ghostssm.progress import Notify, unheard
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import DEFAULT_MULTIPLE, check_original
from ghostssm.pruning.search import held_out_rows
from ghostssm.values import Value
from ghostssm.workflows.inputs import AnyCheckpoint, Inputs, calibration_windows, tell_same_text, windows_of
from ghostssm.workflows.request_checks import check_request
from ghostssm.workflows.requests import PruneRequest
from ghostssm.workflows.state_size import Target, check_dtypes, check_engines, target_of

DEFAULT_BATCHES = (1, 8, 32)
_SURE_WINDOWS = 8
"""On fewer held-out windows, the standard error of an excess loss is a guess itself."""


@dataclass(frozen=True, repr=False, eq=False)
class PruneOutcome(Value):
    """What became of a request.

    Attributes:
        written: the checkpoint's folder, if one was to be written.
        plan: what was decided; of a streamed run it names the changed parameters, whose values are in the output only.
        measured: the loss before and after, if it was asked for.
        address: of the repository on the hub, if the result was uploaded.
        checkpoint: the pruned model in memory; None of a streamed run.
    """

    written: Path | None
    plan: Plan
    measured: Measurement | None = None
    address: str | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class PruneJob:
    """A request that was checked as far as it can be without the model's weights.

    Attributes:
        description: of the model. recipe: parsed. target: how much to keep.
        baselines: recipes to measure beside it, each with how much it is to keep.
    """

    request: PruneRequest
    description: Description
    recipe: Recipe
    target: Target
    baselines: tuple[tuple[Recipe, Target], ...] = ()

    @property
    def multiple(self) -> int:
        return self.request.multiple or DEFAULT_MULTIPLE

    def inputs(self, checkpoint: AnyCheckpoint) -> Inputs[AnyCheckpoint]:
        """The opened model with the windows that the request names."""
        vocabulary, asked = checkpoint.require_tokenizer(), self.request
        held_out = None if asked.evaluate is None else windows_of(asked, asked.evaluate, vocabulary)
        return Inputs(checkpoint, calibration_windows(asked, vocabulary), held_out)

    def announce(self, inputs: Inputs[Any], notify: Notify) -> None:
        """Tell what the windows are used for, and what makes a measured loss doubtful."""
        windows, held_out = inputs.calibration, inputs.held_out
        count, wanted = len(windows), self.request.windows
        fewer = "" if count == wanted else f" (not {wanted}: the text has no more)"
        notify(
            f"{self.recipe}: calibrating on {count} windows{fewer} of {windows.length} tokens of {windows.text_name}"
        )
        if self.target.size is None:
            apart = int(held_out_rows(count).sum())
            few = "; so few make it uncertain, 32 windows hold out 8 (--windows 32)"
            notify(
                f"{apart} of these windows {'is' if apart == 1 else 'are'} held out to measure the excess loss on"
                + ("" if apart >= _SURE_WINDOWS else few)
            )
        if held_out is not None:
            tell_same_text(notify, windows, held_out)


def checked(request: PruneRequest, notify: Notify, described: Description | None = None) -> PruneJob:
    """Check a request before anything is loaded; its model's config and file headers are read.

    Args:
        described: the model, if it is at hand.

    Raises:
        InputError: a fault of the request, or of what it names; says what was found and what was expected.
    """
    check_request(request)
    if request.state_dtype is not None:
        check_dtypes([request.state_dtype])
    check_engines(request)
    recipe = Recipe.parse(request.recipe)
    described = described or describe(request.model)
    check_original(described.is_stock)
    check_dialect(request.dialect, described.family, not recipe.stock, request.untie)
    if request.push_to_hub is not None:
        check_hub_target(request.push_to_hub)
    if request.stream:
        recipe.check_streamable()
    target = target_of(request, described, recipe, notify)
    return PruneJob(request, described, recipe, target, _baselines(request, described, recipe))


def _baselines(request: PruneRequest, described: Description, own: Recipe) -> tuple[tuple[Recipe, Target], ...]:
    """The recipes that are to stand beside the request's own; what each keeps is said as for that one."""
    recipes = dict.fromkeys(map(Recipe.parse, request.baselines))
    recipes.pop(own, None)
    return tuple((recipe, target_of(request, described, recipe, unheard)) for recipe in recipes)

"""One request to prune, checked as far as it can be without the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

import ghostssm
from ghostssm.cli.console import note, note_same_text
from ghostssm.methods.selection import Groups
from ghostssm.pruning.recipe import DEFAULT_RECIPE, Recipe
from ghostssm.pruning.smallest import held_out_rows
from ghostssm.recovery import Step

_SURE_WINDOWS = 8
"""On fewer, the standard error of an excess loss is itself a guess."""


@dataclass(frozen=True)
class Target:
    """How much of the state is to stay.

    Attributes:
        size: the state size, on average over layers; None where a bound on the loss decides.
        max_excess_loss: that bound, nats per token.
        sizes: those that the wanted engines run, ascending, where a bound decides; None for all.
    """

    size: int | None = None
    max_excess_loss: float | None = None
    sizes: Sequence[int] | None = None


@dataclass(frozen=True)
class Job:
    """What to prune, how, and where to.

    Attributes:
        calibration: text to calibrate on, of which ``calibration_windows`` are drawn.
        evaluation: text to measure the loss on, dense and pruned, and ``evaluation_windows`` of it; None for neither.
    """

    model: str
    tokenizer: str | None
    device: str
    description: ghostssm.Description
    recipe: Recipe
    target: Target
    groups: Groups
    multiple: int
    seed: int
    calibration: str
    calibration_windows: int
    evaluation: str | None
    evaluation_windows: int | None
    window_length: int
    output: str
    overwrite: bool

    def windows(self, vocabulary: PreTrainedTokenizerBase) -> ghostssm.Windows:
        """The windows to calibrate on."""
        text = ghostssm.read_text(self.calibration, "calibration")
        return ghostssm.cut_windows(text, vocabulary, self.window_length, self.calibration_windows, self.seed)

    def announce(self, windows: ghostssm.Windows, held_out: ghostssm.Windows | None) -> None:
        """Say what is about to be done with the windows to calibrate on, and what to think of those to measure on."""
        count, wanted = len(windows), self.calibration_windows
        fewer = "" if count == wanted else f" (not {wanted}: the text has no more)"
        note(f"{self.recipe}: calibrating on {count} windows{fewer} of {windows.length} tokens of {windows.text_name}")
        if self.target.max_excess_loss is not None:
            _tell_held_out(count)
        if held_out is not None:
            note_same_text(windows, held_out)

    def held_out(self, vocabulary: PreTrainedTokenizerBase) -> ghostssm.Windows | None:
        """The windows to measure the loss on, if it is wanted."""
        if self.evaluation is None:
            return None
        text = ghostssm.read_text(self.evaluation, "evaluation")
        return ghostssm.evaluation_windows(text, vocabulary, self.window_length, self.evaluation_windows)


def _tell_held_out(windows: int) -> None:
    """Say how many of so many calibration windows a bound on the loss is measured on, and whether these are few."""
    held_out = int(held_out_rows(windows).sum())
    few = "" if held_out >= _SURE_WINDOWS else "; so few make the bound uncertain, 32 windows hold out 8 (--windows 32)"
    note(f"{held_out} of these windows are held out to measure the excess loss on{few}")


def wanted_recipe(method: str | None, repair: bool | None, refit: int | None, per_layer: bool) -> Recipe:
    """The recipe that a method's name and the options beside it make together."""
    base = DEFAULT_RECIPE if method is None else Recipe.parse(method)
    steps = list(base.steps)
    if refit is not None:
        steps = [step for step in steps if step.name != "refit"]
        steps[:0] = [Step("refit", refit)] * (refit > 0)
    if repair is not None:
        steps = [step for step in steps if step.name != "repair"] + [Step("repair")] * repair
    return Recipe(base.method, tuple(steps), base.per_layer or per_layer)

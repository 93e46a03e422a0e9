"""What a method is, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ghostssm.calibration.samples import OutputSamples
from ghostssm.calibration.statistics import LayerStatistics
from ghostssm.errors import InputError
from ghostssm.methods.selection import Groups
from ghostssm.models.layout import SSDLayout
from ghostssm.plan.plan import Decision


@dataclass(frozen=True)
class Evidence:
    """What a method may look at to score the channels of one mixer.

    Attributes:
        layout: the mixer's sizes.
        in_proj: (in_proj_rows, hidden_size), the mixer's input projection.
        statistics: on the pruned activations that reach the mixer; for methods that need ``"statistics"``.
        samples: of the recurrence on the same activations; for methods that need ``"samples"``.
        input_gram: (hidden_size, hidden_size), sum of x x^T over inputs; for methods that need ``"inputs"``.
        changes: measures the mean squared change of the mixer's output that decisions would make.
        saliency: (g, n), squared gate gradients on the unpruned model; for methods that need ``"gradients"``.
        seed: the same for a whole plan and different for each of its mixers.
        rough: the decision only serves to measure what a size costs, so a costly refinement is not worth it.
    """

    layout: SSDLayout
    in_proj: Tensor
    seed: int
    statistics: LayerStatistics | None = None
    saliency: Tensor | None = None
    samples: OutputSamples | None = None
    input_gram: Tensor | None = None
    changes: Callable[[Sequence[Decision]], list[float]] | None = None
    rough: bool = False


@dataclass(frozen=True)
class Method:
    """A named way to decide what stays of a mixer's state.

    Attributes:
        summary: one line for the command line's help.
        needs: what must be gathered before it can score.
        score: evidence on one mixer to (g, n): the highest are kept, or where there is a ``decide``, what people are
            shown of it, such as singular values.
        scope: channels compete within their layer, or over the whole model.
        decide: the decision, where it is more than the highest scores: evidence, state size and how groups share it.
        stock: whether the result stays in the stock model class.
        shrinks: whether it makes the state smaller; a reference for comparisons may not.
    """

    name: str
    summary: str
    needs: Literal["weights", "statistics", "samples", "inputs", "gradients"]
    score: Callable[[Evidence], Tensor]
    scope: Literal["layer", "model"] = "layer"
    decide: Callable[[Evidence, int, Groups], Decision] | None = None
    stock: bool = True
    shrinks: bool = True


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name, also in recipes; an earlier one of that name is replaced."""
    _METHODS[method.name] = method


def method_names() -> tuple[str, ...]:
    return tuple(sorted(_METHODS))


def stock_method_names() -> tuple[str, ...]:
    """Those whose result stays in the stock model class."""
    return tuple(name for name in method_names() if _METHODS[name].stock)


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: there is none.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise InputError(f"No method is called {name!r}; expected one of: {', '.join(method_names())}.") from None


def statistics_of(evidence: Evidence) -> LayerStatistics:
    """The statistics, for a method that declared that it needs them."""
    assert evidence.statistics is not None
    return evidence.statistics


def least_change(evidence: Evidence, candidates: Sequence[Decision]) -> Decision:
    """The candidate that changes the mixer's output least, measured; the first where nothing can be measured."""
    if evidence.changes is None:
        return candidates[0]
    changes = evidence.changes(candidates)
    return candidates[changes.index(min(changes))]


def samples_of(evidence: Evidence) -> OutputSamples:
    """The samples, for a method that declared that it needs them."""
    assert evidence.samples is not None
    return evidence.samples

"""What a method is, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ghostssm.calibration.statistics import LayerStatistics
from ghostssm.errors import InputError
from ghostssm.layout import SSDLayout


@dataclass(frozen=True)
class Evidence:
    """What a method may look at to score the channels of one mixer.

    Attributes:
        layout: the mixer's sizes.
        in_proj: (in_proj_rows, hidden_size), the mixer's input projection.
        statistics: on the pruned activations that reach the mixer; for methods that need ``"statistics"``.
        saliency: (g, n), squared gate gradients on the unpruned model; for methods that need ``"gradients"``.
        seed: the same for a whole plan and different for each of its mixers.
    """

    layout: SSDLayout
    in_proj: Tensor
    seed: int
    statistics: LayerStatistics | None = None
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A named way to score state channels; higher is kept.

    Attributes:
        summary: one line for the command line's help.
        needs: what must be gathered before it can score.
        score: evidence on one mixer to (g, n).
        scope: channels compete within their layer, or over the whole model.
    """

    name: str
    summary: str
    needs: Literal["weights", "statistics", "gradients"]
    score: Callable[[Evidence], Tensor]
    scope: Literal["layer", "model"] = "layer"


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    _METHODS[method.name] = method


def method_names() -> tuple[str, ...]:
    return tuple(sorted(_METHODS))


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

"""What a method is, what it may ask, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from ghostssm.calibration.samples import OutputSamples
from ghostssm.calibration.statistics import LayerStatistics
from ghostssm.errors import InputError, unknown_name
from ghostssm.methods.selection import Cut
from ghostssm.models.layout import SSDLayout
from ghostssm.plan.decision import Decision
from ghostssm.values import Value

T = TypeVar("T")


class EvidenceSource(Protocol):
    """Where the answers come from: a block of a walk, or what is known already (`Known`)."""

    def statistics(self) -> LayerStatistics: ...

    def samples(self) -> OutputSamples: ...

    def input_gram(self) -> Tensor: ...

    def saliency(self) -> Tensor: ...

    def changes(self, decisions: Sequence[Decision]) -> list[float]: ...


@dataclass(frozen=True, repr=False)
class Evidence(Value):
    """What a method may look at to decide on one mixer. An answer is worked out when it is first asked for.

    Attributes:
        layout: the mixer's sizes.
        in_proj: (in_proj_rows, hidden_size), the mixer's input projection.
        seed: the same for a whole plan and different for each of its mixers.
        source: what works the answers out; methods do not ask it.
        rough: the decision only serves to measure what a size costs, so a costly refinement is not worth it.
    """

    layout: SSDLayout
    in_proj: Tensor
    seed: int
    source: EvidenceSource
    rough: bool = False
    _known: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, what: Hashable, work: Callable[[], T]) -> T:
        """What a method works out from this evidence for any cut; it is worked out for the first cut only."""
        if what not in self._known:
            self._known[what] = work()
        known: T = self._known[what]
        return known

    @cached_property
    def statistics(self) -> LayerStatistics:
        """Mean channel energies, on the pruned activations that reach the mixer."""
        return self.source.statistics()

    @cached_property
    def samples(self) -> OutputSamples:
        """Samples of the recurrence on the same activations."""
        return self.source.samples()

    @cached_property
    def input_gram(self) -> Tensor:
        """(hidden_size, hidden_size), the sum of x x^T over the mixer's inputs."""
        return self.source.input_gram()

    @cached_property
    def saliency(self) -> Tensor:
        """(g, n), squared gate gradients on the unpruned model."""
        return self.source.saliency()

    def least_change(self, candidates: Sequence[Decision]) -> Decision:
        """The candidate that changes the mixer's output least, measured."""
        changes = self.source.changes(candidates)
        return candidates[changes.index(min(changes))]


@dataclass(frozen=True)
class Known:
    """Evidence that was worked out before; a method that asks for what is None gets an InputError."""

    known_statistics: LayerStatistics | None = None
    known_samples: OutputSamples | None = None
    known_saliency: Tensor | None = None

    def statistics(self) -> LayerStatistics:
        return _present(self.known_statistics, "statistics")

    def samples(self) -> OutputSamples:
        return _present(self.known_samples, "samples")

    def saliency(self) -> Tensor:
        return _present(self.known_saliency, "gate gradients")

    def input_gram(self) -> Tensor:
        return _present(None, "inputs")

    def changes(self, decisions: Sequence[Decision]) -> list[float]:
        return _present(None, "changes of the output")


def _present(value: T | None, what: str) -> T:
    if value is None:
        raise InputError(f"The method asks for {what}, which are not known here; a one-shot method sees weights only.")
    return value


@dataclass(frozen=True, repr=False)
class Method(Value):
    """A named way to decide what stays of a mixer's state.

    Attributes:
        name: in recipes and on the command line.
        summary: one line for the command line's help.
        score: evidence on one mixer to (g, n): the highest are kept, or where there is a ``decide``, what people are
            shown of it, such as singular values.
        decide: the decision, where it is more than the highest scores.
        one_shot: whether all mixers are scored on the unpruned model, by weights or gate gradients alone. Others are
            scored front to back, on what the pruned mixers before them leave.
        scope: of a one-shot method: channels compete within their layer, or over the whole model.
        stock: whether the result stays in the stock model class.
        shrinks: whether it makes the state smaller; a reference for comparisons may not.
        streamable: whether one block in memory at a time is enough.
    """

    name: str
    summary: str
    score: Callable[[Evidence], Tensor]
    decide: Callable[[Evidence, Cut], Decision] | None = None
    one_shot: bool = False
    scope: Literal["layer", "model"] = "layer"
    stock: bool = True
    shrinks: bool = True
    streamable: bool = True


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make a method known by its name, also in recipes; an earlier one of that name is replaced.

    Args:
        method: with its functions.
    """
    _METHODS[method.name] = method


def method_names() -> tuple[str, ...]:
    return tuple(sorted(_METHODS))


def method_named(name: str) -> Method:
    """The method of a name.

    Args:
        name: one of `method_names`.

    Raises:
        InputError: there is none.
    """
    try:
        return _METHODS[name]
    except KeyError:
        raise unknown_name("method", name, method_names()) from None

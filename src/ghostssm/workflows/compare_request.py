"""What can be asked of a comparison, and every check that needs no weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ghostssm.checkpoint.description import Description, describe
from ghostssm.errors import InputError
from ghostssm.methods import method_names
from ghostssm.methods.selection import Groups
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.pruning.feasibility import check_original
from ghostssm.pruning.fitting import check_shrinks, fits_in
from ghostssm.pruning.recipe import Recipe
from ghostssm.values import Value
from ghostssm.workflows.request import CalibratingRequest, check_heeded
from ghostssm.workflows.state_size import bound_on_bytes


@dataclass(frozen=True, repr=False)
class CompareRequest(Value, CalibratingRequest):
    """Everything that can be asked of a comparison; with its bases the only list of its options.

    Attributes:
        model: a hub id, a folder in either dialect, or ``reference``.
        state_sizes: N' to prune to. Either these or ``state_bytes`` are given.
        state_bytes: bounds on the bytes of one sequence's state, each as `PruneRequest` has it: for every method the
            state size and dtype are chosen together that lose least within each, on every fourth calibration window.
        methods: recipes, such as ``ghost`` or ``output+repair``; all methods, without recovery steps, if none is given.
        text: text to measure the loss on.
        groups: how the groups of a layer share the state: ``equal``, the same number of channels in each, or
            ``pooled``, where they compete.
        batches: batch sizes at which to measure decoding; empty for none.
        report: also measure what a report shows.
        state_dtypes: in which the state is kept, each for every method and size and for the dense model.
        state_rounding: of all but float32.
    """

    model: str
    state_sizes: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    text: str = "wikitext2"
    groups: Groups = "equal"
    batches: tuple[int, ...] = (1, 32)
    report: bool = False
    state_dtypes: tuple[str, ...] = ("float32",)
    state_rounding: str = "nearest"
    state_bytes: tuple[str, ...] = ()

    @property
    def storages(self) -> tuple[StateStorage, ...]:
        """How states are kept, by dtype."""
        return tuple(StateStorage.of(dtype, self.rounding_of(dtype), self.seed) for dtype in self.state_dtypes)

    def rounding_of(self, state_dtype: str) -> str:
        """A float32 state is not rounded."""
        return "nearest" if state_dtype == FLOAT32.name else self.state_rounding


def checked(request: CompareRequest, described: Description | None = None) -> tuple[CompareRequest, Description]:
    """The request with its methods named, and its model's description; only config and file headers are read.

    Args:
        described: the model, if it is at hand.

    Raises:
        InputError: a fault of the request, or of what it names; says what was found and what was expected.
    """
    recipes = [str(Recipe.parse(method)) for method in request.methods]
    described = described or describe(request.model)
    check_original(described.is_stock)
    if not (request.state_sizes or request.state_bytes):
        raise InputError("Say how much to keep: give --state-size or --state-bytes.")
    for size in request.state_sizes:
        check_state_size(size, described.layout.state_size)
    if request.state_bytes:
        check_heeded(request, "state_bytes", "state_sizes", "state_dtypes", "state_rounding")
        _check_bounds(request, described)
        recipes = recipes or [name for name in method_names() if Recipe.parse(name).registered.shrinks]
    StateStorage.of("bfloat16", request.state_rounding)  # raises, as the next line does
    assert all(request.storages)
    return dataclasses.replace(request, methods=tuple(recipes) or method_names()), described


def _check_bounds(request: CompareRequest, described: Description) -> None:
    """Raise InputError for a bound within which there is nothing to choose, or a method that can't choose."""
    for bound in request.state_bytes:
        fits_in(bound_on_bytes(bound, described.state_bytes()), described.layout, described.layers)
    for method in request.methods:
        check_shrinks(Recipe.parse(method))

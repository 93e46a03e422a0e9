"""Every check of a comparison that needs no weights."""

from __future__ import annotations

from dataclasses import replace

from ghostssm.checkpoint.description import Description, describe
from ghostssm.errors import InputError
from ghostssm.methods import method_names
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.pruning.feasibility import check_original
from ghostssm.pruning.fitting import check_shrinks, fits_in
from ghostssm.pruning.recipe import Recipe
from ghostssm.workflows.requests import CompareRequest, check_heeded
from ghostssm.workflows.state_size import bound_on_bytes, check_dtypes


def storage_of(request: CompareRequest, state_dtype: str) -> StateStorage:
    """How a state is kept; a float32 one is not rounded."""
    rounding = "nearest" if state_dtype == FLOAT32.name else request.state_rounding
    return StateStorage.of(state_dtype, rounding, request.seed)


def storages(request: CompareRequest) -> tuple[StateStorage, ...]:
    """How states are kept, by dtype."""
    return tuple(storage_of(request, dtype) for dtype in request.state_dtypes)


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
    check_dtypes(request.state_dtypes)
    StateStorage.of("bfloat16", request.state_rounding)  # raises, as the next line does
    assert all(storages(request))
    return replace(request, methods=tuple(recipes) or method_names()), described


def _check_bounds(request: CompareRequest, described: Description) -> None:
    """Raise InputError for a bound within which there is nothing to choose, or a method that can't choose."""
    for bound in request.state_bytes:
        fits_in(bound_on_bytes(bound, described.state_bytes()), described.layout, described.layers)
    for method in request.methods:
        check_shrinks(Recipe.parse(method))

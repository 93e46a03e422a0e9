"""Every check of a comparison that needs no weights."""

from __future__ import annotations

from dataclasses import replace

from ghostssm.checkpoint.description import Description, describe
from ghostssm.methods import method_names
from ghostssm.models.layout import check_state_size
from ghostssm.ops.state_format import FLOAT32, StateStorage
from ghostssm.pruning.feasibility import check_original
from ghostssm.pruning.recipe import Recipe
from ghostssm.workflows.requests import CompareRequest


def storages(request: CompareRequest) -> tuple[StateStorage, ...]:
    """How states are kept, by dtype; a float32 state is not rounded."""
    rounding = {dtype: "nearest" if dtype == FLOAT32.name else request.state_rounding for dtype in request.state_dtypes}
    return tuple(StateStorage.of(dtype, how, request.seed) for dtype, how in rounding.items())


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
    for size in request.state_sizes:
        check_state_size(size, described.layout.state_size)
    StateStorage.of("bfloat16", request.state_rounding)  # raises, as the next line does
    assert all(storages(request))
    return replace(request, methods=tuple(recipes) or method_names()), described

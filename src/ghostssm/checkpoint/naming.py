"""Which stored tensor is which part of a model, and which weights are tied, by the rules of transformers' own loader.

Files may have the names of transformers' classes, or those of older or merged layouts that it renames and converts,
with or without the base model's prefix. Tensors that its rules ignore, such as buffers of old versions, may be there.
transformers only warns of a part that it fills with random numbers, or of a tensor that has no place. Both are faults
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ghostssm.files.tensors import StoredTensor
from ghostssm.models.transformers_private import as_stored, loaded_names, tied_weights, without_ignored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Place(NamedTuple):
    """Where transformers puts a stored tensor.

    Attributes:
        parameter: the parameter or buffer that it becomes; the first, if it becomes several.
        pattern: of the conversion that makes the parameter of this tensor and others; None if there is no conversion.
        numbers: in the stored name (of the layer, of the expert); they tell the tensors of a conversion apart.
    """

    parameter: str
    pattern: str | None
    numbers: tuple[str, ...]


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Place]:
    """From a stored name to its place, which need not be a part of the model."""
    return {
        name: Place(parameter, pattern, tuple(filter(str.isdecimal, name.split("."))) if pattern else ())
        for name, (parameter, pattern) in loaded_names(model, names).items()
    }


def places_of_parameters(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """From a parameter's name to the names of the stored tensors that make it.

    Tensors that make several parameters are under the first of these. A key that is no parameter of the model stands
    for tensors that its class does not load.
    """
    places: dict[str, list[str]] = {}
    for name, place in places_of(model, names).items():
        places.setdefault(place.parameter, []).append(name)
    return places


def ignored_names(model: PreTrainedModel, places: Mapping[str, Place]) -> set[str]:
    """Stored names that have no place in the model and that transformers' rules ignore."""
    state = model.state_dict()
    surplus = {place.parameter for place in places.values()} - state.keys()
    ignored = surplus - without_ignored(model, surplus)
    return {name for name, place in places.items() if place.parameter in ignored}


def naming_faults(model: PreTrainedModel, stored: Mapping[str, StoredTensor], places: Mapping[str, Place]) -> list[str]:
    """Every way in which stored tensors contradict the names and shapes of a model, on any device."""
    state = model.state_dict()
    # The second form is the one that transformers would write: an older or merged layout, if it knows one.
    forms = (state, as_stored(model, state))
    expected: dict[Place, tuple[str, tuple[int, ...]]] = {}
    converted = {place.parameter for place in places.values() if place.pattern}
    # The form with most of the file's names comes last, so that messages name missing parts as it does.
    for names in sorted(forms, key=lambda names: len(names.keys() & stored.keys())):
        for name, place in places_of(model, names).items():
            if (place.parameter in converted) == (place.pattern is not None):
                expected[place] = (name, tuple(names[name].shape))
    held: dict[Place, str] = {}
    wrong, surplus = [], []
    for name, place in places.items():
        shape, file = stored[name].shape, stored[name].file.name
        if place not in expected:
            surplus.append(f"{name} {shape} belongs to no part of the model")
        elif place in held:
            surplus.append(f"{name} is the same part of the model as {held[place]}")
        elif shape != expected[place][1]:
            wrong.append(f"{name} has shape {shape} in {file}, but the config implies {expected[place][1]}")
        held.setdefault(place, name)
    parameters = {place.parameter for place in held}
    ties = tied_weights(model).items()
    shared = {name for tie in ties for name, other in (tie, tie[::-1]) if other in parameters}
    missing = [
        f"{name} {shape} is missing"
        for place, (name, shape) in expected.items()
        if place not in held and place.parameter not in shared
    ]
    return [*wrong, *missing, *surplus]


def with_values_of_their_own(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> list[str]:
    """Parameters that the config ties to others, although the files hold other values for them.

    transformers leaves these untied, and so does everything here. Adapters that were merged into a head leave such
    files.

    Args:
        stored: the files' tensors under transformers' names.
        dtype: of the model in memory; values are compared in it.
    """
    places = places_of_parameters(model, stored)

    def read(name: str) -> Tensor:
        (place,) = places[name]  # what is tied is never made of several tensors
        return stored[place].read().to(dtype)

    return [
        name
        for name, other in tied_weights(model).items()
        if name in places and other in places and not torch.equal(read(name), read(other))
    ]


def settle_ties(model: PreTrainedModel) -> None:
    """Make a model's config say that its head is tied only if it is.

    transformers has one switch for all ties. Where other weights are shared too (Zamba2's blocks) it stays on.
    Readers, like transformers, then see from the files that the head has values of its own.
    """
    if not tied_weights(model):
        model.config.tie_word_embeddings = False


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output head is the embeddings' weight."""
    head: Any = model.get_output_embeddings()
    return head is not None and any(model.get_parameter_or_buffer(name) is head.weight for name in tied_weights(model))

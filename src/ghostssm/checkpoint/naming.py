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
        parameter: or buffer of the model; of several that are made of it, the first.
        pattern: of the conversion that makes the parameter of this tensor and others; None if it is the parameter.
        numbers: in the stored name, which tell such tensors apart: of the layer, of the expert.
    """

    parameter: str
    pattern: str | None
    numbers: tuple[str, ...]


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Place]:
    """Stored name to place, which need not be a part of the model."""
    return {
        name: Place(parameter, pattern, tuple(filter(str.isdecimal, name.split("."))) if pattern else ())
        for name, (parameter, pattern) in loaded_names(model, names).items()
    }


def places_of_parameters(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """A parameter's name to those of the stored tensors that make it.

    Where stored tensors make several parameters, these are under the first of them. A name that is no parameter's
    belongs to a tensor that the model's class does not load.
    """
    places: dict[str, list[str]] = {}
    for name, place in places_of(model, names).items():
        places.setdefault(place.parameter, []).append(name)
    return places


def ignored_names(model: PreTrainedModel, places: Mapping[str, Place]) -> set[str]:
    """Stored names without a place that transformers' rules ignore."""
    state = model.state_dict()
    surplus = {place.parameter for place in places.values()} - state.keys()
    ignored = surplus - without_ignored(model, surplus)
    return {name for name, place in places.items() if place.parameter in ignored}


def naming_faults(model: PreTrainedModel, stored: Mapping[str, StoredTensor], places: Mapping[str, Place]) -> list[str]:
    """Every way in which stored tensors contradict the names and shapes of a model, on any device."""
    state = model.state_dict()
    # The second form is how transformers would write the model: of older or merged layouts, where it knows some.
    forms = (state, as_stored(model, state))
    expected: dict[Place, tuple[str, tuple[int, ...]]] = {}
    converted = {place.parameter for place in places.values() if place.pattern}
    # The form that the file has most names of comes last, and so names what is missing.
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
    """Parameters that the config ties, and the files hold with other values than what they would be tied to.

    transformers leaves these untied, and so does everything here. Adapters merged into a head leave such files.

    Args:
        stored: the files' tensors under transformers' names.
        dtype: that the model has in memory, where equality counts.
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
    """Have a model's config say that its head is tied only where it is.

    transformers has one switch for all ties: where other weights are shared too (Zamba2's blocks) it stays, and a
    reader has to see from the files that the head has values of its own, as transformers does.
    """
    if not tied_weights(model):
        model.config.tie_word_embeddings = False


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether the output head is the embeddings' weight."""
    head: Any = model.get_output_embeddings()
    return head is not None and any(model.get_parameter_or_buffer(name) is head.weight for name in tied_weights(model))

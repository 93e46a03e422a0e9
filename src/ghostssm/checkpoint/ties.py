"""Weights that a config ties, and what is stored for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ghostssm.checkpoint.naming import places_of_parameters
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.transformers_private import tied_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

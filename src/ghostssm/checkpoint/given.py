"""Whatever a caller has in place of a checkpoint, turned into one: the only place that guesses."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from ghostssm.checkpoint.loading import Checkpoint, load
from ghostssm.errors import InputError
from ghostssm.models.families import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GivenModel: TypeAlias = "str | PathLike[str] | PreTrainedModel | Checkpoint"
"""A hub id, a folder, ``reference``, a transformers model in memory, or a loaded checkpoint."""
GivenTokenizer: TypeAlias = str | PathLike[str] | PreTrainedTokenizerBase


def is_in_memory(given: GivenModel) -> bool:
    """Whether something is at hand already, or else the name of what is to be loaded."""
    return not isinstance(given, str | PathLike)


def in_memory(given: PreTrainedModel | Checkpoint) -> Checkpoint:
    """The checkpoint that a model in memory makes, without a tokenizer; a checkpoint is returned as it is.

    Raises:
        InputError: something else.
    """
    if isinstance(given, Checkpoint):
        return given
    check_model(given)
    return Checkpoint(given)


def given_checkpoint(
    given: GivenModel,
    tokenizer: GivenTokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Checkpoint:
    """The checkpoint that something stands for; what has a name is loaded.

    Args:
        tokenizer: to take instead of the model's own: in memory, or a folder or hub id.
        dtype, device: as `load`. A model in memory stays as and where it is.

    Raises:
        InputError: something else, or a device for a model that is in memory already. Others as `load`.
    """
    named = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase | None) else str(tokenizer)
    if not is_in_memory(given):
        place = named if isinstance(named, str) else None
        loaded = load(str(given), dtype=dtype, device=device or "cpu", tokenizer=place)
        return loaded if named is None or place is not None else Checkpoint(loaded.model, named, loaded.source)
    checkpoint = in_memory(given)
    if device is not None and torch.device(device).type != checkpoint.model.device.type:
        raise InputError(
            f"The model is on {checkpoint.model.device} already, the device is {device!r}; leave that out, or move the "
            "model: model.to(...)."
        )
    if isinstance(named, str):
        raise InputError(
            f"The model is in memory, its tokenizer is {named!r}; expected one in memory too: "
            "tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    return checkpoint if named is None else Checkpoint(checkpoint.model, named, checkpoint.source)

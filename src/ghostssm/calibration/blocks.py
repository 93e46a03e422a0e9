"""The blocks that a walk visits: those of a model in memory, or blocks that are filled when their turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ghostssm.models.families import check_model, family_of


class Blocks(Protocol):
    """The residual blocks of a model, front to back."""

    @property
    def model(self) -> PreTrainedModel:
        """The whole model, for its config and forward pass. Modules before its blocks have their weights."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The blocks as the model has them, with or without weights."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        ...

    def opened(self, index: int) -> AbstractContextManager[nn.Module]:
        """Within the context, a block with its weights."""
        ...

    def runnable(self) -> AbstractContextManager[None]:
        """Within the context the model's forward pass shows what its blocks return; the numbers may be anything."""
        ...


@dataclass(frozen=True)
class LoadedBlocks:
    """The blocks of a model in memory."""

    model: PreTrainedModel

    @property
    def modules(self) -> Sequence[nn.Module]:
        return family_of(self.model.config).blocks(self.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def opened(self, index: int) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.modules[index])

    def runnable(self) -> AbstractContextManager[None]:
        return nullcontext()


def blocks_of(model: PreTrainedModel | Blocks) -> Blocks:
    """The blocks of a model; blocks are returned as they are.

    Raises:
        InputError: the argument is neither a model nor blocks.
    """
    check_model(model.model if hasattr(model, "opened") else model)
    return LoadedBlocks(model) if isinstance(model, PreTrainedModel) else model

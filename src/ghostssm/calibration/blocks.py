"""Where a walk gets a model's blocks from: from memory, or from whatever fills each one when its turn comes."""

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
        """The whole model: its config and forward pass. What stands before its blocks has its weights."""
        ...

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The blocks as the model has them, with or without weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        ...

    def opened(self, index: int) -> AbstractContextManager[nn.Module]:
        """Within the context, a block with its weights."""
        ...

    def runnable(self) -> AbstractContextManager[None]:
        """Within the context the model's forward pass shows what its blocks return, be the numbers what they may."""
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
    """The blocks of a model, or what stands for them already.

    Raises:
        InputError: neither.
    """
    check_model(model.model if hasattr(model, "opened") else model)
    return LoadedBlocks(model) if isinstance(model, PreTrainedModel) else model

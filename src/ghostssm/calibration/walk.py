"""Carry the hidden states of all windows through a model, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.capture import Call, block_calls
from ghostssm.calibration.open_block import OpenBlock
from ghostssm.calibration.processes import Processes
from ghostssm.calibration.scratch import Scratch
from ghostssm.models.families import family_of
from ghostssm.text.windows import Windows


class LayerWalk:
    """The hidden states of all windows at one depth of a model.

    Each block is copied in float32 or better when its turn comes, so the model itself is never changed, half-precision
    weights are calibrated in float32, and memory holds one block and one set of hidden states:

        walk = LayerWalk(model, windows)
        for block in walk.blocks():
            if block.mixer is None:
                block.advance()
                continue
            ...                       # decide from what the block can be asked
            pruned = block.prune(decision)
            pruned.advance()

    Attention, experts and MLPs run as they are. What a block takes besides the hidden states is captured from the
    model's own forward pass (`ghostssm.calibration.capture`), and reaches the copy in its precision.

    Attributes:
        hidden: (count, l, hidden_size), what reaches the next block.
        tokens: how many there are in all windows, those of other processes included.
        first_window: the number of this process's first window.
        batches: the windows that a block is run on at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel | Blocks,
        windows: Windows,
        scratch: Scratch | None = None,
        processes: Processes | None = None,
    ):
        """
        Args:
            model: in memory, or its blocks.
            windows: those of all processes; this one walks with its own share.
            scratch: the room for what grows with the windows; memory if not given.
        """
        self.processes = processes or Processes()
        self.first_window, own = self.processes.share(windows)
        self.tokens = windows.ids.numel()
        self.scratch = scratch or Scratch()
        self._source = blocks_of(model)
        self.family = family_of(self._source.model.config)
        self.batches = own.batches(self._source.device)
        dtype = torch.promote_types(self._source.model.dtype, torch.float32)
        self.hidden, self._calls = block_calls(self._source, own, dtype, self.scratch)

    def __len__(self) -> int:
        return len(self._source.modules)

    def blocks(self, first: int = 0) -> Iterator[OpenBlock]:
        """Front to back, each with its weights.

        Args:
            first: the block to begin with; the caller puts what reaches it into ``hidden``.
        """
        for index in range(first, len(self)):
            with self._source.opened(index) as original:
                block = OpenBlock(self, index, original, copy.deepcopy(original).to(self.hidden.dtype))
                del original
                yield block
                block.close()  # the caller's variable still names it, and memory has room for one block

    def calls(self, index: int, block: nn.Module) -> Iterator[tuple[slice, partial[Any]]]:
        """For each batch its windows, and the call of a copy of block ``index`` with what reaches it."""
        device = self._source.device
        for span, calls in zip(self.batches, self._calls, strict=True):
            call: Call = calls[index].map(lambda tensor: tensor.to(device))
            yield span, partial(block, self.hidden[span].to(device), *call.args, **call.kwargs)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor in the room for what grows with the windows, and return it (`Scratch.keep`)."""
        return self.scratch.keep(name, tensor)

"""Carry the hidden states of all windows through a model, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostssm.acceleration import replaced_forward
from ghostssm.calibration.blocks import Blocks, blocks_of
from ghostssm.calibration.capture import Call, block_calls, captured_input
from ghostssm.calibration.scratch import Scratch
from ghostssm.data.windows import Windows
from ghostssm.errors import NumericalError
from ghostssm.families import family_of
from ghostssm.mixer import Mixer, Streams, mixer_forward, mixer_streams, output_of_streams
from ghostssm.plan import Decision
from ghostssm.processes import Processes
from ghostssm.surgery import change_parameters, prune_mixer

_KEPT_STREAM_BYTES = 256 << 20
"""So much of what scoring computed is kept for carrying the hidden states on; the rest is computed again."""

_MEASURED_TOKENS = 8192
"""Of the windows, so many tokens serve to measure what a decision would do."""


class LayerWalk:
    """The hidden states of all windows at one depth of a model.

    Each block is copied in float32 or better when its turn comes, so the model itself is never changed, half-precision
    weights are calibrated in float32, and memory holds one block and one set of hidden states:

        walk = LayerWalk(model, windows)
        for block, mixer in walk.blocks():
            ...                       # decide from walk.streams(block, mixer)
            smaller = walk.apply(block, mixer, decision)
            walk.advance(block, smaller, decision)

    Attention, experts and MLPs run as they are. What a block takes besides the hidden states is captured from the
    model's own forward pass (`ghostssm.calibration.capture`), and reaches the copy in its precision.
    """

    def __init__(
        self,
        model: PreTrainedModel | Blocks,
        windows: Windows,
        scratch: Scratch | None = None,
        first_window: int = 0,
    ):
        """
        Args:
            model: or where its blocks come from.
            scratch: where what grows with the windows is to be; memory if not given.
            first_window: the number of the first of these windows, where other processes have others.
        """
        self.first_window = first_window
        self._source = blocks_of(model)
        self._family = family_of(self._source.model.config)
        self._scratch = scratch or Scratch()
        self._spans = windows.batches(self._source.device)
        self._streams: dict[int, Streams] = {}
        self.index = 0
        self.original: nn.Module | None = None
        dtype = torch.promote_types(self._source.model.dtype, torch.float32)
        self.hidden, self._calls = block_calls(self._source, windows, dtype, self._scratch)

    def __len__(self) -> int:
        return len(self._source.modules)

    def blocks(self, first: int = 0) -> Iterator[tuple[nn.Module, Mixer | None]]:
        """Front to back: a copy of each block, and the view of the mixer in that copy.

        The block itself, with its weights in their own precision, is ``original`` meanwhile.

        Args:
            first: block to begin with; what reaches it must be put into ``hidden`` then.
        """
        for index in range(first, len(self)):
            self.index = index
            self._streams.clear()
            with self._source.opened(index) as self.original:
                block = copy.deepcopy(self.original).to(self.hidden.dtype)
                yield block, self._family.mixer(block, index)
                del block
            self.original = None

    def stored_mixer(self) -> Mixer:
        """The mixer of the block at hand as the model has it, in its own precision."""
        assert self.original is not None
        mixer = self._family.mixer(self.original, self.index)
        assert mixer is not None
        return mixer

    def streams(self, block: nn.Module, mixer: Mixer) -> Iterator[Streams]:
        """What the recurrence of a block's mixer works on, batch by batch; as many as fit are kept for `advance`."""
        self._streams.clear()
        room = _KEPT_STREAM_BYTES
        for index, hidden in enumerate(self.inputs(block, mixer)):
            with torch.inference_mode():
                streams = mixer_streams(mixer, hidden)
            room -= streams.nbytes
            if room >= 0:
                self._streams[index] = streams
            yield streams

    def inputs(self, block: nn.Module, mixer: Mixer) -> Iterator[Tensor]:
        """What the mixer is called with, (b, l, hidden_size), batch by batch."""
        for span, call in self._batches():
            yield captured_input(mixer.module, partial(block, self._at(span), *call.args, **call.kwargs))

    def outputs(self, block: nn.Module, mixer: Mixer) -> list[Tensor]:
        """What the mixer makes of its inputs, batch by batch."""
        with torch.inference_mode():
            return [
                self._scratch.keep(
                    f"outputs {index}",
                    mixer_forward(mixer, hidden) if streams is None else output_of_streams(mixer, streams),
                )
                for index, (hidden, streams) in enumerate(self._inputs_and_streams(block, mixer))
            ]

    def changes(
        self, block: nn.Module, mixer: Mixer, decisions: Sequence[Decision], processes: Processes | None = None
    ) -> list[float]:
        """The mean squared change of the mixer's output that each decision would make, on the first windows.

        Where several processes share the windows, all must call it with the same decisions.
        """
        found: list[tuple[list[float], int]] = []
        tokens = self.first_window * self.hidden.shape[1]
        with torch.inference_mode():
            for hidden, kept in self._inputs_and_streams(block, mixer):
                if tokens >= _MEASURED_TOKENS:
                    break
                streams = mixer_streams(mixer, hidden) if kept is None else kept
                dense = output_of_streams(mixer, streams)
                changed = (output_of_streams(mixer, _decided(streams, decision)) - dense for decision in decisions)
                totals = [change.double().square().sum().item() for change in changed]
                found.append((totals, dense.shape[0] * dense.shape[1]))
                tokens += found[-1][1]
        found = (processes or Processes()).gather(found)
        measured = sum(count for _, count in found)
        return [sum(totals[index] for totals, _ in found) / measured for index in range(len(decisions))]

    def pruned_streams(self, block: nn.Module, mixer: Mixer, decision: Decision) -> Iterator[Streams]:
        """As `streams`, of a mixer that a decision was applied to; uses what `streams` kept."""
        for hidden, streams in self._inputs_and_streams(block, mixer):
            with torch.inference_mode():
                smaller = mixer_streams(mixer, hidden) if streams is None else _decided(streams, decision)
            yield smaller

    def forget_streams(self) -> None:
        """Call when the parameters behind the streams have changed."""
        self._streams.clear()

    def apply(self, block: nn.Module, mixer: Mixer, decision: Decision) -> Mixer:
        """Prune a block copy's mixer and give it the decision's parameters; returns the view of what it is then."""
        prune_mixer(self._family, mixer, decision.selection, decision.selection.width)
        change_parameters(mixer.module, decision)
        if decision.changes:
            self.forget_streams()
        view = self._family.mixer(block, self.index)
        assert view is not None
        return replace(view, projection=decision.projection)

    def advance(self, block: nn.Module, mixer: Mixer | None = None, decision: Decision | None = None) -> None:
        """Replace the hidden states by the block's output.

        Args:
            mixer: of the block, if it has one; with the decision that was applied to it, if any.

        Raises:
            NumericalError: the output is not finite; names the block's mixer.
        """
        for index, (span, call) in enumerate(self._batches()):
            streams = self._streams.pop(index, None)

            def forward(mixer: Mixer, hidden_states: Tensor, streams: Streams | None = streams, **_: Any) -> Tensor:
                if streams is None:
                    return mixer_forward(mixer, hidden_states)
                return output_of_streams(mixer, streams if decision is None else _decided(streams, decision))

            with torch.inference_mode(), replaced_forward([mixer] if mixer else [], forward):
                output = block(self._at(span), *call.args, **call.kwargs)
                output = output[0] if isinstance(output, tuple) else output
                self.hidden[span] = output
            if not torch.isfinite(output).all():
                name = mixer.name if mixer else type(block).__name__
                raise NumericalError(
                    f"NaN or Inf in the activations after {name}. The checkpoint is broken or overflows; "
                    "evaluate the unpruned model on the same text first."
                )

    def _inputs_and_streams(self, block: nn.Module, mixer: Mixer) -> Iterator[tuple[Tensor, Streams | None]]:
        for index, hidden in enumerate(self.inputs(block, mixer)):
            yield hidden, self._streams.get(index)

    def _at(self, span: slice) -> Tensor:
        """The hidden states of a batch, on the model's device."""
        return self.hidden[span].to(self._source.device)

    def _batches(self) -> Iterable[tuple[slice, Call]]:
        """The windows of each batch, and what the block at hand is called with for them."""
        device = self._source.device
        for span, calls in zip(self._spans, self._calls, strict=True):
            yield span, calls[self.index].map(lambda tensor: tensor.to(device))


def _decided(streams: Streams, decision: Decision) -> Streams:
    """The streams that a dense mixer's become under a decision that changes none of the weights behind them."""
    selection = decision.selection
    kept = streams.select(selection.padded(selection.width))
    return kept if decision.projection is None else kept.project(decision.projection)

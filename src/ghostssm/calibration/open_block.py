"""One block of a walk: what its mixer can be asked, how it is pruned, and how it carries the hidden states on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostssm.calibration.capture import captured_input
from ghostssm.calibration.samples import OutputSamples, joined, sample_outputs
from ghostssm.calibration.statistics import LayerStatistics, gather_statistics
from ghostssm.errors import NumericalError
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.models.mixer import (
    Mixer,
    Streams,
    gated_norm,
    mixer_output,
    mixer_streams,
    output_of_streams,
    scanned,
)
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage
from ghostssm.plan.decision import Decision
from ghostssm.plan.surgery import change_parameters, prune_mixer

if TYPE_CHECKING:
    from ghostssm.calibration.walk import LayerWalk

KEPT_STREAM_BYTES = 256 << 20
"""So many bytes of streams, and of y for as many tokens, are kept from scoring until the hidden states are carried
on; the others are computed again."""

MEASURED_TOKENS = 8192
"""Tokens of the windows that are scanned to measure the effect of a decision."""
_MEASURED_OUTPUTS = 2048


class _WalkedBlock:
    """A copy of a block with the view of its mixer; the part that open and pruned blocks share."""

    def __init__(self, walk: LayerWalk, index: int, block: nn.Module, mixer: Mixer | None):
        self.walk, self.index, self._block, self.mixer = walk, index, block, mixer

    @property
    def present_mixer(self) -> Mixer:
        """The mixer of a block that must have one."""
        assert self.mixer is not None, "this block has no Mamba-2 mixer"
        return self.mixer

    def inputs(self) -> Iterator[Tensor]:
        """The mixer's inputs, (b, l, hidden_size), batch by batch."""
        for _, call in self.walk.calls(self.index, self._block):
            yield captured_input(self.present_mixer.module, call)

    def _advance(self, forward: Any) -> None:
        """Replace the hidden states by the block's output, with a mixer that does ``forward(batch number, hidden)``."""
        hidden, mixers = self.walk.hidden, [] if self.mixer is None else [self.mixer]
        for number, (span, call) in enumerate(self.walk.calls(self.index, self._block)):

            def mixed(_: Mixer, hidden_states: Tensor, number: int = number, **__: Any) -> Tensor:
                output: Tensor = forward(number, hidden_states)
                return output

            with torch.inference_mode(), replaced_forward(mixers, mixed):
                output: Any = call()
                output = output[0] if isinstance(output, tuple) else output
                hidden[span] = output
            if not torch.isfinite(output).all():
                name = self.mixer.name if self.mixer else type(self._block).__name__
                raise NumericalError(
                    f"NaN or Inf in the activations after {name}. The checkpoint is broken or overflows; "
                    "evaluate the unpruned model on the same text first."
                )


class OpenBlock(_WalkedBlock):
    """A block of a walk that is not pruned yet.

    Sums and means are over the windows of all processes, so that all of them must call the same methods in turn.

    Attributes:
        index: the block's number. original: the model's own block, with its weights in their own precision.
        mixer: the view of the copy's mixer, if it has one.
    """

    def __init__(self, walk: LayerWalk, index: int, original: nn.Module, block: nn.Module):
        super().__init__(walk, index, block, walk.family.mixer(block, index))
        self.original = original
        self._kept: dict[int, Streams] = {}
        self._scanned: dict[int, Tensor] = {}
        self._pruned: PrunedBlock | None = None

    def stored_mixer(self) -> Mixer:
        """The mixer as the model has it, in its own precision."""
        mixer = self.walk.family.mixer(self.original, self.index)
        assert mixer is not None
        return mixer

    def streams(self) -> Iterator[Streams]:
        """The mixer's streams, batch by batch; as many as fit are kept for later calls."""
        self._kept.clear()
        self._scanned.clear()
        room = KEPT_STREAM_BYTES
        for number, hidden in enumerate(self.inputs()):
            with torch.inference_mode():
                streams = mixer_streams(self.present_mixer, hidden)
            room -= streams.nbytes + streams.x.nbytes
            if room >= 0:
                self._kept[number] = streams
            yield streams

    def scanned_streams(self) -> Iterator[tuple[Streams, Tensor]]:
        """The mixer's streams with what the recurrence gives on them, y (b, l, h, p), batch by batch; kept likewise."""
        for number, streams in enumerate(self.streams()):
            yield streams, self._y(number, streams)

    def statistics(self) -> LayerStatistics:
        """Mean energies of the mixer's channels."""
        return gather_statistics(self.present_mixer, self.streams(), len(self.walk.batches), self.walk.processes)

    def samples(self, seed: int) -> OutputSamples:
        """Samples of what the mixer's channels add to its output."""
        first, tokens = self.walk.first_window, self.walk.tokens
        own = sample_outputs(self.present_mixer, self.scanned_streams(), tokens, seed=seed, first=first)
        return joined(self.walk.processes.gather([own]))

    def input_gram(self) -> Tensor:
        """(hidden_size, hidden_size), float64: the sum of x x^T over the mixer's inputs."""
        rows = (hidden.flatten(0, 1) for hidden in self.inputs())
        gram: Tensor = sum((each.T @ each).double() for each in rows)  # type: ignore[assignment]
        self.walk.processes.add(gram)
        return gram

    def changes(self, decisions: Sequence[Decision], tokens: int = MEASURED_TOKENS) -> list[float]:
        """The mean squared change of the mixer's output that each decision would make, on windows of the first tokens.

        Args:
            tokens: of all processes; about `_MEASURED_OUTPUTS` of them, evenly spaced, have their outputs compared.
        """
        mixer, sums = self.present_mixer, list[tuple[list[float], int]]()  # of squares, and over how many tokens
        before = self.walk.first_window * self.walk.hidden.shape[1]
        stride = max(1, min(self.walk.tokens, tokens) // _MEASURED_OUTPUTS)
        weight, groups = mixer.out_proj.weight, mixer.layout.n_groups  # a change of out_proj's input has no bias
        with torch.inference_mode():
            for number, hidden in enumerate(self.inputs()):
                if before >= tokens:
                    break
                streams = self._streams_of(number, hidden)
                z = streams.z[:, ::stride]
                dense = gated_norm(mixer.norm, self._y(number, streams)[:, ::stride], z, groups)
                pruned = (scanned(mixer, _decided(streams, decision))[:, ::stride] for decision in decisions)
                changed = (gated_norm(mixer.norm, y, z, groups).sub_(dense) for y in pruned)
                totals = [F.linear(change, weight).square_().sum(dtype=torch.float64).item() for change in changed]
                sums.append((totals, z.shape[0] * z.shape[1]))
                before += hidden.shape[0] * hidden.shape[1]
        sums = self.walk.processes.gather(sums)
        measured = sum(count for _, count in sums)
        return [sum(totals[index] for totals, _ in sums) / measured for index in range(len(decisions))]

    def outputs(self) -> list[Tensor]:
        """The mixer's outputs, batch by batch."""
        with torch.inference_mode():
            return [
                self.walk.keep(f"outputs {number}", self._output(number, hidden))
                for number, hidden in enumerate(self.inputs())
            ]

    def advance(self, storage: StateStorage = FLOAT32_STORAGE) -> None:
        """Replace the hidden states by the block's output.

        Args:
            storage: how the mixer keeps its state, which is rounded after every token.

        Raises:
            NumericalError: the output is not finite; names the block's mixer.
        """
        if not storage.rounds:
            self._advance(self._last_output)
            return
        forwards = [rounded_forward(storage, span.start) for span, _ in self.walk.calls(self.index, self._block)]
        self._advance(lambda number, hidden: forwards[number](self.present_mixer, hidden))

    def prune(self, decision: Decision, *, keep_outputs: bool = False, state_dtype: str | None = None) -> PrunedBlock:
        """Prune the copy and give it the decision's parameters; this object is of no use afterwards.

        Args:
            keep_outputs: keep the dense mixer's outputs, for recovery steps.
            state_dtype: that the state is to be kept in, for these too.
        """
        outputs = self.outputs() if keep_outputs else []
        mixer, family = self.present_mixer, self.walk.family
        prune_mixer(family, mixer, decision.selection, decision.selection.width)
        change_parameters(mixer.module, decision.changes)
        view = family.mixer(self._block, self.index)
        assert view is not None
        kept = {} if decision.changes else self._kept
        self.mixer, self._kept, self._scanned = None, {}, {}
        pruned = replace(view, projection=decision.projection)
        self._pruned = PrunedBlock(self.walk, self.index, self._block, pruned, decision, outputs, kept, state_dtype)
        return self._pruned

    def close(self) -> None:
        """Let go of all weights, also of those of the pruned block; neither of the two can be used any more."""
        if self._pruned is not None:
            vars(self._pruned).clear()
        vars(self).clear()

    def _streams_of(self, number: int, hidden: Tensor) -> Streams:
        kept = self._kept.get(number)
        return mixer_streams(self.present_mixer, hidden) if kept is None else kept

    def _y(self, number: int, streams: Streams) -> Tensor:
        """What the recurrence gives on a batch's streams; kept as long as these are."""
        y = self._scanned.get(number)
        if y is None:
            with torch.inference_mode():
                y = scanned(self.present_mixer, streams)
            if number in self._kept:
                self._scanned[number] = y
        return y

    def _output(self, number: int, hidden: Tensor) -> Tensor:
        streams = self._streams_of(number, hidden)
        return mixer_output(self.present_mixer, self._y(number, streams), streams.z)

    def _last_output(self, number: int, hidden: Tensor) -> Tensor:
        output = self._output(number, hidden)
        self._kept.pop(number, None)
        self._scanned.pop(number, None)
        return output


class PrunedBlock(_WalkedBlock):
    """A block of a walk that a decision was applied to; recovery steps change its mixer's parameters in place.

    Attributes:
        mixer: the view of the pruned mixer. dense_outputs: of the dense mixer, batch by batch; empty if not kept.
        state_dtype: that the state is to be kept in; None if nobody said.
    """

    def __init__(
        self,
        walk: LayerWalk,
        index: int,
        block: nn.Module,
        mixer: Mixer,
        decision: Decision,
        dense_outputs: list[Tensor],
        kept: dict[int, Streams],
        state_dtype: str | None,
    ):
        super().__init__(walk, index, block, mixer)
        self.dense_outputs, self.state_dtype = dense_outputs, state_dtype
        self._decision = decision
        self._kept = {number: _decided(streams, decision) for number, streams in kept.items()}
        self._behind_kept = _behind_streams(mixer)
        parameters = mixer.module.named_parameters() if dense_outputs else ()  # recovery steps need the outputs
        self._before = {name: value.detach().clone() for name, value in parameters}

    def streams(self) -> Iterator[Streams]:
        """The mixer's streams with the parameters of now, batch by batch."""
        for number, hidden in enumerate(self.inputs()):
            with torch.inference_mode():
                yield self._streams_of(number, hidden)

    def advance(self) -> None:
        """As `OpenBlock.advance`, with the pruned mixer."""
        self._advance(self._output)

    def decision(self) -> Decision:
        """The decision, with every parameter that a recovery step has changed since."""
        parameters = dict(self.present_mixer.module.named_parameters())
        changed = {
            name: parameters[name].detach().clone()
            for name, before in self._before.items()
            if not torch.equal(parameters[name], before)
        }
        changes = {**self._decision.changes, **changed}
        return replace(self._decision, projection=self.present_mixer.projection, changes=changes)

    def _streams_of(self, number: int, hidden: Tensor) -> Streams:
        pairs = zip(_behind_streams(self.present_mixer), self._behind_kept, strict=True)
        if not all(now is before and version == seen for (now, version), (before, seen) in pairs):
            self._kept.clear()
        kept = self._kept.get(number)
        return mixer_streams(self.present_mixer, hidden) if kept is None else kept

    def _output(self, number: int, hidden: Tensor) -> Tensor:
        streams = self._streams_of(number, hidden)
        self._kept.pop(number, None)
        return output_of_streams(self.present_mixer, streams)


def _behind_streams(mixer: Mixer) -> list[tuple[Tensor, int]]:
    """The parameters behind a mixer's streams, each with the number of times that PyTorch saw it written.

    Kept streams are good until one of these changes. Tensors made in inference mode can't be written outside it.
    """
    parts = [mixer.in_proj.weight, mixer.in_proj.bias, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias]
    if mixer.projection is not None:
        parts += [mixer.projection.B, mixer.projection.C]
    return [(part, -1 if part.is_inference() else part._version) for part in parts if part is not None]


def _decided(streams: Streams, decision: Decision) -> Streams:
    """A dense mixer's streams, cut and projected by a decision that changes none of the weights behind them."""
    selection = decision.selection
    kept = streams.select(selection.padded(selection.width))
    return kept if decision.projection is None else kept.project(decision.projection)

"""A model whose weights stay in their files: a block is filled when its turn comes, and emptied afterwards.

The model is built from its config with parameters on the meta device. What stands before its blocks (embeddings, rotary
tables) is read once. transformers' own loader puts the tensors of one block in place, so that names of older or merged
layouts, experts that are stored one by one, and precisions come out as if the whole model were loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ghostssm.checkpoint.generation import read_generation_config
from ghostssm.checkpoint.loading import (
    check_device,
    check_finite,
    checked_tensors,
    model_config,
    stored_dtype,
    tell_narrowed,
)
from ghostssm.checkpoint.naming import places_of_parameters, settle_ties, with_values_of_their_own
from ghostssm.checkpoint.source import Source, find_source
from ghostssm.checkpoint.tokenizer import load_tokenizer, required
from ghostssm.files.tensors import StoredTensor
from ghostssm.models.families import family_of
from ghostssm.models.transformers_private import load_tensors, note_layout, tied_weights, without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamedCheckpoint:
    """A model whose weights stay in their files, with its tokenizer.

    Attributes:
        blocks: of the model, each read when its turn comes.
        tokenizer: None where there is none.
        source: where its files are.
    """

    blocks: StreamedBlocks
    tokenizer: PreTrainedTokenizerBase | None
    source: Source

    @property
    def model(self) -> PreTrainedModel:
        """Without weights in its blocks."""
        return self.blocks.model

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        return required(self.tokenizer, self.source)


def stream(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | None = None,
    head: bool = True,
) -> StreamedCheckpoint:
    """Open a model without loading it: memory holds one block of weights at a time.

    Raises what `ghostssm.load` raises; NaN and Inf are found when a block is read.

    Args:
        spec: a hub id, a local folder in any dialect, or ``reference``.
        dtype: of the weights in memory; None keeps the stored one.
        device: where a block goes, such as ``cpu`` or ``cuda``.
        tokenizer: a folder or hub id to take the tokenizer from instead.
        head: whether what comes after the blocks is wanted too, for logits.
    """
    check_device(device)
    source = find_source(spec)
    blocks = open_blocks(source, dtype, device, head)
    if (generation := read_generation_config(source.folder)) is not None:
        blocks.model.generation_config = generation
    return StreamedCheckpoint(blocks, load_tokenizer(source, blocks.model.config, tokenizer), source)


def open_blocks(
    source: Source, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", head: bool = True
) -> StreamedBlocks:
    """The blocks of a model, without its tokenizer; otherwise as `stream`."""
    config = model_config(source)
    blocks = StreamedBlocks(source, config, checked_tensors(source, config), dtype, torch.device(device))
    blocks.fill_outside(head)
    return blocks


class StreamedBlocks:
    """The blocks of a model in files (`ghostssm.calibration.blocks.Blocks`).

    Attributes:
        model: with parameters on the meta device, but for those that `fill_outside` read.
        modules: its blocks, without weights. names: of them, in the model.
        source: where the files are.
    """

    def __init__(
        self,
        source: Source,
        config: PreTrainedConfig,
        stored: dict[str, StoredTensor],
        dtype: torch.dtype | None,
        device: torch.device,
    ):
        self.source, self._stored, self.device = source, stored, device
        self._dtype = dtype or stored_dtype(stored)
        self.model = without_weights(config, self._dtype)
        if dtype is None:
            tell_narrowed(self.model, stored, source)
        self.modules: Sequence[nn.Module] = family_of(config).blocks(self.model)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.names = [names[id(module)] for module in self.modules]
        self._expected = list(self.model.state_dict())
        self._places = places_of_parameters(self.model, stored)
        note_layout(self.model, stored)
        self._tied = self._resolved_ties()

    @contextmanager
    def opened(self, index: int) -> Iterator[nn.Module]:
        name, idle = self.names[index], self.modules[index]
        block = copy.deepcopy(idle)
        self.model.set_submodule(name, block)
        try:
            self._fill(self._names_below(name))
            yield block.to(self.device)
        finally:
            self.model.set_submodule(name, idle)

    @contextmanager
    def runnable(self) -> Iterator[None]:
        for module in self.modules:
            module.__dict__["forward"] = partial(_run_on_zeros, module, self.device)
        try:
            yield
        finally:
            for module in self.modules:
                module.__dict__.pop("forward")

    def outside(self) -> list[str]:
        """The names of the parameters and buffers outside the blocks, without second names of the same tensor."""
        below = {name for block in self.names for name in self._names_below(block)}
        return [name for name in self._expected if name not in below and name not in tied_weights(self.model)]

    def fill_outside(self, head: bool) -> None:
        """Read what stands outside the blocks; the output head only if it is wanted, or is the embedding as well."""
        first, last = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        unwanted = set() if head else set(map(id, last.parameters())) - set(map(id, first.parameters()))
        wanted = [name for name in self.outside() if id(self.model.get_parameter_or_buffer(name)) not in unwanted]
        self._fill(wanted)
        for name in wanted:
            _put(self.model, name, self.model.get_parameter_or_buffer(name).to(self.device))
        for name, source in tied_weights(self.model).items():
            if source in wanted:
                _put(self.model, name, self.model.get_parameter_or_buffer(source))
        for name, buffer in list(self.model.named_buffers()):
            if not any(name.startswith(f"{block}.") for block in self.names):
                _put(self.model, name, buffer.to(self.device))

    def tensor_outside(self, name: str) -> Tensor:
        """One tensor outside the blocks."""
        idle = self.model.get_parameter_or_buffer(name)
        self._fill([name])
        filled: Tensor = self.model.get_parameter_or_buffer(name)
        _put(self.model, name, idle)
        return filled.detach()

    def tensors_of(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """The tensors of an opened block, whatever was done to it, by their names in the model.

        Tensors that another block has too are left to that one.
        """
        prefix, ties = self.names[index], tied_weights(self.model)
        named = {f"{prefix}.{name}": value for name, value in block.state_dict().items()}
        return {name: value for name, value in named.items() if name not in ties}

    def _names_below(self, block: str) -> list[str]:
        return [name for name in self._expected if name.startswith(f"{block}.")]

    def _resolved_ties(self) -> dict[str, str]:
        """From a tied parameter that is not stored to the one that is stored in its place.

        As in transformers, two that are both stored with different values are not tied.
        """
        ties = tied_weights(self.model)
        stored_for: dict[str, str] = {}
        for name in with_values_of_their_own(self.model, self._stored, self._dtype):
            ties.pop(name)
        settle_ties(self.model)
        for name, source in ties.items():
            if name in self._places and source not in self._places:
                stored_for[source] = name
            elif source in self._places and name not in self._places:
                stored_for[name] = source
        for name, source in ties.items():
            if name not in self._places and source in stored_for:
                stored_for[name] = stored_for[source]
        return stored_for

    def _read(self, name: str) -> Tensor:
        """The stored tensor of a parameter that has one of its own."""
        (stored,) = self._places[name]
        return self._stored[stored].read()

    def _fill(self, names: Iterable[str]) -> None:
        """Put tensors from the files into the model."""
        wanted = list(names)
        tensors: dict[str, Tensor] = {}
        for name in wanted:
            if name in self._tied:
                tensors[name] = self._read(self._tied[name])
            else:
                tensors |= {stored: self._stored[stored].read() for stored in self._places.get(name, ())}
        load_tensors(self.model, tensors, self._dtype)
        filled = {name: self.model.get_parameter_or_buffer(name) for name in wanted}
        assert not any(value.is_meta for value in filled.values())  # names and shapes were checked before
        check_finite(filled, self.source, self._stored)


def _run_on_zeros(module: nn.Module, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """A forward pass of a module without weights, as if they were zeros."""
    run = copy.deepcopy(module)
    run.__dict__.pop("forward")
    for part in run.modules():
        for name, parameter in part.named_parameters(recurse=False):
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            part.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    return run.to(device)(*args, **kwargs)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter or buffer in the place of the one that has its name."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in module._buffers:
        module._buffers[last] = value
    elif isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        module.register_parameter(last, nn.Parameter(value, requires_grad=value.is_floating_point()))

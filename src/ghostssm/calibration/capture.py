"""What a model's own forward pass calls its blocks and mixers with.

The masks, rotary tables and whatever else a block takes besides the hidden states differ from family to family and from
block to block of a hybrid. So none of it is rebuilt: the model runs, with blocks that hand the hidden states on as they
are, and each of them notes its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from ghostssm.calibration.blocks import Blocks
from ghostssm.calibration.scratch import Scratch
from ghostssm.text.windows import Windows

_SHAPE_TOKENS = 2
"""Tokens of the first window that run through the real blocks, to see what their outputs look like."""
_LARGE_BYTES = 1 << 16
"""Arguments of at least so many bytes are kept in the scratch room."""


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs)


class _Captured(Exception):
    """Raised inside a forward pass to leave it once the wanted hidden states are in hand."""


def block_calls(
    blocks: Blocks, windows: Windows, dtype: torch.dtype, scratch: Scratch
) -> tuple[Tensor, list[list[Call]]]:
    """The hidden states that reach the first block, and every block's further arguments.

    Args:
        dtype: to convert floating-point tensors to.
        scratch: the room for the hidden states and the largest arguments.

    Returns:
        (count, l, hidden_size), and for every batch of the windows one call per block. A tensor that several blocks
        get, or that is the same for several batches, is kept once.
    """
    batches, kept_before = [], list[Tensor]()
    hidden: Tensor | None = None
    with torch.inference_mode():
        rests = outputs_besides_hidden(blocks, windows)
        for number, span in enumerate(windows.batches(blocks.device)):
            seen: list[tuple[Tensor, Call]] = []

            def noted(states: Tensor, call: Call, seen: list[tuple[Tensor, Call]] = seen) -> Tensor:
                seen.append((states, call))
                if len(seen) == len(blocks.modules):
                    raise _Captured  # what follows, up to the logits, is not wanted
                return states

            with _replaced_blocks(blocks.modules, rests, noted), suppress(_Captured):
                blocks.model(input_ids=windows.ids[span].to(blocks.device), use_cache=False)
            kept = _Kept(dtype, kept_before, partial(_kept_large, scratch, f"batch {number}"))
            # `seen` holds on to the tensors, so that their identities stay unique.
            batches.append([call.map(kept) for _, call in seen])
            kept_before = kept_before or list(kept.by_identity.values())
            first = seen[0][0]
            if hidden is None:
                hidden = scratch.empty((len(windows), *first.shape[1:]), dtype, first.device)
            hidden[span] = first
    assert hidden is not None  # windows are never empty
    return hidden, batches


def outputs_besides_hidden(blocks: Blocks, windows: Windows) -> list[tuple[Any, ...] | None]:
    """What every block returns after the hidden states; None where it returns these alone, not in a tuple."""
    rests: list[tuple[Any, ...] | None] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        rests.append(output[1:] if isinstance(output, tuple) else None)
        if len(rests) == len(blocks.modules):
            raise _Captured

    handles = [block.register_forward_hook(hook) for block in blocks.modules]
    try:
        with torch.inference_mode(), blocks.runnable(), suppress(_Captured):
            blocks.model(input_ids=windows.ids[:1, :_SHAPE_TOKENS].to(blocks.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rests


def logits_after(blocks: Blocks, rests: Sequence[tuple[Any, ...] | None], hidden: Tensor, ids: Tensor) -> Tensor:
    """What the model makes of hidden states after its last block: logits, (b, l, vocab).

    Args:
        rests: from `outputs_besides_hidden`. hidden: (b, l, hidden_size). ids: (b, l), of any tokens.
    """
    with torch.inference_mode(), _replaced_blocks(blocks.modules, rests, lambda _, __: hidden):
        logits: Tensor = blocks.model(input_ids=ids, return_dict=True, use_cache=False).logits
        return logits


def captured_output(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Call ``run`` until ``module`` is done, and return the hidden states that the module gives."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        raise _Captured(output[0] if isinstance(output, tuple) else output)

    return _captured(module, module.register_forward_hook(hook), run)


def captured_input(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Call ``run`` until it calls ``module``, and return the hidden states that the module gets."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(_hidden_and_rest(args, kwargs)[0])

    return _captured(module, module.register_forward_pre_hook(hook, with_kwargs=True), run)


def _captured(module: nn.Module, hook: RemovableHandle, run: Callable[[], Any]) -> Tensor:
    """Call ``run`` until a module's hook raises `_Captured`, and return what that holds."""
    try:
        with torch.inference_mode():
            run()
    except _Captured as captured:
        hidden: Tensor = captured.args[0]
        return hidden
    finally:
        hook.remove()
    raise RuntimeError(f"{type(module).__name__} was never called, so its hidden states could not be captured.")


def _hidden_and_rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


@contextmanager
def _replaced_blocks(
    modules: Sequence[nn.Module], rests: Sequence[tuple[Any, ...] | None], answer: Callable[[Tensor, Call], Tensor]
) -> Iterator[None]:
    """Within the context every block does nothing but return ``answer(hidden states, call)``."""

    def forward(rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        hidden = answer(*_hidden_and_rest(args, kwargs))
        return hidden if rest is None else (hidden, *rest)

    before = [block.__dict__.get("forward") for block in modules]
    try:
        for block, rest in zip(modules, rests, strict=True):
            block.__dict__["forward"] = partial(forward, rest)
        yield
    finally:
        for block, own in zip(modules, before, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


class _Kept:
    """Gives the tensor to keep for one that a block got: itself, or an equal one of an earlier batch."""

    def __init__(self, dtype: torch.dtype, before: Sequence[Tensor], store: Callable[[int, Tensor], Tensor]):
        self._dtype, self._before, self._store = dtype, before, store
        self.by_identity: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.by_identity:
            converted = tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            equal = (k for k in self._before if k.dtype == converted.dtype and torch.equal(k, converted.to(k.device)))
            known = next(equal, None)
            self.by_identity[id(tensor)] = self._store(len(self.by_identity), converted) if known is None else known
        return self.by_identity[id(tensor)]


def _kept_large(scratch: Scratch, batch: str, number: int, tensor: Tensor) -> Tensor:
    """The tensor as it is kept: a large one in the scratch room."""
    large = tensor.numel() * tensor.element_size() >= _LARGE_BYTES
    return scratch.keep(f"{batch}, argument {number}", tensor) if large else tensor

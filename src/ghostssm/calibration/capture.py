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
from transformers import PreTrainedModel

from ghostssm.data.windows import Windows

_SHAPE_TOKENS = 2
"""Of the first window, so many tokens run through the real blocks, to see what their outputs look like."""


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
    """Raised inside a forward pass to leave it once the wanted inputs are in hand."""


def block_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], windows: Windows, dtype: torch.dtype
) -> tuple[Tensor, list[list[Call]]]:
    """The hidden states that reach the first block, and every block's further arguments.

    Args:
        dtype: to convert floating-point tensors to.

    Returns:
        (count, l, hidden_size), and for every batch of the windows one call per block. A tensor that several blocks
        get, or that is the same for several batches, is kept once.
    """
    batches, kept_before = [], list[Tensor]()
    hidden: Tensor | None = None
    with torch.inference_mode():
        rests = _outputs_besides_hidden(model, blocks, windows.ids[:1, :_SHAPE_TOKENS].to(model.device))
        for span in windows.batches(model.device):
            seen: list[tuple[Tensor, Call]] = []
            with _passed_through(blocks, rests, seen), suppress(_Captured):
                model(input_ids=windows.ids[span].to(model.device), use_cache=False)
            kept: dict[int, Tensor] = {}
            # `seen` holds on to the tensors, so that their identities stay unique.
            batches.append([call.map(partial(_kept, kept, kept_before, dtype)) for _, call in seen])
            kept_before = kept_before or list(kept.values())
            first = seen[0][0]
            if hidden is None:
                hidden = first.new_empty(len(windows), *first.shape[1:], dtype=dtype)
            hidden[span] = first
    assert hidden is not None  # windows are never empty
    return hidden, batches


def captured_input(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Call ``run`` until it calls ``module``, and return the hidden states that that one gets."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_hidden_and_rest(args, kwargs)[0])
        raise _Captured

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.inference_mode():
            run()
    except _Captured:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(module).__name__} was never called, so its inputs could not be captured.")


def _hidden_and_rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _outputs_besides_hidden(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> list[tuple[Any, ...] | None]:
    """What every block returns after the hidden states; None where it returns these alone, not in a tuple."""
    rests: list[tuple[Any, ...] | None] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        rests.append(output[1:] if isinstance(output, tuple) else None)

    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return rests


@contextmanager
def _passed_through(
    blocks: Sequence[nn.Module], rests: Sequence[tuple[Any, ...] | None], seen: list[tuple[Tensor, Call]]
) -> Iterator[None]:
    """Within the context, blocks return the hidden states that they get, and note what they were called with.

    The last one leaves the model's forward pass, so that no logits are computed.
    """

    def forward(rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _hidden_and_rest(args, kwargs)
        seen.append((hidden, call))
        if len(seen) == len(blocks):
            raise _Captured
        return hidden if rest is None else (hidden, *rest)

    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, rest in zip(blocks, rests, strict=True):
            block.__dict__["forward"] = partial(forward, rest)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


def _kept(kept: dict[int, Tensor], before: Sequence[Tensor], dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """The tensor to keep for one that a block got: known by its identity, or equal to one of an earlier batch."""
    if id(tensor) not in kept:
        converted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        equal = (known for known in before if known.dtype == converted.dtype and torch.equal(known, converted))
        kept[id(tensor)] = next(equal, converted)
    return kept[id(tensor)]

"""The recurrence over a state that is stored rounded: after every token, or once after a prompt.

A decode step is a scan of one token. Shape letters as in `ghostssm.ops.ssd`, formats as in `ghostssm.ops.state_format`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.ops import compiled, gpu
from ghostssm.ops.ssd import ssd, ssd_step
from ghostssm.ops.state_format import FLOAT16, FP8, INT8, StateFormat, StateStorage, TieredFormat, dequantise, quantise

_LONGEST_ROW = 256
"""Numbers in a row of a state in half precision, at most, for the compiled loop."""
_TASKS_PER_THREAD = 8
"""Pieces of a step, so many that all threads are done at about the same time."""


def stored_scan_reference(
    stored: Tensor, storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition: arguments as `stored_scan_` has them; y and the stored state after the last token."""
    outputs = []
    for t in range(x.shape[1]):
        state = dequantise(stored, storage.format, x.shape[3], B.shape[3]).to(x.dtype)
        y, state = _step(storage.format, state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        stored = quantise(state, replace(storage, token=storage.token + t))
        outputs.append(y)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), stored


def _step(form: StateFormat, state: Tensor, *streams: Tensor) -> tuple[Tensor, Tensor]:
    """`ghostssm.ops.ssd.ssd_step`; a head in tiers neither writes nor reads the channels that it does not store."""
    if not isinstance(form, TieredFormat) or form.tiers is None:
        return ssd_step(state, *streams)
    x, dt, A, B, C, D = streams
    stored = torch.tensor([wide + narrow for wide, narrow in form.tiers], device=B.device)
    kept = torch.arange(B.shape[2], device=B.device) < stored[:, None]  # (h, n)
    heads_per_group = x.shape[1] // B.shape[1]
    B, C = (part.repeat_interleave(heads_per_group, dim=1) * kept for part in (B, C))
    return ssd_step(state, x, dt, A, B, C, D)


def stored_scan_(
    stored: Tensor, storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Token by token, in place; every token's y is of the state before it is rounded.

    Args:
        stored: as `ghostssm.ops.state_format.quantise` gives it, contiguous; updated.
        storage: ``token`` is how many tokens the sequences had before.
        x: (b, l, h, p). dt: (b, l, h), after softplus. A: (h,), negative. B, C: (b, l, g, n). D: (h,). All float32.

    Returns:
        y: (b, l, h, p), float32.
    """
    if gpu.usable_in_float32(x, dt, A, B, C, D) and stored.is_contiguous():
        fused: Tensor = gpu.kernels("stored").stored_scan_(stored, storage, x, dt, A, B, C, D)
        return fused
    form = storage.format
    if not compiled.usable(x, dt, A, B, C, D) or not stored.is_contiguous() or not _compiles(form, B.shape[3]):
        y, after = stored_scan_reference(stored, storage, x, dt, A, B, C, D)
        stored.copy_(after)
        return y
    y = torch.empty(x.shape, dtype=x.dtype)
    (_scan_channels if form.scaled else _scan_rows)(stored, storage, x, dt, A, B, C, D, y)
    return y


def _compiles(form: StateFormat, n: int) -> bool:
    """Whether there is a loop for a format and a state size.

    Two rows in half precision have to fit the registers; those of int8 and narrower are kept in memory.
    """
    if form in (FLOAT16, FP8) and not compiled.lane_codes.converts_halves():
        return False
    return form.scaled or n <= _LONGEST_ROW


def _scan_channels(stored: Tensor, storage: StateStorage, *streams: Tensor) -> None:
    """The compiled loop for codes."""
    form, (b, _, heads, p), n = storage.format, streams[0].shape, streams[3].shape[3]
    tasks = min(b * heads, _TASKS_PER_THREAD * torch.get_num_threads())
    kind = FP8.kind if form == FP8 else INT8.kind
    loop = compiled.channel_kernels.channel_scan(kind, p % compiled.channel_kernels.ROWS, storage.stochastic)
    flat = stored.flatten(1)
    memory = compiled.arrays(flat.view(torch.int8), flat.view(torch.float32))
    loop(tasks, *memory, _places(form, heads, p, n), *_drawn(storage), *compiled.arrays(*streams))


@cache
def _places(form: StateFormat, heads: int, p: int, n: int) -> np.ndarray:
    """Where each head's codes and peaks begin, in numbers of theirs, and its channels in 8 and in 4 bits: (4, h)."""
    codes, peaks = form.places(heads, p, n)
    return np.array([codes, [place // 4 for place in peaks], *zip(*form.tiers_of(heads, n), strict=True)])


def _scan_rows(stored: Tensor, storage: StateStorage, *streams: Tensor) -> None:
    """The compiled loop for bfloat16 and float16, which is made for the size of the state."""
    x, dt, A, B, C, D, y = streams
    n, padding = B.shape[3], (0, compiled.row_kernels.lanes_of(B.shape[3]) - B.shape[3])
    memory = compiled.arrays(stored.flatten(2).view(torch.int16))
    padded = compiled.arrays(x, dt, A, F.pad(B, padding), F.pad(C, padding), D, y)
    compiled.row_kernels.half_scan(storage.format.kind, n, storage.stochastic)(*memory, *_drawn(storage), *padded)


def _drawn(storage: StateStorage) -> tuple[int, ...]:
    """What random numbers depend on."""
    if not storage.stochastic:
        return 0, 0, 0
    return storage.key, storage.sequence, storage.token


def ssd_stored(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    stored: Tensor | None,
    storage: StateStorage,
    *,
    every_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, from a stored state, which is left as it was, or None for zeros.

    Args:
        every_token: round the state after every token, else after the last, as engines prefill a prompt.

    Returns:
        y (b, l, h, p) and the stored state.
    """
    b, length, h, p = x.shape
    n = B.shape[3]
    if every_token and storage.rounds:
        if stored is None:
            stored = quantise(x.new_zeros(b, h, p, n), storage)
        stored = stored.clone(memory_format=torch.contiguous_format)
        return stored_scan_(stored, storage, x, dt, A, B, C, D), stored
    state = None if stored is None else dequantise(stored, storage.format, p, n)
    y, final = ssd(x, dt, A, B, C, D, state)
    return y, quantise(final, replace(storage, token=storage.token + max(0, length - 1)))

"""The recurrence over a state that is stored rounded: after every token, or once after a prompt.

A decode step is a scan of one token. Shape letters as in `ghostssm.ops.ssd`, formats as in `ghostssm.ops.state_format`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostssm.ops import compiled, gpu
from ghostssm.ops.ssd import ssd, ssd_step
from ghostssm.ops.state_format import StateFormat, StateStorage, TieredFormat, dequantise, quantise


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
    if not compiled.usable(x, dt, A, B, C, D) or not stored.is_contiguous():
        y, after = stored_scan_reference(stored, storage, x, dt, A, B, C, D)
        stored.copy_(after)
        return y
    form, y = storage.format, torch.empty(x.shape, dtype=x.dtype)
    if isinstance(form, TieredFormat):
        _scan_tiers(stored, form, storage, x, dt, A, B, C, D, y)
    elif not storage.stochastic and B.shape[3] <= compiled.row_kernels.LARGEST_SIZE:
        _scan_rows(stored, form, x, dt, A, B, C, D, y)
    else:
        _scan(stored, storage, x, dt, A, B, C, D, y)
    return y


def _scan(stored: Tensor, storage: StateStorage, *streams: Tensor) -> None:
    """The compiled loop for every format but tiers."""
    form, heads = storage.format, stored.flatten(2)
    p, n = streams[0].shape[3], streams[3].shape[3]
    unused = torch.zeros(1, 1, 1).expand(*heads.shape[:2], 1)
    codes = heads.view(torch.int8)
    halves = unused.to(torch.int16) if form.scaled else heads.view(torch.int16)
    scales = heads.view(torch.float32) if form.scaled else unused
    compiled.rounding_kernels.stored_scan(
        *compiled.arrays(codes, halves, scales),
        form.row_bytes(n),
        form.code_bytes(p, n) // 4,
        form.kind,
        np.float32(form.largest or 0),
        *_drawn(storage),
        *compiled.arrays(*streams),
    )


def _scan_rows(
    stored: Tensor, form: StateFormat, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, y: Tensor
) -> None:
    """Those that round to the nearest, which are made for the format and the size of the state."""
    n = B.shape[3]
    padding = (0, compiled.row_kernels.lanes_of(n) - n)
    streams = compiled.arrays(x, dt, A, F.pad(B, padding), F.pad(C, padding), D, y)
    if not form.scaled:
        compiled.row_kernels.half_scan(form.kind, n)(*compiled.arrays(stored.flatten(2).view(torch.int16)), *streams)
        return
    memory = compiled.arrays(stored.view(torch.int8), stored.view(torch.float32))
    compiled.row_kernels.scaled_scan(form.kind, n)(*memory, form.code_bytes(x.shape[3], n) // 4, *streams)


def _scan_tiers(stored: Tensor, form: TieredFormat, storage: StateStorage, *streams: Tensor) -> None:
    first_codes, first_scales, _ = form.places(streams[0].shape[3])
    places = (np.array(first_codes), np.array(first_scales) // 4, *np.array(form.tiers, dtype=np.int64).T.copy())
    memory = compiled.arrays(stored.view(torch.int8), stored.view(torch.float32))
    compiled.rounding_kernels.tiered_scan(*memory, *places, *_drawn(storage), *compiled.arrays(*streams))


def _drawn(storage: StateStorage) -> tuple[object, ...]:
    return storage.stochastic, storage.key, storage.sequence, storage.token


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

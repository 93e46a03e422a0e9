"""The scan over a state that is rounded after every token, with gradients that take the rounding for the identity.

What the state holds is rounded in the gradients too: those of C and of the decay are products with it. Only the
derivative of the rounding itself, which is zero wherever it exists, is replaced by one (the straight-through estimator:
Bengio, Léonard & Courville 2013).

Shape letters as in `ghostssm.ops.ssd`, formats as in `ghostssm.ops.state_format`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghostssm.ops import compiled
from ghostssm.ops.ssd import gradient_parts, ssd_step
from ghostssm.ops.state_format import StateStorage, dequantise, quantise
from ghostssm.ops.stored import stored_scan_


def straight_through_scan_reference(
    storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The definition, by autograd, which keeps the state of every token. Same signature as `straight_through_scan`."""
    b, length, h, p = x.shape
    n = B.shape[3]
    state, outputs = x.new_zeros(b, h, p, n), []
    for t in range(length):
        y, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        stored = quantise(state.detach(), replace(storage, token=storage.token + t))
        rounded = dequantise(stored, storage.format, p, n).to(state)
        state = state + (rounded - state).detach()
        outputs.append(y)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)


def straight_through_scan(
    storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """What `ghostssm.ops.stored.ssd_stored` gives, rounded after every token, from a state of zeros; differentiable.

    On a CPU it is a compiled loop, which keeps nothing but the arguments. Elsewhere autograd keeps the state of every
    token.

    Args:
        storage: of any format but float32, which is not rounded, and tiers.
        x: (b, l, h, p), float32 or float64. dt: (b, l, h), after softplus and limits. A: (h,), negative.
        B, C: (b, l, g, n). D: (h,).

    Returns:
        y: (b, l, h, p).
    """
    streams = (x, dt, A, B, C, D)
    if x.dtype != torch.float32 or not compiled.differentiable(*streams):
        return straight_through_scan_reference(storage, *streams)
    y: Tensor = _StraightThroughScan.apply(storage, *streams)  # type: ignore[no-untyped-call]
    return y


class _StraightThroughScan(torch.autograd.Function):
    """The compiled loop that decoding runs too, and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, storage: StateStorage, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        ctx.storage = storage
        ctx.save_for_backward(x, dt, A, B, C, D)
        (b, _, h, p), n = x.shape, B.shape[3]
        return stored_scan_(quantise(x.new_zeros(b, h, p, n), storage), storage, x, dt, A, B, C, D.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        storage, (x, dt, A, B, C, D) = ctx.storage, ctx.saved_tensors
        (b, length, h, _), (groups, n) = x.shape, B.shape[2:]
        dx, ddt = torch.empty(x.shape), torch.zeros(dt.shape)
        dA, dD = torch.zeros(2, b, h, dtype=torch.float64)
        dB, dC = torch.zeros(2, b, groups, gradient_parts(b, h, groups), length, n)
        form, kernels = storage.format, compiled.straight_through_kernels
        scratch = torch.get_num_threads(), length + 1, kernels.ROWS
        codes = torch.zeros(*scratch, form.row_bytes(n) if form.scaled else 0, dtype=torch.int8)
        halves = torch.zeros(*scratch, 0 if form.scaled else n, dtype=torch.int16)
        work = torch.empty(scratch[0], kernels.ROWS + 1, n)
        compiled.in_threads(
            kernels.straight_through_backward,
            scratch[0],
            *(codes, halves, torch.zeros(scratch), work),
            (form.kind, np.float32(form.largest or 0), storage.stochastic),
            *(storage.key, storage.sequence, storage.token),
            *(x, dt, A, B, C, D.clone(), dy, dx, ddt, dA, dB, dC, dD),
        )
        dB, dC = (part.sum(2).transpose(1, 2) for part in (dB, dC))
        return None, dx, ddt, dA.sum(0).to(A), dB, dC, dD.sum(0).to(D)

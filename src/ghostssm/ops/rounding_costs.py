"""What state channels are worth and what rounding them costs: the evidence by which bits are divided.

A change of y at token t has the cost w_t times its square. Channel n of a head then costs, summed over tokens and rows,

    left out:     w_t C_t[n]^2 H_t[n]^2
    rounded:      d_t^2 / 12 * L_t[n],      L_t[n] = a_{t+1}^2 (L_{t+1}[n] + w_{t+1} C_{t+1}[n]^2)

The second is what rounding errors after every token add, each of variance d^2 / 12 for levels d apart: an error decays
as the state does and is read by all later tokens. L is the observability Gramian of the channel. d is the largest
magnitude of its row here; levels that are finer by a factor cost its square less.

Shape letters as in `ghostssm.ops.ssd`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostssm.ops import compiled
from ghostssm.ops.ssd import ssd_step


def rounding_costs_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. Same signature as `rounding_costs`."""
    b, length, h, p = x.shape
    read = C.square().repeat_interleave(h // C.shape[2], dim=2)  # (b, l, h, n)
    state, peaks = x.new_zeros(b, h, p, B.shape[3]), []
    left_out = x.new_zeros(h, B.shape[3], dtype=torch.float64)
    rounded = torch.zeros_like(left_out)
    for t in range(length):
        _, state = ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t])
        peaks.append(state.abs().amax(-1).square())
        energy = (state.square() * weight[:, t, ..., None]).sum(2)
        left_out += (energy * read[:, t]).sum(0)
    later = torch.zeros_like(state)
    for t in reversed(range(1, length)):
        decay = torch.exp(2 * dt[:, t] * A)[..., None, None]
        later = decay * (later + weight[:, t, ..., None] * read[:, t, :, None])
        rounded += (later * peaks[t - 1][..., None]).sum((0, 2))
    return left_out, rounded / 12


def rounding_costs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both costs of each channel of each head, in the fastest form at hand: a compiled loop on a CPU.

    Args:
        x: (b, l, h, p), float32 or float64. dt: (b, l, h), after softplus and limits. A: (h,), negative.
        B, C: (b, l, g, n). weight: (b, l, h, p), what the square of a change of y costs.

    Returns:
        left out and rounded, (h, n), float64, summed over sequences, tokens and rows, from a state of zeros.
    """
    if not compiled.usable(x, dt, A, B, C, weight):
        return rounding_costs_reference(x, dt, A, B, C, weight)
    b, _, h, p = x.shape
    left_out, rounded = torch.zeros(2, b, h, compiled.kernels.row_blocks(p), B.shape[3], dtype=torch.float64)
    loop, pieces = compiled.kernels.rounding_costs, left_out[..., 0].numel()
    compiled.in_threads(loop, pieces, x, dt, A, B, C, weight, left_out, rounded)
    return left_out.sum((0, 2)), rounded.sum((0, 2)) / 12

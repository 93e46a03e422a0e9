"""Whether compiled loops may serve a call, and how tensors reach them.

They need numba (extra ``cpu``) and float32 tensors on the CPU; most of them have no backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

kernels: Any
"""The module of compiled loops, or None."""
backward_kernels: Any
"""That of the backward pass."""
rounding_kernels: Any
"""That of states in fewer bits."""
try:
    from ghostssm.ops import _kernels, _kernels_backward, _rounding_kernels

    kernels, backward_kernels, rounding_kernels = _kernels, _kernels_backward, _rounding_kernels
except ImportError:  # numba is an extra
    kernels = backward_kernels = rounding_kernels = None

HAS_KERNELS = kernels is not None


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether loops that have a backward pass can take these tensors: all float32 or all float64, on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    if kernels is None or dtype not in (torch.float32, torch.float64):
        return False
    return all(t.dtype == dtype and t.device.type == "cpu" for t in given) and not torch.compiler.is_compiling()


def usable(*tensors: Tensor | None) -> bool:
    """Whether loops without a backward pass can take these tensors: float32, and no gradient to record."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].dtype != torch.float32 or not differentiable(*given):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def arrays(*tensors: Tensor) -> list[object]:
    """The tensors as contiguous numpy arrays, for loops that run on as many threads as torch uses.

    A contiguous tensor shares its memory with its array; another one is copied, so that the loops are compiled once and
    their inner ones run in vector lanes. Memory that numpy has seen can't be resized any more, as sharding does with
    weights: loops over whole sequences get copies of these.
    """
    threads = torch.get_num_threads()
    kernels.use_threads(threads)
    if torch.get_num_threads() != threads:  # numba has just started its pool, which sets OpenMP's number for everyone
        torch.set_num_threads(threads)
    return [tensor.detach().contiguous().numpy() for tensor in tensors]

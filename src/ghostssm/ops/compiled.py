"""Whether compiled loops may serve a call, and how tensors reach them.

They need numba (extra ``cpu``) and float32 tensors on the CPU; most of them have no backward pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class _Loops:
    """A module of compiled loops, imported with the first one that is called: numba takes half a second."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


HAS_KERNELS = importlib.util.find_spec("numba") is not None
kernels: Any = _Loops("ghostssm.ops._kernels") if HAS_KERNELS else None
"""The compiled loops, or None: numba is an extra."""
backward_kernels = _Loops("ghostssm.ops._kernels_backward")
"""Those of the backward pass, if there are kernels."""
channel_kernels = _Loops("ghostssm.ops._channel_kernels")
"""Those of states in codes, if there are kernels."""
row_kernels = _Loops("ghostssm.ops._row_kernels")
"""Those of states in half precision, if there are kernels."""
lane_codes = _Loops("ghostssm.ops._lane_codes")
"""What these two are made of, if there are kernels."""
straight_through_kernels = _Loops("ghostssm.ops._kernels_straight_through")
"""Those of the backward pass through states that are rounded, if there are kernels."""


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
    return [_array(tensor) for tensor in tensors]


def _array(part: object) -> object:
    return part.detach().contiguous().numpy() if isinstance(part, Tensor) else part


def in_threads(loop: Any, pieces: int, *arguments: object) -> None:
    """Call ``loop(first, last, *arguments)`` for all pieces of its work, on as many threads as torch uses.

    Tensors become arrays as `arrays` makes them. For loops of milliseconds: numba takes half as long to compile one
    that it need not split itself, and to start a thread costs less than a tenth of a millisecond.
    """
    arguments = tuple(map(_array, arguments))
    threads = min(torch.get_num_threads(), pieces)
    if threads < 2:
        loop(0, pieces, *arguments)
        return
    spans = itertools.pairwise(pieces * thread // threads for thread in range(threads + 1))
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, first, last, *arguments) for first, last in spans]:
            done.result()

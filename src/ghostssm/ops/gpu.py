"""Whether Triton kernels may serve a call.

They need triton, which PyTorch's CUDA builds bring along, tensors on a CUDA device in float32 or half precision, and
no gradient to record, but for the scan's. They are imported when first needed: triton takes a second to load, and reads
then whether ``TRITON_INTERPRET=1`` asks for its interpreter, in which the tests run the kernels on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

device_types = {"cuda"}
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_MOST_PROGRAMS = 65535
"""Along a grid's second axis, where the batch is."""


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels(of: Literal["step", "norm", "scan", "stored", "chunks"]) -> Any:
    """The module ``_triton_step``, or what else they are of."""
    return importlib.import_module(f"ghostssm.ops._triton_{of}")


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether kernels that have a backward pass can take these tensors; the first one's first axis is the batch."""
    given = [tensor for tensor in tensors if tensor is not None]
    first = given[0]
    if first.device.type not in device_types or not has_triton():
        return False
    if first.numel() == 0 or first.shape[0] > _MOST_PROGRAMS:
        return False
    if any(t.device != first.device or t.dtype not in _DTYPES for t in given):
        return False
    return not torch.compiler.is_compiling()


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels without a backward pass can take these tensors: no gradient is to be recorded."""
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not asked and differentiable(*tensors)


def usable_in_float32(*tensors: Tensor | None) -> bool:
    """Whether kernels that want float32 can take these tensors."""
    return all(t is None or t.dtype == torch.float32 for t in tensors) and usable(*tensors)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within the context kernels run where the tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def generation(tensor: Tensor) -> tuple[str, int]:
    """Of the GPU that a tensor is on: "cuda" or AMD's "hip", and the first number of its compute capability.

    In the interpreter a Hopper's, ("cuda", 9).
    """
    if not tensor.is_cuda:
        return "cuda", 9
    return "hip" if torch.version.hip else "cuda", torch.cuda.get_device_capability(tensor.device)[0]

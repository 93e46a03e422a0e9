"""The processes that share a run: their windows, sums and decisions.

``torchrun`` starts them and tells each its number by environment variables. Process 0 decides and writes. What is
summed in a fixed order (statistics, samples) is gathered window by window, so that the result does not depend on how
many processes there are; large sums (Gram matrices) are reduced, which can change their last digits.
"""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ghostssm.choices import processes_started
from ghostssm.errors import GhostError, InputError, ProcessError, first_line
from ghostssm.text.windows import Windows

T = TypeVar("T")
Ask = Callable[..., Any]

TIMEOUT = timedelta(minutes=30)
"""The longest that a process waits for another one: far more than process 0 needs to decide on a mixer."""
_POLL_SECONDS = 0.0005


class Processes:
    """This process and the others of its run; one process alone needs no communication.

    Attributes:
        rank: this process's number, from 0. size: how many there are. device: for tensors that come from others.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str | torch.device = "cpu"):
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @classmethod
    def join(cls, device: str | torch.device = "cpu", timeout: timedelta = TIMEOUT) -> Processes:
        """Connect to the other processes that torchrun started; without torchrun there is this one alone.

        Args:
            device: the run's; sums on a CUDA device are reduced there.

        Raises:
            InputError: WORLD_SIZE is no number. ProcessError: the others can't be reached.
        """
        size = processes_started()
        if size == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(f"The other processes of this run can't be reached: {_reason(error)}.") from error
        return cls(dist.get_rank(), size, device)

    def leave(self) -> None:
        """Disconnect from the others, at the end of a run that went well."""
        if self.size > 1:
            with suppress(RuntimeError):
                dist.destroy_process_group()

    def share(self, windows: Windows) -> tuple[int, Windows]:
        """This process's windows, whole batches of them, and the number of the first.

        Raises:
            InputError: there are fewer batches than processes.
        """
        batches = windows.batches(self.device)
        if len(batches) < self.size:
            raise InputError(
                f"{len(windows)} windows of {windows.length} tokens make {len(batches)} batches, too few for "
                f"{self.size} processes; take more windows, or fewer processes."
            )
        own = batches[len(batches) * self.rank // self.size : len(batches) * (self.rank + 1) // self.size]
        return own[0].start, windows.part(slice(own[0].start, own[-1].stop))

    def gather(self, values: Sequence[T]) -> list[T]:
        """The values of all processes, in their order, on all of them."""
        if self.size == 1:
            return list(values)
        packed = self._packed(list(values))
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _finished(lambda: dist.all_gather(sizes, torch.tensor([len(packed)]), async_op=True))
        largest = max(int(size) for size in sizes)
        parts = [torch.empty(largest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([packed, packed.new_zeros(largest - len(packed))])
        _finished(lambda: dist.all_gather(parts, padded, async_op=True))
        return [value for part, size in zip(parts, sizes, strict=True) for value in self._unpacked(part[: int(size)])]

    def broadcast(self, value: Any = None) -> Any:
        """The value that process 0 has."""
        if self.size == 1:
            return value
        packed = self._packed(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        head = torch.tensor([len(packed), _checksum(packed)])
        _finished(lambda: dist.broadcast(head, 0, async_op=True))
        size, checksum = head.tolist()
        if self.rank:
            packed = torch.empty(size, dtype=torch.uint8)
        _finished(lambda: dist.broadcast(packed, 0, async_op=True))
        if _checksum(packed) != checksum:  # gloo may call a broadcast finished though a process is gone
            raise ProcessError("Another process of this run ended, or can't be reached any more.")
        return value if self.rank == 0 else self._unpacked(packed)

    def from_first(self, work: Callable[[], T]) -> T:
        """Call a function on process 0 alone; every process returns its value or raises its GhostError."""
        if self.size == 1:
            return work()
        if self.rank:
            failed, outcome = self.broadcast()
            if failed:
                outcome.told = True
                raise outcome
            result: T = outcome
            return result
        try:
            result = work()
        except GhostError as error:
            self.broadcast((True, error))
            raise
        self.broadcast((False, result))
        return result

    def decide_once(self, decide: Callable[[Ask], T], answer: Ask) -> T:
        """Process 0 decides, and every process returns the decision. Its questions are answered over all windows.

        Args:
            decide: gets the function that asks; a question is a name and its arguments.
            answer: answers a question over all processes; each of them calls it at the same time.
        """
        if self.size == 1:
            return decide(answer)
        if self.rank:
            while (question := self.broadcast()) is not None:
                answer(*question)
            return self.from_first(partial(decide, answer))

        def ask(*question: Any) -> Any:
            self.broadcast(question)
            return answer(*question)

        def decided() -> T:
            try:
                return decide(ask)
            finally:
                self.broadcast()

        return self.from_first(decided)

    def add(self, *tensors: Tensor) -> None:
        """Sum tensors over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                _finished(partial(dist.all_reduce, tensor, async_op=True))

    @staticmethod
    def _packed(value: Any) -> Tensor:
        room = io.BytesIO()
        torch.save(value, room)
        return torch.frombuffer(room.getbuffer(), dtype=torch.uint8)

    def _unpacked(self, packed: Tensor) -> Any:
        """A value that another process of this run packed; any class may be in it, since it comes from no file."""
        return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location=self.device, weights_only=False)


def own_device(device: str) -> str:
    """This process's device: of several processes on one machine that use CUDA, each has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _checksum(packed: Tensor) -> int:
    return zlib.crc32(packed.numpy().tobytes())


def _finished(start: Callable[[], Any]) -> None:
    """Start a collective operation and wait for its end; signals are heard meanwhile."""
    try:
        work = start()
        while not work.is_completed():
            time.sleep(_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise ProcessError(f"Another process of this run ended, or can't be reached any more: {_reason(error)}.") from (
            error
        )


def _reason(error: Exception) -> str:
    return first_line(error)[:200].rstrip(".")

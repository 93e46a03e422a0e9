"""Student and teacher as the trainer sees them: one gives a loss, the other what to learn.

Both run our forward pass. On several processes FSDP2 shards them block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ghostssm.calibration.processes import Processes
from ghostssm.choices import Trained
from ghostssm.models.families import family_of, mixers_of
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.ops.state_format import StateStorage
from ghostssm.recovery.distill.loss import Readout, divergence, window_losses, without_head


@dataclass(frozen=True)
class Lesson:
    """What a teacher gives for a batch.

    Attributes:
        readout: its last hidden states (b, l, hidden_size) and its head.
        blocks: the hidden states after each block, if the student is to learn them too.
    """

    readout: Readout
    blocks: Sequence[Tensor] = ()


class Teacher(nn.Module):
    """The dense model: tokens (b, l) to a lesson."""

    def __init__(self, model: PreTrainedModel, student_device: torch.device, with_blocks: bool):
        super().__init__()
        self.model, self._device, self._with_blocks = model, student_device, with_blocks
        # In a tuple, so that it is no parameter of this module: sharded, it would have to be gathered for every use.
        self._head = (model.get_output_embeddings().weight.detach().to(student_device, copy=True),)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Lesson:
        with without_head(self.model):
            hidden, blocks = _hidden_states(self.model, ids.to(self.model.device), self._with_blocks)
        readout = Readout(hidden.to(self._device), self._head[0])
        return Lesson(readout, [block.to(self._device) for block in blocks])


class Student(nn.Module):
    """The pruned model in float32: tokens and a lesson to a loss.

    The loss is computed in here because the head's weight, if it is sharded, is gathered within this forward pass only.
    """

    def __init__(self, model: PreTrainedModel, hidden_weight: float):
        super().__init__()
        self.model, self._hidden_weight = model, hidden_weight

    def forward(self, ids: Tensor, lesson: Lesson, by_window: bool = False) -> Tensor:
        """The mean divergence and, weighted, the relative squared error of the hidden states; or `window_losses`."""
        with without_head(self.model) as head:
            hidden, blocks = _hidden_states(self.model, ids, self._hidden_weight > 0 and not by_window)
        readout = Readout(hidden, head)
        if by_window:
            return window_losses(readout, lesson.readout, ids)
        loss = divergence(readout, lesson.readout)
        for own, wanted in zip(blocks, lesson.blocks, strict=True):
            loss = loss + self._hidden_weight / len(blocks) * _relative_error(own, wanted)
        return loss


def _relative_error(own: Tensor, wanted: Tensor) -> Tensor:
    """The squared error of hidden states (b, l, hidden_size) as a share of their energy, in the mean of the windows.

    Of each window by itself, so that parts and processes that share a batch come to the same.
    """
    errors, energies = (each.float().square().sum((1, 2)) for each in (own - wanted, wanted))
    return (errors / energies).mean()


def _hidden_states(model: PreTrainedModel, ids: Tensor, with_blocks: bool) -> tuple[Tensor, list[Tensor]]:
    """What a model without a head gives, and the hidden states after each of its blocks, if they are wanted."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks = family_of(model.config).blocks(model) if with_blocks else []
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        return model(input_ids=ids, return_dict=True, use_cache=False).logits, seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def prepared(
    student: Student,
    teacher: Teacher,
    processes: Processes,
    checkpointing: bool,
    bfloat16: bool,
    storage: StateStorage,
) -> Iterator[None]:
    """Within the context both run our forward pass, sharded over the processes, and in bfloat16 if asked to.

    Args:
        checkpointing: keep the inputs of the student's blocks only, and run each once more in the backward pass.
        storage: of the student's state, after every token.
    """
    models = (student.model, teacher.model)
    devices = {model.device.type for model in models}
    blocks = [family_of(model.config).blocks(model) for model in models]
    mixers = [mixers_of(model) for model in models]
    for block in blocks[0] if checkpointing else ():
        block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    if processes.size > 1:
        for module, parts in zip((student, teacher), blocks, strict=True):
            mesh = init_device_mesh(torch.device(processes.device).type, (processes.size,))
            for part in (*parts, module):
                fully_shard(part, mesh=mesh)
    try:
        with replaced_forward(mixers[1]), replaced_forward(mixers[0], rounded_forward(storage)), ExitStack() as narrow:
            # Not narrower weights: A_log and dt_bias are exponentiated, and small steps must not be rounded away.
            for device in devices if bfloat16 else ():
                narrow.enter_context(torch.autocast(device, torch.bfloat16))
            yield
    finally:
        for block in blocks[0] if checkpointing else ():
            block.__dict__.pop("forward")


def choose_trained(model: PreTrainedModel, trained: Trained) -> None:
    """Let some of a model's parameters have gradients, and the others none."""
    in_mixers = {id(value) for mixer in mixers_of(model) for value in mixer.module.parameters()}
    matrices = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    for value in model.parameters():
        moves = {"mixers": id(value) in in_mixers, "small": id(value) not in matrices, "all": True}
        value.requires_grad_(moves[trained])


def whole(value: Tensor) -> Tensor:
    """A copy of a tensor that may be sharded, put together on the CPU; every process calls it at the same time."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu", copy=True)


def placed_like(value: Tensor, content: Tensor) -> Tensor:
    """A whole tensor, brought to the device of another one of its shape and sharded as that is."""
    content = content.to(value.device, copy=True)
    return distribute_tensor(content, value.device_mesh, value.placements) if isinstance(value, DTensor) else content

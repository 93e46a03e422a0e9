"""How far a student's next-token distribution is from its teacher's.

The logits of a batch would take tokens x vocabulary numbers, four times over. So both models give the hidden states
that their heads get, and the heads are applied to a stretch of tokens at a time. The gradients with respect to the
student's hidden states and head are computed in the same pass, so that no stretch is kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.errors import ModelError
from ghostssm.ops.step import at_least_float32

_NUMBERS_AT_ONCE = 1 << 22
"""Logits of one stretch."""


@dataclass(frozen=True)
class Readout:
    """The two parts that give a model's logits: ``hidden @ head.T``.

    Attributes:
        hidden: (..., hidden_size), after the last norm. head: (vocab, hidden_size).
    """

    hidden: Tensor
    head: Tensor

    def logits(self, span: slice) -> Tensor:
        """The logits of some tokens of a flat ``hidden``: (tokens, vocab), float32 or better."""
        return at_least_float32(F.linear(self.hidden[span], self.head))

    @property
    def flat(self) -> Readout:
        """The same with one axis for all tokens."""
        return Readout(self.hidden.reshape(-1, self.hidden.shape[-1]), self.head)


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[Tensor]:
    """Within the context a model gives, as logits, the hidden states that its head gets; yields the head's weight.

    What a family multiplies logits by multiplies the hidden states then, which gives the same logits.

    Raises:
        ModelError: the head is no matrix alone.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or getattr(head, "bias", None) is not None:
        raise ModelError(f"The head is a {type(head).__name__}; expected torch's Linear without a bias.")
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = lambda hidden: hidden
    try:
        yield head.weight
    finally:
        head.__dict__.pop("forward")
        if before is not None:
            head.__dict__["forward"] = before


def divergence(student: Readout, teacher: Readout) -> Tensor:
    """The mean over tokens of KL(teacher || student) over the whole vocabulary, nats; differentiable in the student.

    Args:
        student, teacher: of the same tokens and vocabulary; their hidden sizes may differ.
    """
    student, teacher = student.flat, teacher.flat
    apply: Any = _Divergence.apply  # torch gives it no types
    mean: Tensor = apply(student.hidden, student.head, teacher.hidden, teacher.head)
    return mean


class _Divergence(torch.autograd.Function):
    """d KL / d logits = softmax(student) - softmax(teacher), at every token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        student, teacher = Readout(hidden, head), Readout(teacher_hidden, teacher_head)
        to_hidden, to_head = (
            torch.zeros_like(part) if needed else None
            for part, needed in zip((hidden, head), ctx.needs_input_grad[:2], strict=True)
        )
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for span in _stretches(len(hidden), len(head)):
            log_student = student.logits(span).log_softmax(-1)
            log_teacher = teacher.logits(span).log_softmax(-1)
            wanted = log_teacher.exp()
            total += torch.linalg.vecdot(wanted, log_teacher.sub_(log_student)).sum()
            slope = log_student.exp_().sub_(wanted).div_(len(hidden)).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[span] = slope @ head.to(slope)
            if to_head is not None:
                to_head += (slope.T @ hidden[span]).to(to_head)
        ctx.gradients = to_hidden, to_head
        return (total / len(hidden)).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if part is None else part * slope.to(part) for part in ctx.gradients), None, None


@torch.no_grad()
def window_losses(student: Readout, teacher: Readout, ids: Tensor) -> Tensor:
    """Divergence, the student's and the teacher's loss on the next token: means over each window's tokens, nats.

    Args:
        student, teacher: hidden states (b, l, hidden_size). ids: (b, l), the tokens; the last position predicts none.

    Returns:
        (3, b), float64.
    """
    targets = ids[:, 1:].flatten()
    pair = [Readout(each.hidden[:, :-1], each.head).flat for each in (student, teacher)]
    parts = []
    for span in _stretches(len(targets), len(student.head)):
        log_student, log_teacher = (each.logits(span).log_softmax(-1) for each in pair)
        kl = torch.linalg.vecdot(log_teacher.exp(), log_teacher - log_student)
        chosen = [-each.gather(-1, targets[span, None])[:, 0] for each in (log_student, log_teacher)]
        parts.append(torch.stack([kl, *chosen]))
    return torch.cat(parts, dim=1).double().view(3, len(ids), -1).mean(-1)


def _stretches(tokens: int, vocabulary: int) -> Iterator[slice]:
    count = max(1, _NUMBERS_AT_ONCE // vocabulary)
    return (slice(start, start + count) for start in range(0, tokens, count))

"""Associative recall: sequences of the task, and what a model recalls of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ghostssm.errors import InputError
from ghostssm.evaluation.recall import Recall
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.ops.state_format import FLOAT32_STORAGE, StateStorage

IGNORED = -100
"""The target of a position that is not scored; torch's convention."""


def associative_recall(
    sequences: int, pairs: int, keys: int, values: int, generator: torch.Generator, *, rounds: int = 1
) -> tuple[Tensor, Tensor]:
    """Sequences for multi-query associative recall (Arora et al. 2023).

    ``pairs`` keys, all different, each followed by its value; then the same keys in another order, each to be answered
    by its value. Keys are the tokens 1 to ``keys``, values the ``values`` tokens after these; 0 is unused.

    Args:
        rounds: pairs come in as many rounds, each of facts and the questions about them: easier to learn.

    Returns:
        ids (sequences, 4 * pairs), and targets of the same shape: at a queried key its value, elsewhere `IGNORED`.

    Raises:
        InputError: no pairs, more pairs than keys, or rounds that don't divide the pairs.
    """
    if not 1 <= pairs <= keys:
        raise InputError(f"{pairs} pairs of {keys} keys; expected from 1 to as many pairs as there are keys.")
    if rounds < 1 or pairs % rounds:
        raise InputError(f"{pairs} pairs in {rounds} rounds; expected as many pairs in each round.")
    key = torch.rand(sequences, keys, generator=generator).argsort(1)[:, :pairs] + 1
    value = torch.randint(keys + 1, keys + values + 1, (sequences, pairs), generator=generator)
    facts = torch.stack([key, value], dim=2).view(sequences, rounds, -1, 2)
    order = torch.rand(facts.shape[:3], generator=generator).argsort(2)
    questions = facts.gather(2, order[..., None].expand_as(facts))
    ids = torch.stack([facts, questions], dim=2)
    targets = torch.full_like(ids, IGNORED)
    targets[:, :, 1, :, 0] = questions[..., 1]
    return ids.flatten(1), targets.flatten(1)


def recall_of(
    model: PreTrainedModel, ids: Tensor, targets: Tensor, batch: int = 32, storage: StateStorage = FLOAT32_STORAGE
) -> Recall:
    """Every scored position's loss and whether its target is the likeliest token.

    Args:
        ids: (count, l). targets: (count, l), the token wanted right after each position, or `IGNORED`.
        storage: how the recurrent state is kept: it is rounded after every token.
    """
    losses, correct = [], []
    with torch.inference_mode(), replaced_forward(mixers_of(model), rounded_forward(storage)):
        for span in (slice(start, start + batch) for start in range(0, len(ids), batch)):
            scored = targets[span] != IGNORED
            output = model(input_ids=ids[span].to(model.device), return_dict=True, use_cache=False)
            logits = output.logits.float().cpu()[scored]
            wanted = targets[span][scored]
            losses.append(-logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
            correct.append(logits.argmax(-1) == wanted)
    return Recall(torch.cat(losses), torch.cat(correct))

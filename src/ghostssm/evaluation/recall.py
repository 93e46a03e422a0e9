"""Recall, where small states fail first: associative recall, and the last words of passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ghostssm.errors import InputError
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward
from ghostssm.progress import Progress, silent

IGNORED = -100
"""The target of a position that is not scored; torch's convention."""


@dataclass(frozen=True)
class Recall:
    """How well a model names what it has read.

    Attributes:
        losses: (count,), float64: negative log likelihood of each answer, nats.
        correct: (count,), bool: whether the likeliest tokens are the answer's.
    """

    losses: Tensor
    correct: Tensor

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()


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


def recall_of(model: PreTrainedModel, ids: Tensor, targets: Tensor, batch: int = 32) -> Recall:
    """Every scored position's loss and whether its target is the likeliest token.

    Args:
        ids: (count, l). targets: (count, l), the token wanted right after each position, or `IGNORED`.
    """
    losses, correct = [], []
    with torch.inference_mode(), replaced_forward(mixers_of(model)):
        for span in (slice(start, start + batch) for start in range(0, len(ids), batch)):
            scored = targets[span] != IGNORED
            output = model(input_ids=ids[span].to(model.device), return_dict=True, use_cache=False)
            logits = output.logits.float().cpu()[scored]
            wanted = targets[span][scored]
            losses.append(-logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
            correct.append(logits.argmax(-1) == wanted)
    return Recall(torch.cat(losses), torch.cat(correct))


def last_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    progress: Progress = silent,
) -> Recall:
    """LAMBADA's measure (Paperno et al. 2016): a passage's last word, given all before it.

    A word of several tokens is correct if each of them is the likeliest, given the right ones before it; its loss is
    the sum over its tokens.

    Raises:
        InputError: a passage of fewer than two words.
    """
    losses, correct = [], []
    with torch.inference_mode(), replaced_forward(mixers_of(model)):
        for index, passage in enumerate(passages):
            progress("passages", index, len(passages))
            context, _, word = passage.strip().rpartition(" ")
            if not context:
                raise InputError(
                    f"The passage {passage[:60]!r} has fewer than two words; expected a context and a word."
                )
            # Cut from the whole, since tokenizers that begin a text with a space would give the word alone two.
            whole = tokenizer(f"{context} {word}", add_special_tokens=False)["input_ids"]
            answer = whole[len(tokenizer(context, add_special_tokens=False)["input_ids"]) :]
            ids = torch.tensor([whole], device=model.device)
            output = model(input_ids=ids, return_dict=True, use_cache=False, logits_to_keep=len(answer) + 1)
            logits = output.logits[0, :-1].float().cpu()
            wanted = torch.tensor(answer)
            losses.append(-logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
            correct.append((logits.argmax(-1) == wanted).all())
        progress("passages", len(passages), len(passages))
    return Recall(torch.stack(losses), torch.stack(correct))

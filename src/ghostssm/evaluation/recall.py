"""Recall, where small states fail first: the last words of passages."""

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

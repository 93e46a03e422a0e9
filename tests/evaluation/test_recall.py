"""Associative recall sequences, and what a model recalls against its plain forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Mamba2ForCausalLM, PreTrainedTokenizerFast

from ghostssm.errors import InputError
from ghostssm.evaluation.recall import IGNORED, associative_recall, last_words, recall_of
from tests.conftest import tiny_model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("pairs", "keys", "rounds"), [(1, 1, 1), (5, 5, 1), (6, 20, 1), (6, 20, 2), (6, 6, 6)])
def test_each_key_is_told_once_and_asked_once(pairs: int, keys: int, rounds: int) -> None:
    values = 7
    ids, targets = associative_recall(9, pairs, keys, values, seeded(), rounds=rounds)
    assert ids.shape == targets.shape == (9, 4 * pairs)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        told: dict[int, int] = {}
        asked = set()
        for position in range(0, len(row), 2):
            key, value = row[position : position + 2]
            assert 1 <= key <= keys < value <= keys + values
            assert wanted[position + 1] == IGNORED
            if wanted[position] == IGNORED:
                assert key not in told
                told[key] = value
            else:
                assert told[key] == wanted[position] == value
                assert key not in asked
                asked.add(key)
        assert len(told) == pairs
        assert asked == told.keys()


def test_rounds_ask_before_the_next_facts_come() -> None:
    _, targets = associative_recall(3, 6, 20, 20, seeded(), rounds=3)
    assert (targets.view(3, 3, 2, 4)[:, :, 0] == IGNORED).all()
    assert (targets.view(3, 3, 2, 2, 2)[:, :, 1, :, 0] != IGNORED).all()


def test_questions_come_in_another_order() -> None:
    ids, _ = associative_recall(4, 32, 64, 64, seeded())
    assert not torch.equal(ids[:, :64:2], ids[:, 64::2])


def test_sequences_follow_from_the_generator() -> None:
    first, again, other = (associative_recall(4, 8, 16, 16, seeded(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("pairs", [0, 17])
def test_more_pairs_than_keys_or_none_are_an_error(pairs: int) -> None:
    with pytest.raises(InputError, match=f"{pairs} pairs of 16 keys"):
        associative_recall(2, pairs, 16, 16, seeded())


@pytest.mark.parametrize("rounds", [0, 3])
def test_rounds_that_do_not_divide_the_pairs_are_an_error(rounds: int) -> None:
    with pytest.raises(InputError, match=f"8 pairs in {rounds} rounds"):
        associative_recall(2, 8, 16, 16, seeded(), rounds=rounds)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_recall_equals_that_of_the_plain_forward(n_groups: int) -> None:
    model = tiny_model(n_groups=n_groups)
    ids, targets = associative_recall(5, 6, 20, 20, seeded())
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    # A model with random weights knows no answer: let some of what it says be right.
    targets[2:4] = torch.where(targets[2:4] == IGNORED, IGNORED, logits[2:4].argmax(-1))
    found = recall_of(model, ids, targets, batch=2)
    losses, correct = by_hand(logits, targets)
    torch.testing.assert_close(found.losses, losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.correct, correct)
    assert correct[12:24].all()
    assert not correct.all()
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found.accuracy == correct.sum().item() / 30


def by_hand(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses, correct = [], []
    for row, wanted in zip(logits.double(), targets.tolist(), strict=True):
        for scores, target in zip(row, wanted, strict=True):
            if target != IGNORED:
                losses.append(scores.logsumexp(0) - scores[target])
                correct.append(scores.argmax() == target)
    return torch.stack(losses), torch.stack(correct)


def test_last_words_equal_those_of_the_plain_forward(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    passages = ["the quick brown fox", "  two dogs\n", "one x"]
    expected = []
    for passage, answer in zip(passages, (" fox", " dogs", " x"), strict=True):
        ids = torch.tensor([tokenizer(passage.strip())["input_ids"]])
        count = len(answer)  # a byte is a token
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -count - 1 : -1].double()
        expected.append(-logits.log_softmax(-1).gather(1, ids[0, -count:, None]).sum())
    found = last_words(model, tokenizer, passages)
    torch.testing.assert_close(found.losses, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not found.correct.any()


def model_that_continues(text: str, tokenizer: PreTrainedTokenizerFast) -> Mamba2ForCausalLM:
    """After each of the text's characters, all different, its likeliest token is the text's next one."""
    model = tiny_model(tie_word_embeddings=False)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.out_proj.weight.zero_()
        for weight, rows in ((model.backbone.embeddings.weight, tokens[:-1]), (model.lm_head.weight, tokens[1:])):
            weight.zero_()
            weight[rows, torch.arange(len(rows))] = 1.0
    return model


def test_a_word_is_right_if_every_token_is(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_that_continues("tea pot", tokenizer)
    found = last_words(model, tokenizer, ["a tea pot", "a tea pat", "a tea tot", "a cup pot", "tea po"])
    assert found.correct.tolist() == [True, False, False, False, True]
    assert found.accuracy == pytest.approx(2 / 5)


@pytest.mark.parametrize("passage", ["word", " word ", ""])
def test_a_passage_of_one_word_is_an_error(passage: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="fewer than two words"):
        last_words(tiny_model(), tokenizer, ["two words", passage])

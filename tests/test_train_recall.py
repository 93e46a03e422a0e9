"""Associative recall: the task, what a model recalls, and the tool that trains one, at a size that takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import train_recall
from associative_recall import IGNORED, associative_recall, recall_of
from torch import Tensor

import ghostssm
from ghostssm.errors import InputError
from tests.conftest import tiny_model


@pytest.mark.slow
def test_training_ends_in_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--layers", "1", "--hidden-size", "32", "--head-dim", "8", "--state-size", "16"]
    task = ["--pairs", "4", "--keys", "10", "--values", "6"]
    run = ["--steps", "2", "--warmup", "1", "--batch", "4"]
    monkeypatch.setattr(sys, "argv", ["train_recall", "--output", str(tmp_path / "model"), *sizes, *task, *run])
    train_recall.main()
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["options"]["pairs"] == 4
    model = ghostssm.load(str(tmp_path / "model")).model
    assert model.config.state_size == 16
    assert model.config.vocab_size == 17
    test = torch.Generator().manual_seed(record["options"]["seed"] + 1)
    held_out = associative_recall(64, 4, 10, 6, test)
    assert recall_of(model, *held_out).accuracy == record["held_out_accuracy"]


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

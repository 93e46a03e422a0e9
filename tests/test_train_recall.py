"""The tool that trains a model on associative recall, at a size that takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import train_recall

import ghostssm
from ghostssm.evaluation.recall import associative_recall, recall_of


@pytest.mark.slow
def test_training_ends_in_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--layers", "1", "--hidden-size", "32", "--head-dim", "8", "--state-size", "16"]
    task = ["--pairs", "4", "--keys", "10", "--values", "6"]
    run = ["--steps", "2", "--warmup", "1", "--batch", "4", "--no-compile"]
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

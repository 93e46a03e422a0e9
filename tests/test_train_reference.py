"""The tool that trains the built-in model, at a size that takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import train_reference

import ghostssm
from ghostssm.models.families import mixers_of
from ghostssm.text.stdlib import stdlib_texts


@pytest.mark.slow
@pytest.mark.parametrize("family", train_reference.FAMILIES)
def test_training_ends_in_a_checkpoint_that_loads(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A few modules show that the tool works; a tokenizer of all of them takes half a minute.
    monkeypatch.setattr(train_reference, "stdlib_texts", lambda held_out, tests=False: stdlib_texts(held_out)[:30])
    sizes = ["--layers", "6", "--hidden-size", "64", "--head-dim", "8", "--state-size", "16", "--vocab-size", "300"]
    run = ["--family", family, "--steps", "2", "--warmup", "1", "--batch", "2", "--window", "64"]
    monkeypatch.setattr(sys, "argv", ["train_reference", "--output", str(tmp_path / "model"), *sizes, *run])
    train_reference.main()
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["held_out_loss"][-1][0] == 2
    checkpoint = ghostssm.load(str(tmp_path / "model"))
    assert {mixer.state_size for mixer in mixers_of(checkpoint.model)} == {16}
    text = "def f(x):\n    return x + 1\n"
    ids = checkpoint.require_tokenizer()(text)["input_ids"]
    assert checkpoint.require_tokenizer().decode(ids) == text

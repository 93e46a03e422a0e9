"""``ghostssm evaluate --against``: a pruned model beside its base, on the same windows."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import ghostssm
from ghostssm.units import plus_minus
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run, tiny_model


@pytest.fixture
def pruned(run: Run, small: Path, text_file: Path, tmp_path: Path) -> Path:
    code, _, err = run(*prune_arguments(small, text_file, tmp_path / "pruned"), "--method", "ghost")
    assert code == 0, err
    return tmp_path / "pruned"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_the_difference_is_that_of_the_single_runs(
    run: Run, small: Path, pruned: Path, text_file: Path, stream: list[str]
) -> None:
    texts = ["--text", text_file, "--window-length", 64, "--text-windows", 5, "--json"]
    alone = {}
    for name, model in (("dense", small), ("pruned", pruned)):
        _, out, _ = run("evaluate", model, *texts)
        alone[name] = json.loads(out)
    code, out, err = run("evaluate", pruned, "--against", small, *texts, *stream)
    assert code == 0, err
    found = json.loads(out)
    differences = [
        b - a for a, b in zip(alone["dense"]["window_losses"], alone["pruned"]["window_losses"], strict=True)
    ]
    mean = sum(differences) / 5
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 4 / 5)
    assert found["excess_loss"] == pytest.approx(mean, abs=1e-6)
    assert found["standard_error"] == pytest.approx(error, abs=1e-6)
    for name in alone:
        assert found[f"{name}_loss"] == pytest.approx(alone[name]["loss"], rel=1e-6)
        assert found[f"{name}_perplexity"] == pytest.approx(alone[name]["perplexity"], rel=1e-5)
    code, out, _ = run("evaluate", pruned, "--against", small, *texts[:-1], *stream)
    lines = {line[:16].strip(): line[16:].strip() for line in out.splitlines()}
    assert lines["excess loss"] == f"{plus_minus(mean, error)} nats per token"
    assert lines["text"].endswith("5 windows of 64 tokens")


def test_another_base_than_the_one_that_was_pruned_is_told(
    run: Run, small: Path, pruned: Path, text_file: Path, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """By what the files hold: one that was renamed is the same."""
    texts = ["--text", text_file, "--window-length", 64, "--text-windows", 2]
    other = folder_of("other", num_hidden_layers=1)
    renamed = shutil.copytree(small, tmp_path / "renamed")
    for base, told in ((other, True), (renamed, False)):
        code, _, err = run("evaluate", pruned, "--against", base, *texts)
        assert code == 0, err
        assert (f"was pruned from '{small.name}', and {base} has other weights" in err) == told


def test_a_loss_has_its_standard_error(run: Run, small: Path, text_file: Path) -> None:
    texts = ["--text", text_file, "--window-length", 64]
    _, out, _ = run("evaluate", small, *texts, "--text-windows", 5)
    _, as_json, _ = run("evaluate", small, *texts, "--text-windows", 5, "--json")
    found = json.loads(as_json)
    assert f"{found['loss']:.4f} ± {found['standard_error']:.4f} nats per token" in out
    _, out, _ = run("evaluate", small, *texts, "--text-windows", 1)
    assert "±" not in out
    assert "nan" not in out


def test_one_model_is_in_memory_at_a_time(
    run: Run, small: Path, pruned: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, before = ghostssm.load, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not [model for model in before if model() is not None]
        checkpoint = load(*args, **kwargs)
        before.append(weakref.ref(checkpoint.model))
        return checkpoint

    monkeypatch.setattr("ghostssm.workflows.evaluate.load", watched)
    code, _, err = run("evaluate", pruned, "--against", small, "--text", text_file, "--window-length", 64)
    assert code == 0, err
    assert len(before) == 2


def test_other_vocabularies_are_refused(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    texts = ["--text", text_file, "--window-length", 64]
    larger = tmp_path / "larger"
    tiny_model(vocab_size=304).save_pretrained(larger)
    AutoTokenizer.from_pretrained(small).save_pretrained(larger)
    code, out, err = run("evaluate", small, "--against", larger, *texts)
    assert (code, out) == (2, "")
    assert "has a vocabulary of 288 tokens" in err
    assert "one of 304" in err
    assert "windows" not in err, "nothing was measured before"


def test_other_tokens_are_refused(
    run: Run, folder_of: Callable[..., Path], text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    small, other = folder_of(), folder_of("other")
    vocabulary = tokenizer.get_vocab()
    vocabulary["a"], vocabulary["o"] = vocabulary["o"], vocabulary["a"]
    swapped = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    swapped.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=swapped).save_pretrained(other)
    against = ["evaluate", small, "--against", other, "--text", text_file, "--window-length", 64]
    code, out, err = run(*against)
    assert (code, out) == (2, "")
    assert f"make different tokens of {text_file}" in err
    assert "--tokenizer" in err
    assert run(*against, "--tokenizer", small)[0] == 0


@pytest.mark.parametrize("instead", [["--tasks", "piqa"], ["--last-words", "a.txt"], ["--copying"]])
def test_with_what_it_does_not_go(run: Run, instead: list[str]) -> None:
    code, _, err = run("evaluate", "m", "--against", "b", *instead)
    assert code == 2
    assert f"--against has no effect with {instead[0]}" in " ".join(err.split())


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert plus_minus(-0.00001, 0.00002) == "0.0000 ± 0.0000"
    assert plus_minus(-0.00001, math.nan) == "0.0000"
    assert plus_minus(-0.5, 0.1) == "-0.5000 ± 0.1000"

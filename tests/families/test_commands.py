"""The command on hybrid models, from checkpoint to text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import Run
from tests.families.tiny import tiny_hybrid


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "model"
    tiny_hybrid(request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["zamba2"], indirect=True)
def test_every_verb(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", model, "--state-size", 8, "--json")
    assert (code, json.loads(out)["layers"]) == (0, 6)

    output = tmp_path / "pruned"
    windows = ["--windows", 4, "--window-length", 64]
    code, out, err = run(
        "prune", model, "--state-size", 4, "--refit", 5, "--calibration", text_file, "--output", output, *windows
    )
    assert code == 0, err
    assert "16 -> 4" in out
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() > 0
    assert run("verify", output)[0] == 0

    code, out, _ = run("evaluate", output, "--text", text_file, "--window-length", 64, "--text-windows", 3, "--json")
    assert code == 0
    assert json.loads(out)["perplexity"] > 1
    code, out, _ = run("generate", output, "--prompt", "line", "--max-new-tokens", 3)
    assert code == 0
    code, out, _ = run("bench", model, "--state-size", 4, "--batch", 1, "--prompt-length", 8, "--json")
    assert code == 0
    assert [row["state_size"] for row in json.loads(out)["rows"]] == [16, 4]


@pytest.mark.parametrize("model", ["bamba"], indirect=True)
def test_comparing_takes_all_methods(run: Run, model: Path, text_file: Path) -> None:
    texts = ["--calibration", text_file, "--text", text_file, "--text-windows", 3]
    sizes = ["--windows", 2, "--window-length", 32, "--batch", 1]
    code, out, err = run("compare", model, "--state-size", 4, *texts, *sizes, "--json")
    assert code == 0, err
    methods = {row["method"] for row in json.loads(out)}
    assert {"dense", "ghost", "output", "rrqr", "balanced"} < methods


@pytest.mark.parametrize("model", ["granite", "zamba2"], indirect=True)
def test_projections_and_sizes_per_layer(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--calibration", text_file, "--windows", 4, "--window-length", 32]
    output = tmp_path / "pruned"
    code, _, err = run(
        "prune",
        model,
        "--state-size",
        4,
        "--method",
        "balanced",
        "--per-layer",
        "--multiple",
        2,
        *options,
        "--output",
        output,
    )
    assert code == 0, err
    assert run("verify", output)[0] == 0
    code, _, err = run("evaluate", output, "--against", model, "--text", text_file, "--window-length", 32, "--json")
    assert code == 0, err
    assert run("generate", output, "--prompt", "line", "--max-new-tokens", 3)[0] == 0


@pytest.mark.parametrize("model", ["granite"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dialect", "mamba_ssm"], "mamba_ssm dialect has no granitemoehybrid models"),
    ],
)
def test_what_a_hybrid_cannot_become_is_refused_before_any_work(
    run: Run, model: Path, text_file: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (model / "model.safetensors").unlink()  # would be missed if anything were loaded
    output = tmp_path / "pruned"
    code, out, err = run("prune", model, "--state-size", 4, "--calibration", text_file, "--output", output, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in " ".join(err.split())
    assert not output.exists()

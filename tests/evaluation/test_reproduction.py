"""The paper's tables, on small stand-ins in the format of the published checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ghostssm
from ghostssm.text.sources import read_text
from ghostssm.text.windows import evaluation_windows
from ghostssm.workflows import paper_tables, reproduce
from ghostssm.workflows.paper_tables import perplexity_text
from tests.checkpoint.test_round_trip import mamba_ssm_folder
from tests.conftest import Run

LENGTH, COUNT = 64, 4
# Rounded as printed; from the paper's tables, so that a slip in the data file shows.
ROWS_OF_PAPER = {
    ("sparsity", "sparsegpt"): "13.17 13.19 13.25 13.52 15.51",
    ("sparsity", "ghost"): "13.24 13.51 14.23 16.16 25.07",
    ("sparsity", "taylor"): "13.18 13.26 13.94 4255 4690",
    ("size", "dense"): "25.85 18.13 14.97 13.17 11.46",
    ("size", "taylor"): "1e16 12647 15.13 13.94 11.50",
    ("size", "random"): "45.60 23.71 5197 17.77 15.93",
    ("size", "ghost"): "29.06 19.96 16.13 14.23 12.14",
}


@pytest.fixture
def models(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds two of the five, as the hub's cache or a mirror would; of the stand-ins' sizes."""
    document = paper_tables._document()
    sizes = {model: {"layers": 3, "hidden_size": 32, "state_size": 16} for model in document["models"]}
    monkeypatch.setattr(paper_tables, "_document", lambda: {**document, "models": sizes})
    folder = tmp_path / "models"
    for place in ("state-spaces/mamba2-1.3b", "mamba2-130m"):
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        mamba_ssm_folder(scratch, tokenizer).rename(folder / place)
    return folder


@pytest.fixture
def options(text_file: Path, tmp_path: Path) -> list[object]:
    texts = ["--calibration", text_file, "--text", text_file]
    sizes = ["--windows", COUNT, "--text-windows", COUNT, "--window-length", LENGTH]
    return ["reproduce", "--output", tmp_path / "out", *texts, *sizes]


@pytest.mark.parametrize(("table", "method"), ROWS_OF_PAPER)
def test_published_numbers(table: Any, method: str) -> None:
    row = [cell for cell in paper_tables.cells(table) if cell.method == method]
    assert " ".join(perplexity_text(cell.published or 0) for cell in row) == ROWS_OF_PAPER[table, method]
    assert [cell.sparsity for cell in row if table == "sparsity"] in ([], [0.1, 0.3, 0.5, 0.7, 0.9])
    if table == "sparsity":
        assert [cell.state_size for cell in row] == [115, 90, 64, 38, 13]


def test_the_documentation_has_the_published_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "reproduce.md").read_text(encoding="utf-8")
    for table in paper_tables.table_names():
        pruned = [cell for cell in paper_tables.cells(table) if cell.method != "dense"]
        for method in dict.fromkeys(cell.method for cell in pruned):
            row = [perplexity_text(cell.published or 0) for cell in pruned if cell.method == method]
            assert f"| published | {' | '.join(row)} |" in page


def test_stated_sizes_keep_the_published_number_where_there_is_one() -> None:
    found = paper_tables.cells("size", ["ghost", "output"], [64, 32])
    assert len(found) == 5 * (1 + 2 * 2)
    by_key = {cell.key: cell.published for cell in found}
    assert by_key["state-spaces/mamba2-2.7b", "ghost", 64] == 12.14
    assert by_key["state-spaces/mamba2-2.7b", "ghost", 32] is None
    assert by_key["state-spaces/mamba2-2.7b", "output", 64] is None


def stock_perplexity(folder: Path, text: Path, tokenizer: PreTrainedTokenizerFast) -> float:
    """By transformers' own forward pass on the text's first windows."""
    ids = evaluation_windows(read_text(str(text), "evaluation"), tokenizer, LENGTH, COUNT).ids
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_both_tables(
    run: Run, models: Path, options: list[object], text_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chosen = ["--models", models, "--methods", "magnitude", "ghost", "output+repair"]
    code, out, err = run(*options, *chosen)
    assert code == 0, err
    assert "cells 20/20" in err  # 1.3b: dense and 3 x 5, 130m: dense and 3 x 1
    lines = out.splitlines()
    assert lines[0].startswith("state-spaces/mamba2-1.3b, dense: 13.17 published, ")
    assert lines[1].split() == ["method", "10%", "30%", "50%", "70%", "90%"]
    assert lines[2].split() == ["magnitude", "published", "427.7", "22.39", "29.34", "39.96", "69.49"]
    assert len(lines[3].split()) == 6
    assert lines[6].split() == ["output+repair", "published"]
    assert all(len(line) <= 80 for line in lines if not line.startswith(("published:", "written:")))
    size = lines[lines.index("state-spaces/mamba2-*, 50% of the state cut") + 1 :]
    assert size[0].split() == ["method", "130m", "370m", "780m", "1.3b", "2.7b"]
    assert size[1].split() == ["dense", "published", "25.85", "18.13", "14.97", "13.17", "11.46"]
    assert len(size[2].split()) == 1 + 2, "only the two models at hand are measured"

    code, again, err = run(*options, *chosen, "--json")
    assert code == 0
    assert "going on from 20 finished cells" in err
    assert "windows" not in err, "nothing is measured again"
    cells = {(c["table"], c["model"], c["method"], c["sparsity"]): c for c in json.loads(again)["cells"]}
    large = "state-spaces/mamba2-1.3b"
    assert cells["size", large, "ghost", 0.5]["measured"] == cells["sparsity", large, "ghost", 0.5]["measured"]
    assert cells["size", "state-spaces/mamba2-2.7b", "ghost", 0.5]["measured"] is None
    # What ghostssm prune writes, read by transformers without us, has the same perplexity.
    calibration = ["--calibration", text_file, "--windows", COUNT, "--window-length", LENGTH]
    folder = models / "state-spaces" / "mamba2-1.3b"
    for method, size_of_state, sparsity in (("magnitude", 14, 0.1), ("ghost", 8, 0.5), ("output+repair", 2, 0.9)):
        target = tmp_path / f"{method}-{size_of_state}"
        code, _, err = run(
            "prune", folder, "--method", method, "--state-size", size_of_state, "--output", target, *calibration
        )
        assert code == 0, err
        entry = cells["sparsity", large, method, sparsity]
        assert entry["state_size"] == size_of_state
        assert entry["measured"] == pytest.approx(stock_perplexity(target, text_file, tokenizer), rel=2e-5)

    page = (tmp_path / "out" / "results.md").read_text()
    assert "| ghost | published | 29.06 | 19.96 | 16.13 | 14.23 | 12.14 |" in page
    assert "arXiv 2602.11408" in page


def test_interrupted_runs_go_on(
    run: Run, models: Path, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ["--models", f"mamba2-1.3b={models / 'state-spaces' / 'mamba2-1.3b'}", "--table", "sparsity"]
    chosen += ["--methods", "magnitude", "random"]
    stored = tmp_path / "out" / "results.json"
    real, calls = reproduce.evaluate, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reproduce, "evaluate", interrupted)
    code, _, err = run(*options, *chosen)
    assert code == 130
    assert "error: interrupted. 3 finished cells are in" in " ".join(err.split())
    assert "The same command goes on" in " ".join(err.split())
    before = json.loads(stored.read_text())["cells"]
    assert [(cell["method"], cell["state_size"]) for cell in before] == [
        ("dense", 16),
        ("magnitude", 14),
        ("magnitude", 11),
    ]
    assert [path.name for path in stored.parent.iterdir()] == ["results.json"]

    code, _, err = run(*options, *chosen)
    assert code == 0, err
    after = json.loads(stored.read_text())["cells"]
    assert after[:3] == before
    assert (len(after), calls[0]) == (11, 4 + 8)


def test_a_table_without_any_of_the_models_is_left_out(run: Run, models: Path, options: list[object]) -> None:
    code, out, err = run(*options, "--models", models / "mamba2-130m", "--methods", "random", "--json")
    assert code == 0, err
    assert {cell["table"] for cell in json.loads(out)["cells"]} == {"size"}


def test_a_cell_that_fails_does_not_stop_the_others(
    run: Run, models: Path, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reproduce.evaluate

    def too_large(model: Any, *arguments: Any) -> Any:
        if model.config.state_size == 8:
            raise torch.OutOfMemoryError("no memory left")
        return real(model, *arguments)

    chosen = ["--models", models, "--table", "sparsity", "--methods", "random", "--state-size", 8, 4]
    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "evaluate", too_large)
        code, out, err = run(*options, *chosen)
    assert code == 1
    assert "mamba2-1.3b random 8: no memory left" in err
    assert "the same command tries them again" in " ".join(err.split())
    assert out.splitlines()[1].split() == ["method", "N'", "=", "8", "N'", "=", "4"]
    code, _, err = run(*options, *chosen)
    assert code == 0
    assert "going on from 2 finished cells" in err


def test_results_of_other_settings_or_models_are_not_mixed(
    run: Run, models: Path, options: list[object], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    small = models / "mamba2-130m"
    chosen = ["--table", "size", "--methods", "random"]
    assert run(*options, *chosen, "--models", small)[0] == 0
    code, _, err = run(*options, *chosen, "--models", small, "--seed", 7)
    assert code == 2
    assert "other settings (seed 42, now 7)" in " ".join(err.split())
    other = mamba_ssm_folder(tmp_path, tokenizer, tie_embeddings=True)
    code, _, err = run(*options, *chosen, "--models", f"state-spaces/mamba2-130m={other}")
    assert code == 2
    assert "with other weights" in " ".join(err.split())
    stored = tmp_path / "out" / "results.json"
    document = json.loads(stored.read_text())
    damaged = {key: value for key, value in document.items() if key != "settings"}
    for content, message in (
        ("{", "can't be read"),
        (json.dumps(damaged), "is damaged (KeyError: 'settings')"),
        (json.dumps(document | {"cells": [{"model": 1}]}), "is damaged (TypeError"),
    ):
        stored.write_text(content)
        code, _, err = run(*options, *chosen, "--models", small)
        assert code == 2
        assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--models", "mamba2-9b"], "none of the published models"),
        (["--models", "."], "none of the published models"),
        (["--methods", "gost"], "No method is called 'gost'"),
        (["--models", "mamba2-130m={models}/mamba2-130m", "--table", "sparsity"], "in the table sparsity"),
        (["--state-size", 17], "expected an integer from 1 to the model's N = 16"),
        (["--table", "third"], "No table is called 'third'; expected one of: sparsity, size"),
        (["--calibration", "nowhere.txt"], "No text at 'nowhere.txt'"),
    ],
)
def test_what_can_not_be_is_said_before_any_work(
    run: Run, models: Path, options: list[object], tmp_path: Path, extra: list[object], message: str
) -> None:
    extra = [str(word).replace("{models}", str(models)) for word in extra]
    code, _, err = run(*options, *([] if "--models" in extra else ["--models", models]), *extra)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", paper_tables.published_models())
def test_another_model_under_a_published_name(run: Run, small: Path, options: list[object], name: str) -> None:
    code, out, err = run(*options, "--models", f"{name}={small}")
    assert (code, out) == (2, "")
    expected = {
        "state-spaces/mamba2-130m": "24 layers, hidden size 768",
        "state-spaces/mamba2-370m": "48 layers, hidden size 1024",
        "state-spaces/mamba2-780m": "48 layers, hidden size 1536",
        "state-spaces/mamba2-1.3b": "48 layers, hidden size 2048",
        "state-spaces/mamba2-2.7b": "64 layers, hidden size 2560",
    }[name]
    assert f"{small} has 3 layers, hidden size 32 and N = 16; expected {expected} and N = 128, as {name} has" in err


@pytest.mark.parametrize("field", ["layers", "hidden_size", "state_size"])
def test_each_size_tells_another_model(models: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = reproduce.find_models([str(models / "mamba2-130m")])
    reproduce.check_models(chosen)
    document = paper_tables._document()
    sizes = {model: {**own, field: own[field] + 1} for model, own in document["models"].items()}
    monkeypatch.setattr(paper_tables, "_document", lambda: {**document, "models": sizes})
    with pytest.raises(ghostssm.ModelError, match="as state-spaces/mamba2-130m has"):
        reproduce.check_models(chosen)


def test_a_model_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> Any:
        raise ghostssm.ModelError("state-spaces/mamba2-130m could not be fetched.")

    monkeypatch.setattr(reproduce, "describe", unreachable)
    with pytest.raises(ghostssm.ModelError, match="--models state-spaces/mamba2-130m=FOLDER"):
        reproduce.check_models(reproduce.find_models(["mamba2-130m"]))

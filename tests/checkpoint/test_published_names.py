"""What is published says nothing of the machine that it was made on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.checkpoint.source import Source
from tests.checkpoint.test_round_trip import mamba_ssm_folder
from tests.conftest import Run, tiny_model
from tests.test_streaming import saved

PLACE = "zq-private-place-7f3"


@pytest.fixture
def place(tmp_path: Path, folder_of: Callable[..., Path], text_file: Path) -> Path:
    """A folder with a telling name, and in it a model, a text and a tokenizer apart."""
    place = tmp_path / PLACE
    place.mkdir()
    folder_of().rename(place / "base")
    text_file.rename(place / "text.txt")
    (place / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "words" / name).write_bytes((place / "base" / name).read_bytes())
    for folder in ("base", "words"):
        config = place / folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"name_or_path": str(place / folder)}))
    config = place / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(place / "base")}))
    return place


def assert_silent(written: Path) -> None:
    files = [path for path in (written, *written.rglob("*")) if path.is_file()]
    assert files
    for path in files:
        assert PLACE.encode() not in path.read_bytes(), path.name
        assert PLACE not in path.name


@pytest.mark.parametrize(
    "options",
    [
        ["--report", "--batch", 1],
        ["--stream"],
        ["--dialect", "mamba_ssm"],
        ["--method", "balanced"],
        ["--tokenizer", "words"],
        ["--max-excess-loss", 9],
    ],
    ids=lambda options: options[0],
)
def test_nothing_written_names_the_place(run: Run, place: Path, tmp_path: Path, options: list[object]) -> None:
    options = [place / "words" if option == "words" else option for option in options]
    sized = [] if "--max-excess-loss" in options else ["--state-size", 4]
    texts = ["--calibration", place / "text.txt", "--evaluate", place / "text.txt", "--text-windows", 2]
    command = ["prune", place / "base", *sized, *texts, "--windows", 4, "--window-length", 64]
    method = [] if "--method" in options else ["--method", "ghost"]
    code, _, err = run(*command, *method, "--output", tmp_path / "out", *options)
    assert code == 0, err
    assert_silent(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "ghostssm.json").read_text())
    assert manifest["base_model"] == "base"
    assert manifest["options"]["calibration"]["text"] == "text.txt"
    assert manifest["measured"]["text"] == "text.txt"


def test_finished_runs_are_still_recognised(run: Run, place: Path, tmp_path: Path) -> None:
    texts = ["--calibration", place / "text.txt", "--evaluate", place / "text.txt", "--text-windows", 2]
    command = ["prune", place / "base", "--state-size", 4, *texts, "--windows", 3, "--window-length", 64, "--stream"]
    command += ["--method", "ghost", "--output", tmp_path / "out"]
    assert run(*command)[0] == 0
    code, _, err = run(*command, "--resume")
    assert code == 0
    assert "is finished" in err


@pytest.mark.parametrize("format", ["transformers", "mamba_ssm", "gguf"])
def test_exports_forget_what_earlier_releases_wrote(run: Run, place: Path, tmp_path: Path, format: str) -> None:
    command = ["prune", place / "base", "--state-size", 4, "--calibration", place / "text.txt", "--windows", 3]
    code, _, err = run(*command, "--window-length", 64, "--method", "ghost", "--output", place / "out")
    assert code == 0, err
    for name, key in (("ghostssm.json", "options"), ("plan.json", "provenance")):
        document = json.loads((place / "out" / name).read_text())
        document[key]["calibration"]["text"] = str(place / "text.txt")
        if key == "options":
            document["base_model"] = str(place / "base")
        (place / "out" / name).write_text(json.dumps(document))
    tokenizer = ["--no-tokenizer"] if format == "gguf" else []
    code, _, err = run("export", place / "out", "--format", format, "--output", tmp_path / "exported", *tokenizer)
    assert code == 0, err
    assert_silent(tmp_path / "exported")
    if format != "gguf":
        assert ghostssm.verify(tmp_path / "exported").passed


def test_a_base_model_of_the_other_dialect(run: Run, place: Path, tmp_path: Path, tokenizer: Any) -> None:
    base = mamba_ssm_folder(place, tokenizer)
    command = ["prune", base, "--state-size", 4, "--calibration", place / "text.txt", "--windows", 3]
    command += ["--window-length", 64, "--method", "ghost"]
    for dialect in ("mamba_ssm", "transformers"):
        code, _, err = run(*command, "--dialect", dialect, "--output", tmp_path / dialect)
        assert code == 0, err
        assert_silent(tmp_path / dialect)


def test_published_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(spec: str, folder: Path, hub_id: str | None = None) -> str:
        return Source(spec, folder, {}, "transformers", hub_id).published_name

    assert name("org/model", tmp_path / "snapshots" / "0a1b", "org/model") == "org/model"
    assert name("reference", tmp_path / "reference") == "reference"
    assert name(f"{tmp_path}/model/", tmp_path / "model") == "model"
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0a1b"
    assert name(str(snapshot), snapshot) == "org/some-model"
    monkeypatch.chdir(tmp_path)
    assert name(".", Path()) == tmp_path.name
    assert name("deep/..", Path("deep/..")) == tmp_path.name
    assert name("x", Path("bad\udcff")).encode() == b"bad?"


def test_a_library_call_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / PLACE).mkdir()
    checkpoint = ghostssm.load(saved(tiny_model(), tmp_path / PLACE / "model"))
    text = ghostssm.Text(str(tmp_path / PLACE / "text.txt"), ("words",))
    windows = ghostssm.Windows(torch.arange(80).view(2, 40), text.name, text.fingerprint, 1.0, 0)
    plan = ghostssm.Calibration(checkpoint.model, windows).plan("ghost", 5)
    ghostssm.apply_plan(checkpoint.model, plan)
    assert_silent(ghostssm.save(checkpoint, plan, tmp_path / "out"))
    plan.save(tmp_path / "plan")
    assert_silent(tmp_path / "plan")

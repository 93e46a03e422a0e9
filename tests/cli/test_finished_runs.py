"""``prune --stream --resume`` where the output is there already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import ghostssm
from ghostssm.cli.main import app
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run, save_model, write_text


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def command_line(place: Path) -> list[object]:
    text = place / "text.txt"
    arguments = [*prune_arguments(place / "model", text, place / "out"), "--stream", "--method", "ghost"]
    return [*arguments, "--evaluate", text, "--text-windows", 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model, a text, and the output of a run that ended well."""
    place = tmp_path_factory.mktemp("finished")
    save_model(place / "model", tokenizer)
    write_text(place / "text.txt")
    app([*map(str, command_line(place))], standalone_mode=False)
    shutil.copytree(place, place.with_name("kept"))
    return place


@pytest.fixture
def tmp_path(finished: Path) -> Iterator[Path]:
    """The finished run's own place, for its command line names it; every test finds it as the run left it."""
    yield finished
    shutil.rmtree(finished)
    shutil.copytree(finished.with_name("kept"), finished)


@pytest.fixture
def streamed(tmp_path: Path) -> list[object]:
    """The command line of a run that ended well."""
    return command_line(tmp_path)


def test_a_finished_run_ends_well(run: Run, streamed: list[object], tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    code, out, err = run(*streamed, "--resume", "--json")
    assert code == 0, err
    assert f"{tmp_path / 'out'} is finished" in err
    assert "calibrating" not in err
    assert contents(tmp_path / "out") == before
    found = json.loads(out)
    assert found["state_size"] == {"before": 16, "after": 4}
    assert found["measured"] == json.loads((tmp_path / "out" / "ghostssm.json").read_text())["measured"]
    assert run(*streamed[:-4], "--resume")[0] == 0, "no measurement is wanted, and one is there"
    code, _, err = run(*streamed)
    assert code == 2, "without --resume as ever"
    assert "exists and is not empty" in err


@pytest.mark.parametrize(
    "other",
    [
        ["--seed", 7],
        ["--state-size", 5],
        ["--method", "magnitude"],
        ["--repair"],
        ["--groups", "pooled"],
        ["--windows", 4],
        ["--text-windows", 4],
    ],
)
def test_the_output_of_another_run_is_refused(
    run: Run, streamed: list[object], tmp_path: Path, other: list[object]
) -> None:
    before = contents(tmp_path / "out")
    code, _, err = run(*streamed, "--resume", *other)
    assert code == 2
    assert "exists and is not empty; name another folder, or pass --overwrite" in err
    assert contents(tmp_path / "out") == before


def test_the_output_of_another_model_is_refused(
    run: Run, streamed: list[object], folder_of: Callable[..., Path]
) -> None:
    folder_of(seed=1)
    code, _, err = run(*streamed, "--resume")
    assert code == 2
    assert "exists and is not empty" in err


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"options": 3}'])
def test_a_broken_manifest_is_no_finished_run(run: Run, streamed: list[object], tmp_path: Path, manifest: str) -> None:
    (tmp_path / "out" / "ghostssm.json").write_text(manifest)
    code, _, err = run(*streamed, "--resume")
    assert code == 2
    assert "exists and is not empty" in err


def test_an_output_that_may_be_replaced_is_made_anew(run: Run, streamed: list[object], tmp_path: Path) -> None:
    code, _, err = run(*streamed, "--resume", "--overwrite", "--state-size", 5)
    assert code == 0, err
    assert ghostssm.describe(str(tmp_path / "out")).layout.state_size == 5

"""What writing may stumble over is told before the work; what fails after it never costs the weights."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.checkpoint import dry_run, saving, side_files
from ghostssm.checkpoint.manifest import Manifest
from ghostssm.errors import GhostWarning, IncompleteError, ModelError, StorageError
from ghostssm.plan.plan import Plan
from tests.checkpoint.test_round_trip import pruned_checkpoint
from tests.cli.test_cli import prune_arguments
from tests.conftest import Run, random_windows
from tests.test_streaming import assert_same_checkpoint, tensors_of

ROADS = pytest.mark.parametrize("road", [[], ["--stream"], ["--dialect", "mamba_ssm"]], ids=" ".join)
SAMPLING = '{\n  "temperature": 0.6, "top_p":0.95,\n "eos_token_id": [0, 2]}\n'
USABLE = [SAMPLING, '{"max_length": 1000000000000}', "{}"]
BROKEN = ["null", "", "{", "[1]", '{"temperature": 0.6, "temperature": 0.7}', '{"cache_implementation": "nonsense"}']


def prune(small: Path, text_file: Path, output: Path, *more: object) -> list[object]:
    return [*prune_arguments(small, text_file, output), "--method", "ghost", *more]


def no_walk(*_: object, **__: object) -> None:
    raise AssertionError("the work began")


def export_all(run: Run, model: Path, tmp_path: Path) -> list[Path]:
    written = []
    for dialect in ("transformers", "mamba_ssm"):
        written.append(tmp_path / dialect)
        code, _, err = run("export", model, "--format", dialect, "--output", written[-1])
        assert code == 0, err
    return written


@ROADS
@pytest.mark.parametrize("content", USABLE)
def test_a_generation_config_stays_as_it_is(
    run: Run, small: Path, text_file: Path, tmp_path: Path, road: list[str], content: str
) -> None:
    (small / "generation_config.json").write_text(content)
    code, _, err = run(*prune(small, text_file, tmp_path / "out", *road))
    assert code == 0, err
    assert "warning" not in err
    for folder in (tmp_path / "out", *export_all(run, tmp_path / "out", tmp_path)):
        assert (folder / "generation_config.json").read_text() == content
        assert ghostssm.verify(folder).passed


@ROADS
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_generation_config_keeps_nobody_from_pruning(
    run: Run, small: Path, text_file: Path, tmp_path: Path, road: list[str], content: str
) -> None:
    (small / "generation_config.json").write_text(content)
    code, _, err = run(*prune(small, text_file, tmp_path / "out", *road))
    assert code == 0, err
    assert err.count("warning: The generation config can't be used and is carried over as it is") == 1
    assert (tmp_path / "out" / "generation_config.json").read_text() == content
    code, _, err = run("verify", tmp_path / "out")
    assert code == 0, err
    assert err.count("warning: The generation config") == 1


@pytest.mark.parametrize("content", BROKEN)
def test_a_model_with_a_broken_generation_config_can_be_used(
    run: Run, small: Path, text_file: Path, content: str
) -> None:
    (small / "generation_config.json").write_text(content)
    measured = ["--text", text_file, "--text-windows", 1, "--window-length", 64]
    for verb in (
        ["evaluate", small, *measured],
        ["evaluate", small, *measured, "--stream"],
        ["generate", small, "--prompt", "line", "--max-new-tokens", 2],
    ):
        code, _, err = run(*verb)
        assert code == 0, err
        assert err.count("warning: The generation config") == 1


def test_without_a_generation_config_none_is_made_up(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    (small / "generation_config.json").unlink()
    for name, road in (("memory", []), ("files", ["--stream"])):
        assert run(*prune(small, text_file, tmp_path / name, *road))[0] == 0
        assert not (tmp_path / name / "generation_config.json").exists()
    assert_same_checkpoint(tmp_path / "memory", tmp_path / "files")


@ROADS
def test_a_tokenizer_that_can_not_be_saved_is_told_before_the_work(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: list[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise NotImplementedError("no fast tokenizer")

    monkeypatch.setattr(side_files, "carry_tokenizer", refuses)
    monkeypatch.setattr("ghostssm.pruning.run.LayerWalk", no_walk)
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*prune(small, text_file, tmp_path / "deep" / "out", *road))
    assert code == 2
    assert "The tokenizer can't be written beside the weights (NotImplementedError: no fast tokenizer)." in err
    left = [tmp_path / "deep"] if road == ["--stream"] else []
    assert sorted(tmp_path.iterdir()) == sorted([*before, *left])
    assert not list(tmp_path.glob("deep/*"))


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt"])
@ROADS
def test_a_licence_from_elsewhere_is_not_published(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: list[str], name: str
) -> None:
    (small / name).symlink_to(text_file)
    monkeypatch.setattr("ghostssm.pruning.run.LayerWalk", no_walk)
    code, _, err = run(*prune(small, text_file, tmp_path / "out", *road))
    assert code == 2
    assert f"{name} is a link to" in err
    code, _, err = run("export", small, "--format", "transformers", "--output", tmp_path / "exported")
    assert code == 2
    assert f"{name} is a link to" in err
    assert not (tmp_path / "exported").exists()


@ROADS
def test_a_card_that_can_not_be_made(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: list[str]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ValueError("a language that no card can have")

    monkeypatch.setattr("ghostssm.checkpoint.saving.model_card", refuses)
    monkeypatch.setattr("ghostssm.pruning.run.LayerWalk", no_walk)
    code, _, err = run(*prune(small, text_file, tmp_path / "out", *road))
    assert code == 2
    assert "The model card can't be written beside the weights (ValueError: a language that" in err


@ROADS
def test_no_room_on_the_disk(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, road: list[str]
) -> None:
    needed = dry_run.stored_bytes(ghostssm.load(str(small)))
    assert needed == pytest.approx((small / "model.safetensors").stat().st_size, rel=0.1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ghostssm.pruning.run.LayerWalk", no_walk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    code, _, err = run(*prune(small, text_file, tmp_path / "out", *road))
    assert code == 2
    assert f"{tmp_path / 'out'} needs about " in err
    assert "make room, or name an --output on another disk" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_a_run_that_goes_on_needs_less_room(
    run: Run, small: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"free": 10**9}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(**room))
    with monkeypatch.context() as patch:
        patch.setattr("ghostssm.streaming.run_folder.RunFolder.assemble", full_disk)
        assert run(*prune(small, text_file, tmp_path / "out", "--stream"))[0] == 1
    room["free"] = dry_run.stored_bytes(ghostssm.load(str(small))) // 2
    code, _, err = run(*prune(small, text_file, tmp_path / "other", "--stream"))
    assert code == 2
    assert "make room" in err
    code, _, err = run(*prune(small, text_file, tmp_path / "out", "--stream", "--resume"))
    assert code == 0, err


def full_disk(*_: object, **__: object) -> None:
    raise StorageError("No space left on device")


SIDE_FILES: dict[str, tuple[Any, str]] = {
    "the generation config": (side_files, "copy_file"),
    "the tokenizer": (side_files, "carry_tokenizer"),
    "the plan": (Plan, "save"),
    "the model card": (saving, "write_card"),
    "the manifest": (Manifest, "write"),
}
"""By what writes them."""


@pytest.fixture
def whole(run: Run, small: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, road: list[str]) -> Path:
    """What a run on `small` writes where nothing fails; one for all tests of a road."""
    folder = tmp_path_factory.getbasetemp() / f"whole {' '.join(road)}"
    if not folder.exists():
        assert run(*prune(small, text_file, folder, *road))[0] == 0
    return folder


@ROADS
@pytest.mark.parametrize("what", SIDE_FILES)
def test_a_side_file_that_fails_after_the_work_does_not_cost_the_weights(
    run: Run,
    small: Path,
    text_file: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    road: list[str],
    what: str,
) -> None:
    owner, name = SIDE_FILES[what]
    original, calls = getattr(owner, name), itertools.count()

    def fails_after_the_dry_run(*args: Any, **kwargs: Any) -> Any:
        if next(calls):
            raise ValueError("of all times\nnow")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails_after_the_dry_run)
    code, out, err = run(
        *prune(small, text_file, tmp_path / "out", *road, "--evaluate", text_file, "--text-windows", 2)
    )
    assert code == 1
    assert out == ""
    assert "is written and its weights are whole, but this is missing beside them" in err
    assert f"  - {what}: ValueError: of all times\n" in err
    assert "Traceback" not in err
    expected, found = tensors_of(whole), tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    written, left = ({path.name for path in folder.iterdir()} for folder in (whole, tmp_path / "out"))
    assert left - {"report.json"} < written
    assert not list((tmp_path / "out").glob(".*"))
    if what != "the manifest":
        assert json.loads((tmp_path / "out" / "ghostssm.json").read_text())["missing"] == [what]
    if road != ["--stream"]:
        assert (tmp_path / "out" / "report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), MemoryError(), OSError(28, "No space left on device")])
def test_a_probe_that_fails(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("ghostssm.checkpoint.saving.probed", fails)
    with pytest.raises(IncompleteError, match="- the probe: ") as caught:
        ghostssm.save(checkpoint, plan, tmp_path / "out")
    assert caught.value.folder == tmp_path / "out"
    manifest = json.loads((tmp_path / "out" / "ghostssm.json").read_text())
    assert (manifest["probe"], manifest["missing"]) == (None, ["the probe"])
    ghostssm.load(str(tmp_path / "out"))


def test_a_full_disk_at_the_end_of_a_streamed_run_can_be_resumed(
    folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = str(folder_of())

    def prune_streamed(output: Path, **options: Any) -> Path:
        ghostssm.prune_streamed(ghostssm.stream(spec, head=False), random_windows(2, 40), "ghost", 5, output, **options)
        return output

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ghostssm.checkpoint.saving.probed", full)
        with pytest.raises(StorageError, match=r"No space left on device.*--resume to go on"):
            prune_streamed(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_same_checkpoint(prune_streamed(tmp_path / "whole"), prune_streamed(tmp_path / "out", resume=True))


def test_a_dry_run_leaves_nothing(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    before = sorted(tmp_path.rglob("*"))
    folder = ghostssm.OutputFolder(tmp_path / "deep" / "out")
    dry_run.dry_run(checkpoint, folder, "transformers", untie=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoint.model.config.tie_word_embeddings


def test_a_side_file_that_can_not_be_read(folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of()
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "generation_config.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.warns(GhostWarning, match="Permission denied"):
        checkpoint = ghostssm.load(str(folder))
    with pytest.raises(ModelError, match=r"generation_config\.json can't be read: Permission denied"):
        side_files.carry_over(checkpoint, side_files.SideFiles(folder))

"""What ``ghostssm verify`` finds, and that the same run gives the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.checkpoint.probe import Probe
from tests.checkpoint.test_round_trip import IDS, logits_of, pruned_checkpoint
from tests.conftest import random_windows, tiny_model

FolderOf = Callable[..., Path]


def written(folder_of: FolderOf, tmp_path: Path, **options: Any) -> Path:
    checkpoint, plan = pruned_checkpoint(folder_of())
    return ghostssm.save(checkpoint, plan, tmp_path / "out", **options)


def outcome(folder: Path) -> dict[str, bool]:
    return {check.name: check.passed for check in ghostssm.verify(folder).checks}


def found_by(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in ghostssm.verify(folder).checks}


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
def test_what_was_written_passes(folder_of: FolderOf, tmp_path: Path, dialect: Any) -> None:
    result = ghostssm.verify(written(folder_of, tmp_path, dialect=dialect))
    assert result.passed
    assert result.notes == ()
    assert [check.name for check in result.checks] == ["manifest", "files", "shapes", "weights", "logits", "plan"]


@pytest.mark.parametrize("recipe", ["balanced", "balanced+per-layer", "output+refit2+repair", "taylor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_result_passes(folder_of: FolderOf, tmp_path: Path, recipe: str, dtype: torch.dtype) -> None:
    folder = folder_of(n_groups=2)
    tiny_model(n_groups=2).to(dtype).save_pretrained(folder)
    checkpoint = ghostssm.load(str(folder))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(2, 40)).plan(recipe, 6, "pooled", multiple=2)
    smaller = ghostssm.Checkpoint(ghostssm.apply_plan(checkpoint.model, plan), checkpoint.tokenizer, checkpoint.source)
    result = ghostssm.verify(ghostssm.save(smaller, plan, tmp_path / "out"))
    assert result.passed, result


@pytest.mark.parametrize("dialect", ["transformers", "mamba_ssm"])
def test_an_exported_copy_passes_padded_or_not(folder_of: FolderOf, tmp_path: Path, dialect: Any) -> None:
    pruned = written(folder_of, tmp_path)
    for state_size in (None, 12):
        checkpoint = ghostssm.load(str(pruned))
        if state_size is not None:
            model = ghostssm.pad_state(checkpoint.model, state_size)
            checkpoint = ghostssm.Checkpoint(model, checkpoint.tokenizer, checkpoint.source)
        result = ghostssm.verify(
            ghostssm.export_checkpoint(checkpoint, tmp_path / "copy", dialect=dialect, overwrite=True)
        )
        assert result.passed, result


@pytest.mark.parametrize("tied", [True, False])
def test_shared_numbers_are_counted_once(folder_of: FolderOf, tmp_path: Path, tied: bool) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of(tie_word_embeddings=tied))
    folder = ghostssm.save(checkpoint, plan, tmp_path / "out")
    assert found_by(folder)["weights"] == f"{ghostssm.describe(str(folder)).parameters:,} numbers, all finite"


def test_padding_is_told_apart_from_what_was_kept(folder_of: FolderOf, tmp_path: Path) -> None:
    pruned = written(folder_of, tmp_path)
    assert found_by(pruned)["plan"] == "3 mixers, state size 16 to 5"
    checkpoint = ghostssm.load(str(pruned))
    ghostssm.pad_state(checkpoint.model, 12)
    padded = ghostssm.export_checkpoint(checkpoint, tmp_path / "padded")
    assert found_by(padded)["plan"] == "3 mixers, state size 16 to 5, stored as 12"


def change_weight(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.D"][0] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def not_finite(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.D"][0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | changes))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    return change


def other_selections(folder: Path) -> None:
    document = json.loads((folder / "plan.json").read_text())
    kept = {name: [group[:-1] for group in groups] for name, groups in document["selections"].items()}
    (folder / "plan.json").write_text(json.dumps(document | {"selections": kept}))


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (change_weight, {"files", "logits"}),
        (not_finite, {"files", "weights"}),
        (edit("config.json", state_size=4), {"files", "shapes"}),
        (edit("config.json", time_step_limit=[0.0, 0.001]), {"files", "logits"}),
        (edit("plan.json", n_groups=2), {"files", "plan"}),
        (edit("plan.json", kept_state_size=6), {"files", "plan"}),
        (other_selections, {"files", "plan"}),
        (remove("tokenizer.json"), {"files"}),
        (edit("tokenizer_config.json", surprise=1), {"files"}),
        (remove("plan.tensors"), {"files"}),
        (add("model.safetensors.index.json"), {"files"}),
        (add("adapter_config.json"), {"files"}),
        (add("additional_chat_templates/x.jinja"), {"files"}),
        (edit("ghostssm.json", files={}), {"files"}),
        (edit("ghostssm.json", files={"../../etc/passwd": {"sha256": "0"}}), {"files"}),
        (edit("ghostssm.json", files={"config.json": 3}), {"files"}),
        (edit("ghostssm.json", probe=None), {"logits"}),
        (edit("ghostssm.json", probe={"token_ids": [10**9]}), {"logits"}),
        (lambda folder: (folder / "ghostssm.json").write_text("{"), {"manifest", "files", "logits"}),
    ],
)
def test_changes_that_matter_fail(
    folder_of: FolderOf, tmp_path: Path, change: Callable[[Path], object], failed: set[str]
) -> None:
    folder = written(folder_of, tmp_path)
    change(folder)
    assert {name for name, passed in outcome(folder).items() if not passed} == failed


def test_notes_of_the_user_are_mentioned(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = written(folder_of, tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "results").mkdir()
    (folder / "results" / "run.json").write_text("{}")
    result = ghostssm.verify(folder)
    assert result.passed
    assert result.notes == ("notes.txt was added", "results/run.json was added")


def test_a_changed_card_is_mentioned(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = written(folder_of, tmp_path)
    manifest = json.loads((folder / "ghostssm.json").read_text())
    manifest["files"]["README.md"] = {"sha256": "0", "bytes": 1}
    (folder / "ghostssm.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text("# Mine")
    result = ghostssm.verify(folder)
    assert result.passed
    assert result.notes == ("README.md was changed",)


def test_padding_channels_must_be_zero(folder_of: FolderOf, tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of(n_groups=2)))
    plan = ghostssm.Calibration(checkpoint.model, random_windows(1, 40)).plan("ghost", 5, "pooled")
    assert len({len(kept) for selection in plan.selections.values() for kept in selection.kept}) > 1
    ghostssm.apply_plan(checkpoint.model, plan)
    mixers = {name: module for name, module in checkpoint.model.named_modules() if name in plan.selections}
    folder = ghostssm.save(checkpoint, plan, tmp_path / "out")
    assert outcome(folder)["plan"]
    name, selection = next((n, s) for n, s in plan.selections.items() if len(s.kept[0]) < plan.kept_state_size)
    row = 2 * 64 + len(selection.kept[0])  # the first padded channel of group 0 of B, after z and x
    with torch.no_grad():
        mixers[name].in_proj.weight[row] = 1.0
    folder = ghostssm.save(checkpoint, plan, tmp_path / "out", overwrite=True)
    assert not outcome(folder)["plan"]


def test_the_probe_is_of_the_models_logits() -> None:
    model = tiny_model()
    probe = Probe.of(model, IDS[0].tolist())
    assert probe is not None
    logits = logits_of(model)[0].double()
    for found, expected in (
        (probe.mean, logits.mean(-1)),
        (probe.deviation, logits.std(-1)),
        (probe.largest, logits.amax(-1)),
    ):
        assert torch.equal(torch.tensor(found, dtype=torch.float64), expected)
    assert probe.difference(probe) == 0
    other = Probe.of(tiny_model(seed=1), IDS[0].tolist())
    assert other is not None
    assert probe.difference(other) > 10 * probe.tolerance


def test_folders_that_are_no_output_of_ours(folder_of: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(ghostssm.ModelError, match="no folder"):
        ghostssm.verify(tmp_path / "nowhere")
    with pytest.raises(ghostssm.ModelError, match=r"no ghostssm\.json"):
        ghostssm.verify(folder_of())


@pytest.mark.parametrize("recipe", ["ghost", "output", "output+refit3+repair", "balanced+per-layer"])
def test_the_choice_does_not_depend_on_threads(recipe: str) -> None:
    model = tiny_model(n_groups=2, hidden_size=64, num_heads=16)
    plans = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        calibration = ghostssm.Calibration(model, random_windows(4, 100))
        plans.append(calibration.plan(recipe, 6, "pooled", multiple=2))
    assert plans[0].selections == plans[1].selections
    for name, score in plans[0].scores.items():
        torch.testing.assert_close(score, plans[1].scores[name], rtol=1e-4, atol=0)


def test_the_command(folder_of: FolderOf, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ghostssm.cli.main import app

    folder = written(folder_of, tmp_path)
    good = CliRunner().invoke(app, ["verify", str(folder)])
    assert good.exit_code == 0
    assert [line.split()[1] for line in good.stdout.splitlines()[1:]] == ["ok"] * 6
    change_weight(folder)
    bad = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert bad.exit_code == 1
    found = json.loads(bad.stdout)
    assert not found["passed"]
    assert [check["name"] for check in found["checks"] if not check["passed"]] == ["files", "logits"]
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "nowhere")]).exit_code == 2

"""What is fetched of a model on the hub: the weight files that are read, and no second copy of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ghostssm
from ghostssm.errors import ModelError
from tests.conftest import tiny_model

Hub = Callable[[Path], list[str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Have the hub's client take files from a folder; gives the list of those that it took, in order."""

    def of(repository: Path) -> list[str]:
        snapshot = tmp_path / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        fetched: list[str] = []
        asked: list[str | None] = []

        def snapshot_download(
            hub_id: str, *, allow_patterns: Sequence[str], local_files_only: bool, revision: str | None = None
        ) -> str:
            assert not local_files_only
            assert hub_id == "org/name"
            assert revision == (COMMIT if asked else None)  # later calls see what the first saw
            asked.append(revision)
            for path in sorted(repository.iterdir()):
                if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                    shutil.copy(path, snapshot)
                    fetched.append(path.name)
            return str(snapshot)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("ghostssm.checkpoint.source.hub_answers", lambda: True)
        return fetched

    return of


def repository(folder: Path, *kinds: str) -> Path:
    model = tiny_model()
    model.save_pretrained(folder)
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    if "bin" in kinds:
        torch.save(tensors, folder / "pytorch_model.bin")
    if "consolidated" in kinds:
        shutil.copy(whole, folder / "consolidated.safetensors")
        (folder / "params.json").write_text("{}")
    if "whole" not in kinds:
        whole.unlink()
    if "shards" in kinds:
        model.save_pretrained(folder / "shards", max_shard_size="40KB")
        for path in (folder / "shards").glob("model*"):
            shutil.move(path, folder)
        shutil.rmtree(folder / "shards")
    return folder


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("whole",), r"model\.safetensors"),
        (("whole", "bin", "consolidated"), r"model\.safetensors"),
        (("whole", "shards"), r"model\.safetensors"),  # as transformers, which reads the whole file
        (("shards", "bin", "consolidated"), r"model-\d{5}-of-\d{5}\.safetensors"),
        (("bin",), r"pytorch_model\.bin"),
        (("bin", "consolidated"), r"pytorch_model\.bin"),
    ],
)
def test_weights_are_fetched_once(tmp_path: Path, hub: Hub, kinds: tuple[str, ...], expected: str) -> None:
    fetched = hub(repository(tmp_path / "repository", *kinds))
    model = ghostssm.load("org/name").model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tiny_model().state_dict().items())
    weights = [name for name in fetched if name.endswith((".safetensors", ".bin"))]
    assert weights
    assert all(re.fullmatch(expected, name) for name in weights)
    assert len(set(fetched)) == len(fetched)


def test_sizes_need_no_weights(tmp_path: Path, hub: Hub) -> None:
    fetched = hub(repository(tmp_path / "repository", "shards"))
    assert ghostssm.describe("org/name").layers == 3
    assert not [name for name in fetched if name.endswith(".safetensors")]


def test_the_format_of_mistral_is_named_and_not_fetched(tmp_path: Path, hub: Hub) -> None:
    fetched = hub(repository(tmp_path / "repository", "consolidated"))
    with pytest.raises(ModelError, match="Mistral's own format"):
        ghostssm.load("org/name")
    assert "consolidated.safetensors" not in fetched


def test_an_index_that_names_other_places_is_told_as_such(tmp_path: Path, hub: Hub) -> None:
    folder = repository(tmp_path / "repository", "shards")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    fetched = hub(folder)
    with pytest.raises(ModelError, match=r"expected plain names of \.safetensors files"):
        ghostssm.load("org/name")
    assert not [name for name in fetched if name.endswith(".safetensors")]

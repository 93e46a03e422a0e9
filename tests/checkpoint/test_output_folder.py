"""Outputs appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghostssm.checkpoint import OutputFolder
from ghostssm.errors import OutputError


def test_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        OutputFolder(tmp_path / "full")
    with pytest.raises(OutputError, match="is a file"):
        OutputFolder(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    OutputFolder(tmp_path / "empty")
    with pytest.raises(OutputError, match="holds other things than a checkpoint"):
        OutputFolder(tmp_path / "full", overwrite=True)
    with pytest.raises(OutputError, match="name is empty"):
        OutputFolder("")


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    (target / "config.json").write_text("{}")
    with OutputFolder(target, overwrite=True) as folder:
        (folder.partial / "new").write_text("y")  # and never committed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "x"


def test_commit_replaces_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("x")
    (target / "config.json").write_text("{}")
    with OutputFolder(target, overwrite=True) as folder:
        (folder.partial / "new").write_text("y")
        folder.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't be written"), OutputFolder(tmp_path / "file" / "out"):
        pass

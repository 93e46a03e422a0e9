"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ghostssm.errors import OutputError
from ghostssm.files.durable import adding, write_durably
from ghostssm.files.outputs import OutputFile, OutputFolder


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


def test_a_file_that_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    for place, overwrite in (("page.html", True), ("deep/er/page.html", False)):
        with OutputFile(tmp_path / place, overwrite) as file:
            file.partial.write_text("half")  # and never committed
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"
    with OutputFile(tmp_path / "deep" / "page.html") as file:
        file.partial.write_text("new")
        file.commit()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "page.html", "page.html"]


@pytest.mark.parametrize("left", ["file", "folder"])
def test_durable_steps_begin_anew_after_a_kill(tmp_path: Path, left: str) -> None:
    unfinished = tmp_path / ".run.unfinished"
    if left == "folder":
        unfinished.mkdir()
        (unfinished / "half").write_text("x")
    else:
        unfinished.write_text("x")

    def write(place: Path) -> None:
        place.mkdir()
        (place / "whole").write_text("y")

    write_durably(tmp_path / "run", write)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["run", "run/whole"]
    (tmp_path / "run" / "whole").write_text("another process's")
    with pytest.raises(OSError, match="not empty"):
        write_durably(tmp_path / "run", write)
    assert (tmp_path / "run" / "whole").read_text() == "another process's"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix())

    monkeypatch.setattr(os, "fsync", fsync)
    with OutputFile(tmp_path / "page") as file:
        file.commit()
    assert synced == [file.partial.name, "."]
    synced.clear()
    with OutputFolder(tmp_path / "out") as folder:
        (folder.partial / "in").mkdir()
        (folder.partial / "in" / "file").write_text("x")
        folder.commit()
    name = folder.partial.name
    assert sorted(synced[:3]) == sorted([name, f"{name}/in", f"{name}/in/file"])
    assert synced[3:] == ["."]


def test_files_that_are_added_come_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "half").write_text("of a process that was killed")
    with pytest.raises(IsADirectoryError), adding(tmp_path) as place:
        place.write_text("no file")
    assert not list(tmp_path.iterdir())
    with adding(tmp_path) as place:
        (place / "first").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]

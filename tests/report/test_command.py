"""``ghostssm report`` as its entry point is called."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.programs import in_process

_IMPORTS = """
import sys
sys.modules["altair"] = sys.modules["vl_convert"] = None
import ghostssm.cli.compare, ghostssm.cli.main, ghostssm.workflows.prune, ghostssm.report.showing
"""


def test_report_draws_what_a_folder_holds(run: Run, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run("report", pages["folder"], "--output", page)
    assert code == 0, err
    assert str(page) in out
    assert "Hankel singular values" in out
    assert page.read_text().startswith("<!DOCTYPE html>")
    code, out, err = run("report", pages["folder"], "--output", page)
    assert code == 2
    assert "--overwrite" in err
    code, out, err = run("verify", pages["folder"])
    assert code == 0, err
    code, out, _ = run("report", pages["folder"], "--output", page, "--overwrite", "--json")
    assert json.loads(out)["bytes"] == page.stat().st_size


def test_what_is_not_shown_has_a_command_without_folders(run: Run, pages: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pages["folder"], tmp_path / "bare")
    (folder / "report.json").unlink()
    code, _, err = run("report", folder, "--overwrite")
    assert code == 0
    assert "it comes with: ghostssm prune model " in err
    assert " --calibration text.txt " in err
    assert "--seed" not in err
    assert "without their folders" in err


def test_a_folder_that_prune_did_not_write(run: Run, tmp_path: Path) -> None:
    for folder, fault in ((tmp_path, "No plan.json in"), (tmp_path / "nowhere", "No folder at")):
        code, out, err = run("report", folder)
        assert (code, out) == (2, "")
        assert f"{fault} {folder}; expected a folder that 'ghostssm prune --output DIR' wrote." in " ".join(err.split())


@pytest.mark.usefixtures("without_library")
def test_a_missing_library_is_said_before_the_work(run: Run, pages: dict[str, Path], tmp_path: Path) -> None:
    model = pages["folder"].parent / "model"
    for call in (
        ["report", pages["folder"], "--overwrite"],
        ["prune", model, "--state-size", 4, "--output", tmp_path / "out", "--report"],
        ["compare", model, "--state-size", 4, "--report", tmp_path / "page.html"],
    ):
        code, out, err = run(*call)
        assert (code, out) == (2, "")
        told = r"needs (altair|vl-convert-python), which is not installed: pip install 'ghostssm\[report\]'\."
        assert re.search(told, " ".join(err.split()))
    assert list(tmp_path.iterdir()) == []


def test_only_what_draws_imports_the_libraries() -> None:
    done = in_process(_IMPORTS)
    assert done.returncode == 0, done.stderr

"""``ghostssm report`` as its entry point is called."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Run


def test_report_draws_what_a_folder_holds(run: Run, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run("report", pages["folder"], "--output", page)
    assert (code, err) == (0, "")
    assert str(page) in out
    assert "Hankel singular values" in out
    assert page.read_text().startswith("<!DOCTYPE html>")
    code, out, err = run("report", pages["folder"], "--output", page)
    assert code == 2
    assert "--overwrite" in err
    code, out, err = run("verify", pages["folder"])
    assert (code, err) == (0, "")
    code, out, _ = run("report", pages["folder"], "--output", page, "--overwrite", "--json")
    assert json.loads(out)["bytes"] == page.stat().st_size


def test_a_folder_that_prune_did_not_write(run: Run, tmp_path: Path) -> None:
    for folder, fault in ((tmp_path, "No plan.json in"), (tmp_path / "nowhere", "No folder at")):
        code, out, err = run("report", folder)
        assert (code, out) == (2, "")
        assert f"{fault} {folder}; expected a folder that 'ghostssm prune --output DIR' wrote." in " ".join(err.split())

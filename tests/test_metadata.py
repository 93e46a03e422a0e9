"""What PyPI is told: the README, whose links lead somewhere there once the project has an address."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[[^]]*\]\(([^)]+)\)")
_BUILD = "import setuptools.build_meta as backend; print(backend.prepare_metadata_for_build_wheel('.'))"


def description(folder: Path, address: str | None) -> str:
    """The description in the metadata that is built of a copy of the project's own files."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "src" / "ghostssm").mkdir(parents=True)
    (folder / "src" / "ghostssm" / "__init__.py").touch()
    if address is not None:
        with (folder / "pyproject.toml").open("a") as file:
            file.write(f'\n[project.urls]\nRepository = "{address}"\n')
    done = subprocess.run([sys.executable, "-c", _BUILD], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metadata = email.message_from_string((folder / done.stdout.split()[-1] / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    return str(metadata.get_payload())


def test_without_an_address_the_description_is_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds the project's metadata")
    assert description(tmp_path, None).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_links_lead_to_the_address_that_the_project_says(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds the project's metadata")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = description(tmp_path, "https://example.org/org/ghostssm/")
    before, after = _LINK.findall(readme), _LINK.findall(shown)
    assert any(picture for picture, _ in before)
    for (picture, link), (_, absolute) in zip(before, after, strict=True):
        if link.startswith(("http", "#")):
            assert absolute == link
            continue
        assert (ROOT / link.partition("#")[0]).exists(), link
        assert absolute == f"https://example.org/org/ghostssm/{'raw' if picture else 'blob'}/HEAD/{link}"

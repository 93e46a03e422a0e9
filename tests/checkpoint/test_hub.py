"""Uploads: what is asked of the hub's client, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ghostssm.checkpoint.hub import check_hub_target, push_to_hub
from ghostssm.errors import HubError, InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    written = tmp_path / "out"
    written.mkdir()
    (written / "config.json").write_text("{}")
    return written


@pytest.mark.parametrize("private", [True, False])
def test_one_commit_to_a_repository_that_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch, private: bool) -> None:
    asked: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            asked.append((repo_id, (private, exist_ok)))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            asked.append((repo_id, folder_path))

    monkeypatch.setattr("ghostssm.checkpoint.hub.HfApi", Api)
    assert push_to_hub(folder, "org/name", private=private) == "https://huggingface.co/org/name"
    assert asked == [("org/name", (private, True)), ("org/name", folder)]


def test_a_hub_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"upload to org/name failed.*whole in .*out; `hf upload org/name"):
        push_to_hub(folder, "org/name")
    assert (folder / "config.json").read_text() == "{}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["name", "org/name/more", "org/na me", "org/", "../name"])
def test_names_that_no_repository_can_have(name: str) -> None:
    with pytest.raises(InputError, match="can't be a repository"):
        check_hub_target(name)


def test_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghostssm.checkpoint.hub.get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        check_hub_target("org/name")

"""TEXT in every form that users name."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ghostssm.errors import TextError
from ghostssm.text.sources import read_text
from ghostssm.text.stdlib import is_held_out, stdlib_texts


def test_plain_jsonl_parquet_and_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first ünï\r\ncode")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n"third"\n')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["fourth", None]}), tmp_path / "c.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.py").write_text("fifth")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_text("no")
    assert read_text(str(tmp_path / "a.txt"), "evaluation").parts == ("first ünï\r\ncode",)
    assert read_text(str(tmp_path / "b.jsonl"), "evaluation").parts == ("second", "third")
    assert read_text(str(tmp_path / "c.parquet"), "evaluation").parts == ("fourth",)
    folder = read_text(str(tmp_path), "evaluation")
    assert folder.parts == ("first ünï\r\ncode", "second", "third", "fourth", "fifth")
    assert folder.joined.startswith("first ünï\r\ncode\n\nsecond\n\nthird")


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    prints = [read_text(str(tmp_path / f"{name}.txt"), "evaluation").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n", "empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8.*0xe9 at offset 3"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("field.jsonl", b'{"body": "a"}', 'line 1: no text.*"text"'),
        ("fake.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(str(tmp_path / name), "calibration")


def test_parquet_without_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="text"):
        read_text(str(tmp_path / "a.parquet"), "calibration")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="stdlib, wikitext2"):
        read_text(str(tmp_path / "nothing"), "calibration")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TextError, match="empty"):
        read_text(str(tmp_path / "folder"), "calibration")


def test_an_unreachable_hub_names_the_file_to_bring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TextError, match=r"--calibration stdlib\); or bring wikitext-2-raw-v1/train-00000-of-00001\.parquet"
    ):
        read_text("wikitext2", "calibration")


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(TextError, match="which does not answer"):
        read_text("wikitext2", "evaluation")
    assert time.monotonic() - begun < 5


def test_wikitext_takes_the_split_of_its_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repository: str, file: str, repo_type: str) -> str:
        path = tmp_path / Path(file).name
        pyarrow.parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", f"{file} {repo_type}"]}), path)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("ghostssm.text.sources.hub_answers", lambda: True)
    calibration, evaluation = (read_text("wikitext2", role) for role in ("calibration", "evaluation"))
    assert "train-0" in calibration.joined
    assert "test-0" in evaluation.joined
    assert calibration.joined.startswith("\n\n = Title = \n\n\n")


def test_stdlib_sides_are_disjoint_and_both_there() -> None:
    calibration, held_out = stdlib_texts(held_out=False), stdlib_texts(held_out=True)
    assert 0 < sum(map(len, held_out)) < 0.3 * sum(map(len, calibration))
    assert not {text for text in held_out if len(text) > 500} & set(calibration)
    assert is_held_out("test_json") == is_held_out("json")
    assert read_text("stdlib", "evaluation").parts == tuple(held_out)


def test_stdlib_split_does_not_move() -> None:
    """The built-in model was trained on one side of it."""
    modules = ("argparse", "ast", "asyncio", "datetime", "email", "heapq", "json", "tarfile", "typing")
    assert [name for name in modules if is_held_out(name)] == ["typing"]

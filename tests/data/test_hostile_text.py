"""Text that is broken, or made to fill the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ghostssm.errors import TextError
from ghostssm.text import files, windows
from ghostssm.text.sources import Text, read_text
from ghostssm.text.windows import cut_windows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("invalid.txt", b"abc\xff\xfe", "not UTF-8.*0xff at offset 3"),
        ("late.txt", b"a" * 10_000 + b"\0", "NUL"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON .*deeply"),
        ("long.jsonl", b"1" * 10_000, "line 1: not JSON"),
        ("half.jsonl", rb'{"text": "\ud800"}', "half of a surrogate pair"),
        ("nul.jsonl", rb'{"text": "a\u0000b"}', "NUL"),
        ("number.jsonl", b'{"text": 1}', "no text"),
        ("empty.parquet", b"", "parquet"),
        ("ends.parquet", b"PAR1" + bytes(100) + b"PAR1", "parquet"),
        ("length.parquet", b"PAR1" + b"\xff" * 8 + b"PAR1", "parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(str(tmp_path / name), "calibration")


def parquet(path: Path, column: pyarrow.Array, name: str = "text") -> str:
    pyarrow.parquet.write_table(pyarrow.table({name: column}), path)
    return str(path)


def test_parquet_columns_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="holds int64; expected strings"):
        read_text(parquet(tmp_path / "a.parquet", pyarrow.array([1, 2])), "calibration")
    with pytest.raises(TextError, match="no column 'text'; found: body"):
        read_text(parquet(tmp_path / "a.parquet", pyarrow.array(["a"]), "body"), "calibration")
    invalid = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    with pytest.raises(TextError, match="parquet"):
        read_text(parquet(tmp_path / "a.parquet", invalid), "calibration")
    with pytest.raises(TextError, match="NUL"):
        read_text(parquet(tmp_path / "a.parquet", pyarrow.array(["a\0"])), "calibration")


def test_parquet_keeps_order_blanks_and_types(tmp_path: Path) -> None:
    rows = ["b", "a", None, "", "b", "ünï"] * 700
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = parquet(tmp_path / "a.parquet", pyarrow.array(rows, pyarrow.string()).cast(kind))
        assert read_text(path, "calibration").parts == tuple(row for row in rows if row is not None)


def test_a_small_parquet_file_of_many_gigabytes_is_refused(tmp_path: Path) -> None:
    """A page of a dictionary with one megabyte, named twenty thousand times."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["a" * (1 << 20)])
    path = parquet(tmp_path / "bomb.parquet", column)
    assert Path(path).stat().st_size < 4 << 20
    with pytest.raises(TextError, match="more than 2 GiB"):
        read_text(path, "calibration")


def test_a_file_of_many_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(TextError, match="more than 2 GiB"):
        read_text(str(tmp_path / "a.txt"), "calibration")


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(TextError):
            read_text(str(path), "calibration")


def test_long_lines_are_tokenised_in_stretches(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bytes as tokens the cuts leave no trace."""
    lines = (json.dumps(list(range(400))), "a" * 3000, "\n\n", "word " * 500)
    whole = cut_windows(Text("lines", lines), tokenizer, 50)
    monkeypatch.setattr(windows, "_STRETCH", 97)
    calls: list[int] = []
    encoded = windows.encoded
    monkeypatch.setattr(windows, "encoded", lambda text, t: (calls.append(len(text)), encoded(text, t))[1])
    assert torch.equal(cut_windows(Text("lines", lines), tokenizer, 50).ids, whole.ids)
    assert max(calls) <= 97


def test_the_bound_counts_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_TEXT_BYTES", 10)
    (tmp_path / "a.txt").write_text("12345678")
    (tmp_path / "b.txt").write_text("12345678")
    read_text(str(tmp_path / "a.txt"), "calibration")
    with pytest.raises(TextError, match="more than"):
        read_text(str(tmp_path), "calibration")

"""Files of rows: JSON Lines, JSON arrays, parquet; their texts and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ghostssm.errors import TextError
from ghostssm.text.sources import read_passages, read_text
from tests.conftest import Run

BREAKS = "\u2028\u2029\u0085\v\f\x1c\x1d\x1e"
"""What str.splitlines cuts at besides line ends."""
TEXTS = ["a\u2028b", "c\u0085d\u2029", "e f"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def written(path: Path, content: str) -> str:
    path.write_bytes(content.encode())
    return str(path)


def parts(path: Path, content: str) -> tuple[str, ...]:
    return read_text(written(path, content), "calibration").parts


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.JSONL", "a.json"])
def test_lines_of_json_end_at_line_feeds_only(tmp_path: Path, name: str, end: str) -> None:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    content = end.join([*rows, "", json.dumps("plain"), ""])
    assert parts(tmp_path / name, content) == (*TEXTS, "plain")
    assert parts(tmp_path / name, "\ufeff" + content) == (*TEXTS, "plain")


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_its_rows(tmp_path: Path, indent: int | None) -> None:
    rows = [*({"id": 1, "text": text} for text in TEXTS), "plain"]
    content = json.dumps(rows, ensure_ascii=False, indent=indent)
    assert parts(tmp_path / "a.json", content) == (*TEXTS, "plain")
    assert parts(tmp_path / "a.json", "\ufeff" + content) == (*TEXTS, "plain")
    assert parts(tmp_path / "a.json", json.dumps({"text": "alone"}, indent=indent)) == ("alone",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": 1}]', "entry 2: no text; .*\"text\". Found 'text'"),
        ('[{"text": "a"},\n{"text": "b"', "not JSON .*expected an array of texts"),
        ("[" * 100_000, "not JSON .*deeply"),
        ("some prose", "not JSON"),
        ("[1, 2]", "entry 1: no text"),
        ("{}", "no text.*Found no key"),
        ('{"text": ["a", "b"]}', "no text"),
        ('[{"text": "a\\u0000"}]', "entry 1: .*NUL"),
        ('{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("[]", "empty"),
        ("", "not JSON"),
    ],
)
def test_json_that_holds_no_texts_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parts(tmp_path / "a.json", content)


def test_a_row_without_text_names_the_keys_that_hold_some(tmp_path: Path) -> None:
    row = json.dumps({"id": 3, "instruction": "a", "output": "b"})
    for name, content in (("a.jsonl", row), ("a.json", f"[{row}]"), ("a.json", row)):
        with pytest.raises(TextError, match="strings under 'instruction', 'output'; rename the key"):
            parts(tmp_path / name, content)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": CHAT}, 'chat messages under "messages"'),
        ({"id": "7", "conversations": SHARED}, 'chat messages under "conversations"'),
        ({"conversation": [{"human": "hi", "assistant": "hello"}]}, 'chat messages under "conversation"'),
        ({"messages": []}, 'chat messages under "messages"'),
        ({"turns": CHAT, "text": None}, 'chat messages under "turns"'),
        (CHAT, "chat messages and no text"),
    ],
)
def test_chats_are_refused_with_what_to_do(tmp_path: Path, row: Any, found: str) -> None:
    line = json.dumps(row)
    (tmp_path / "folder").mkdir()
    files = [("a.jsonl", f"{line}\n{line}"), ("a.json", f"[{line}, {line}]"), ("folder/a.json", f"[{line}]")]
    for name, content in [*files, ("b.json", line)]:
        with pytest.raises(TextError, match=rf"{found}.*apply_chat_template.*\"text\""):
            parts(tmp_path / name, content)
    with pytest.raises(TextError, match="apply_chat_template"):
        read_text(str(tmp_path / "folder"), "calibration")


def test_text_beside_messages_is_taken(tmp_path: Path) -> None:
    assert parts(tmp_path / "a.jsonl", json.dumps({"messages": CHAT, "text": "written out"})) == ("written out",)


def test_parquet_of_chats_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match=r"found: messages.*apply_chat_template"):
        read_text(str(tmp_path / "a.parquet"), "calibration")


def test_a_folder_takes_rows_from_json_and_leaves_other_json_as_it_stands(tmp_path: Path) -> None:
    settings = ['{"name": "x", "text": {"a": 1}}', '// comment\n{"a": 1}', "[1, 2]", '{"messages": "none"}']
    for number, content in enumerate(settings):
        written(tmp_path / f"{number}.json", content)
    written(tmp_path / "rows.json", json.dumps([{"text": text} for text in TEXTS]))
    written(tmp_path / "rows.ndjson", json.dumps({"text": "last"}))
    assert read_text(str(tmp_path), "calibration").parts == (*settings, *TEXTS, "last")


def test_passages_are_lines_or_rows(tmp_path: Path) -> None:
    passages = [f"one{character}two three" for character in BREAKS]
    for end in ("\n", "\r\n"):
        found = read_passages(written(tmp_path / "a.txt", (end + end).join(passages)))
        assert [passage.removesuffix("\r") for passage in found] == passages
    rows = ["first line\nsecond line", " ", "another\u2028one"]
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    assert read_passages(written(tmp_path / "a.jsonl", content)) == [rows[0], rows[2]]
    assert read_passages(written(tmp_path / "a.json", json.dumps(rows))) == [rows[0], rows[2]]
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / "a.txt", "one line\nanother")
    assert read_passages(str(tmp_path / "folder")) == ["one line", "another"]


def test_commands_read_rows(run: Run, small: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the quick\u2028brown\u0085fox {number}"} for number in range(40)]
    lines = written(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    array = written(tmp_path / "a.json", json.dumps(rows))
    losses = []
    for text in (lines, array):
        code, out, _ = run("evaluate", small, "--text", text, "--window-length", 64, "--text-windows", 2, "--json")
        assert code == 0
        losses.append(json.loads(out)["loss"])
        code, out, _ = run("evaluate", small, "--last-words", text, "--limit", 3, "--json")
        assert (code, json.loads(out)["passages"]) == (0, 3)
    assert losses[0] == losses[1]
    chat = written(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}))
    code, _, err = run("prune", small, "--state-size", 8, "--calibration", chat, "--output", tmp_path / "out")
    assert code == 2
    assert 'line 1: chat messages under "messages"' in err

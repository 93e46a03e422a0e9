"""Texts in files: plain ones, JSON, JSON Lines and Parquet, alone or in a folder, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ghostssm.errors import TextError

MOST_TEXT_BYTES = 2 << 30
"""Of one TEXT in memory; a calibration needs a thousandth of it."""
_ROWS_PER_BATCH = 1024
_LISTED_KEYS = 8
_CHAT_KEYS = frozenset({"messages", "conversations", "conversation", "chat", "dialogue", "dialog"})
_CHAT_ADVICE = (
    "Write every conversation out by the model's chat template (tokenizer.apply_chat_template(messages, "
    'tokenize=False)), and store that string under "text".'
)


def read_folder(folder: Path) -> Iterator[str]:
    """Every text file below a folder, in the order of the paths; hidden and binary files are passed over.

    A .json file that holds no rows, such as a program's settings, is text like any other here.
    """
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (path.suffix.lower() == ".parquet" or not _is_binary(path)):
            yield from read_file(path, in_folder=True)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def read_file(path: Path, in_folder: bool = False) -> list[str]:
    """The texts of a file, by its suffix; another one is plain text.

    Raises:
        TextError: unreadable, binary, enormous, or not in the format of its suffix.
    """
    suffix = path.suffix.lower()
    try:
        if in_folder and suffix == ".json" and not _holds_rows(path):
            return _read_plain(path)
        return _ROW_READERS.get(suffix, _read_plain)(path)
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror or error}.") from error


def is_row_format(path: Path) -> bool:
    """Whether a file of this name has a text in every row."""
    return path.suffix.lower() in _ROW_READERS


def check_size(name: str, size: int) -> None:
    """Raise TextError for a text of more than MOST_TEXT_BYTES."""
    if size > MOST_TEXT_BYTES:
        raise TextError(f"The text {name!r} takes more than {MOST_TEXT_BYTES >> 30} GiB; give a part of it.")


def _read_plain(path: Path) -> list[str]:
    check_size(str(path), path.stat().st_size)
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text (byte {raw[error.start]:#04x} at offset {error.start}); convert it to UTF-8."
        ) from None
    if "\0" in text:
        raise TextError(f"{path} holds NUL bytes, so it is a binary file; expected text.")
    return [text]


def _read_jsonl(path: Path) -> list[str]:
    texts = []
    # Lines end at line feeds only: what else str.splitlines cuts at, such as U+2028, may stand in a JSON string.
    for number, line in enumerate(_read_json_source(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise TextError(f"{path}, line {number}: not JSON (nested too deeply).") from None
        except ValueError as error:
            raise TextError(f"{path}, line {number}: not JSON ({error}); expected one value per line.") from None
        texts.append(_text_field(row, f"{path}, line {number}"))
    return texts


def _read_json(path: Path) -> list[str]:
    """An array of rows, one row, or JSON Lines, which often bear this name."""
    raw = _read_json_source(path)
    try:
        document = json.loads(raw)
    except (RecursionError, ValueError) as error:
        if _first_row(raw) is None:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise TextError(
                f"{path}: not JSON ({reason}); expected an array of texts, or one value per line."
            ) from None
        return _read_jsonl(path)
    if isinstance(document, list) and not _is_chat(document):
        return [_text_field(row, f"{path}, entry {number}") for number, row in enumerate(document, 1)]
    return [_text_field(document, str(path))]


def _holds_rows(path: Path) -> bool:
    """Whether a .json file is made of rows of text or chat, as against any other JSON; its first row tells."""
    row = _first_row(_read_json_source(path))
    return (
        isinstance(row, str)
        or _chat_in(row) is not None
        or (isinstance(row, dict) and isinstance(row.get("text"), str))
    )


def _first_row(raw: str) -> Any:
    """The first entry of a JSON array, any other document, or the first line's value; None if there is none."""
    for source in (raw, raw.lstrip().split("\n")[0]):
        try:
            document = json.loads(source)
        except (RecursionError, ValueError):
            continue
        whole = not isinstance(document, list) or _is_chat(document)
        return document if whole else next(iter(document), None)
    return None


def _read_json_source(path: Path) -> str:
    return _read_plain(path)[0].removeprefix("\ufeff")  # some editors begin a file with it


def _text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise TextError(f"{where}: {_no_text(row)}")
    if not is_text(text):
        raise TextError(f"{where}: the text holds NUL or half of a surrogate pair; expected text.")
    return text


def _no_text(row: Any) -> str:
    """What a row has instead of text, and what to do."""
    chat = _chat_in(row)
    if chat is not None:
        return f"{chat} and no text. {_CHAT_ADVICE}"
    expected = 'no text; expected a string, or an object with a string under "text"'
    if not isinstance(row, dict):
        return f"{expected}."
    strings = [name for name, value in row.items() if isinstance(value, str)]
    keys = ", ".join(map(repr, (strings or list(row))[:_LISTED_KEYS])) or "no key"
    if strings:
        return f"{expected}. Found strings under {keys}; rename the key that holds the text."
    return f"{expected}. Found {keys}."


def _chat_in(row: Any) -> str | None:
    """Where the messages of a chat are in a row; None if there are none."""
    if _is_chat(row):
        return "chat messages"
    for key, value in row.items() if isinstance(row, dict) else ():
        if isinstance(value, list) and (key in _CHAT_KEYS or _is_chat(value)):
            return f'chat messages under "{key}"'
    return None


def _is_chat(value: Any) -> bool:
    """Whether a list is one conversation, in the form of messages or in that of ShareGPT."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict) and ({"role", "content"} <= part.keys() or {"from", "value"} <= part.keys())
            for part in value
        )
    )


def is_text(string: str) -> bool:
    """Whether a string has no NUL, and UTF-8 can write it; JSON may escape half of a surrogate pair."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in string


def read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    texts: list[str] = []
    size = 0
    try:
        _check_text_column(pyarrow.parquet.read_schema(path), path)
        # As a dictionary, batch by batch: a few bytes of a parquet file can stand for gigabytes of equal strings.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=["text"]) as file:
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=["text"]):
                rows = batch.column(0)
                size += _characters(rows)
                check_size(str(path), size)
                texts += [value for value in rows.to_pylist() if value is not None]
    except (pyarrow.ArrowException, ValueError, MemoryError) as error:
        raise TextError(
            f"{path} is not a parquet file with a column 'text' ({error}); expected one, or a .txt or .jsonl file."
        ) from error
    if any("\0" in text for text in texts):
        raise TextError(f"{path} holds NUL bytes; expected text.")
    return texts


def _check_text_column(schema: Any, path: Path) -> None:
    import pyarrow

    if schema.names.count("text") != 1:
        advice = "" if _CHAT_KEYS.isdisjoint(schema.names) else f" {_CHAT_ADVICE}"
        raise TextError(f"{path} has no column 'text'; found: {', '.join(schema.names[:_LISTED_KEYS])}.{advice}")
    kind = schema.field("text").type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise TextError(f"The column 'text' of {path} holds {kind}; expected strings.")


def _characters(rows: Any) -> int:
    """Bytes of all strings of an array, without making them."""
    import pyarrow.compute as pc

    encoded = hasattr(rows, "dictionary")
    lengths = pc.binary_length(rows.dictionary).take(rows.indices) if encoded else pc.binary_length(rows)
    return int(pc.sum(lengths).as_py() or 0)


_ROW_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": read_parquet,
}

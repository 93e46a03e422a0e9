"""TEXT as users name it: a file, a folder, ``wikitext2`` or ``stdlib``, turned into a list of strings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ghostssm.errors import InputError, TextError
from ghostssm.network import hub_answers
from ghostssm.progress import stage
from ghostssm.text.stdlib import stdlib_texts
from ghostssm.values import Value, short

Role = Literal["calibration", "evaluation"]
"""Named corpora have a side to calibrate on and another to evaluate on."""


MOST_TEXT_BYTES = 2 << 30
"""Of one TEXT in memory; a calibration needs a thousandth of it."""
_ROWS_PER_BATCH = 1024
_LISTED_KEYS = 8
_CHAT_KEYS = frozenset({"messages", "conversations", "conversation", "chat", "dialogue", "dialog"})
_CHAT_ADVICE = (
    "Write every conversation out by the model's chat template (tokenizer.apply_chat_template(messages, "
    'tokenize=False)), and store that string under "text".'
)


@dataclass(frozen=True, repr=False)
class Text(Value):
    """A corpus in memory.

    Attributes:
        name: what the user called it, with the side that was taken of a named corpus.
        parts: its texts, in order.
    """

    name: str
    parts: tuple[str, ...]

    @classmethod
    def from_strings(cls, strings: str | Iterable[str], *, name: str = "strings") -> Text:
        """A text made of one string or of several.

        Args:
            strings: one, or several.
            name: what manifests and reports call it.

        Raises:
            TextError: something else among them, or nothing but blanks.
        """
        several = isinstance(strings, Iterable) and not isinstance(strings, str)
        parts: tuple[Any, ...] = tuple(strings) if several else (strings,)
        for number, part in enumerate(parts, 1):
            if not isinstance(part, str):
                found = f"{short(part)} as string {number}" if several else short(part)
                raise TextError(
                    f"Found {found}; expected strings: ghostssm.Text.from_strings(['One text.', 'Another one.'])."
                )
            if "\0" in part or not _is_encodable(part):
                raise TextError(f"String {number} of {name!r} holds NUL or half of a surrogate pair; expected text.")
        return _checked(cls(name, parts))

    def __repr__(self) -> str:
        parts = f"{len(self.parts):,} parts, " if len(self.parts) != 1 else ""
        begin = next((part for part in self.parts if part.strip()), "")
        return f"<Text {self.name!r}: {parts}{sum(map(len, self.parts)):,} characters, {short(begin)}>"

    @property
    def joined(self) -> str:
        """The texts joined by blank lines, as the usual perplexity protocol has it."""
        return "\n\n".join(self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the joined text, hexadecimal."""
        return hashlib.sha256(self.joined.encode()).hexdigest()


def read_text(spec: str | Path, role: Role = "calibration") -> Text:
    """Read a TEXT.

    Args:
        spec: ``stdlib``, ``wikitext2``, or the path of a .txt, .jsonl, .json or .parquet file or of a folder of text.
            Rows of the last three are strings, or objects with a string under "text".
        role: ``calibration`` or ``evaluation``, which side of a named corpus to take; a path gives all of its text.

    Raises:
        TextError: missing, unreadable, binary, empty or enormous text, or a corpus that could not be fetched.
        InputError: no such role, or neither a name nor a path.
    """
    if not isinstance(spec, str | Path):
        raise InputError(
            f"Found {short(spec)} in place of a text's name or path; what is in memory becomes a text by "
            "ghostssm.Text.from_strings(strings)."
        )
    if role not in get_args(Role):
        raise InputError(f"The role is {short(role)}; expected {' or '.join(map(repr, get_args(Role)))}.")
    name = str(spec)
    with stage(f"reading {name}"):
        return _checked(Text(text_title(name, role), tuple(iterate_text(name, role))))


def text_title(spec: str, role: Role) -> str:
    """What a TEXT is called: by its user, with the side that is taken of a named corpus."""
    return f"{spec} ({_SIDES[spec][role]})" if spec in _SIDES else spec


def iterate_text(spec: str, role: Role) -> Iterator[str]:
    """The parts of a TEXT, of a folder one file in memory at a time; arguments and errors as `read_text`."""
    if spec in _CORPORA:
        yield from _CORPORA[spec](role)
    elif _is_there(spec):
        yield from _read_folder(Path(spec)) if Path(spec).is_dir() else _read_file(Path(spec))
    else:
        raise _no_text_at(spec)


def _no_text_at(spec: str) -> TextError:
    return TextError(
        f"No text at {short(spec)}; expected a .txt, .jsonl, .json or .parquet file, a folder of text, or one of: "
        f"{', '.join(_CORPORA)}. A string that is the text itself: ghostssm.Text.from_strings(string)."
    )


def is_corpus(spec: object) -> bool:
    """Whether something is the name of a corpus, which has a side to evaluate on."""
    return isinstance(spec, str) and spec in _CORPORA


def is_text_name(spec: str) -> bool:
    """Whether a string names a corpus, or a file or folder that is there."""
    return spec in _CORPORA or _is_there(spec)


def _is_there(name: str) -> bool:
    path = Path(name)
    try:
        return bool(name.strip()) and (path.is_dir() or path.is_file())
    except (OSError, ValueError):  # longer than any name, or with a NUL in it
        return False


def read_passages(spec: str) -> list[str]:
    """Texts to be measured one by one, without blank ones: the rows of a .jsonl, .json or .parquet file, else lines.

    Raises:
        TextError: as `read_text`.
    """
    text = read_text(spec, "evaluation")
    # A passage that has a row of its own may hold line breaks. Lines end at "\n" only: what else str.splitlines cuts at
    # may stand within a sentence.
    pieces = text.parts if Path(spec).suffix.lower() in _ROW_READERS else text.joined.split("\n")
    return [piece for piece in pieces if piece.strip()]


def _checked(text: Text) -> Text:
    if not any(part.strip() for part in text.parts):
        raise TextError(f"The text {text.name!r} is empty; expected running text.")
    _check_size(text.name, sum(map(len, text.parts)))
    return text


def _check_size(name: str, size: int) -> None:
    if size > MOST_TEXT_BYTES:
        raise TextError(f"The text {name!r} takes more than {MOST_TEXT_BYTES >> 30} GiB; give a part of it.")


def _stdlib(role: Role) -> list[str]:
    return stdlib_texts(role == "evaluation")


def _wikitext2(role: Role) -> list[str]:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    split = "train" if role == "calibration" else "test"
    repository, file = "Salesforce/wikitext", f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
    option = "--calibration" if role == "calibration" else "--text"
    fault = "wikitext2 could not be fetched from the hub"
    advice = (
        f"Name another text, such as a .txt file or stdlib ({option} stdlib); or bring {file} of the dataset "
        f"{repository} here and name that file."
    )
    path = try_to_load_from_cache(repository, file, repo_type="dataset")  # it does not change
    if not isinstance(path, str):
        if not hub_answers():
            raise TextError(f"{fault}, which does not answer. {advice}")
        try:
            with stage("fetching wikitext2 from the hub"):
                path = hf_hub_download(repository, file, repo_type="dataset")
        except Exception as error:  # the hub client's faults share no base class
            raise TextError(
                f"wikitext2 could not be fetched from the hub ({type(error).__name__}). {advice}"
            ) from error
    return _read_parquet(Path(path))


_CORPORA: dict[str, Callable[[Role], list[str]]] = {"stdlib": _stdlib, "wikitext2": _wikitext2}
_SIDES = {
    "stdlib": {"calibration": "calibration modules", "evaluation": "held-out modules"},
    "wikitext2": {"calibration": "train split", "evaluation": "test split"},
}


def _read_folder(folder: Path) -> Iterator[str]:
    """Every text file below a folder, in the order of the paths; hidden and binary files are passed over.

    A .json file that holds no rows, such as a program's settings, is text like any other here.
    """
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (path.suffix.lower() == ".parquet" or not _is_binary(path)):
            yield from _read_file(path, in_folder=True)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _read_file(path: Path, in_folder: bool = False) -> list[str]:
    suffix = path.suffix.lower()
    try:
        if in_folder and suffix == ".json" and not _holds_rows(path):
            return _read_plain(path)
        return _ROW_READERS.get(suffix, _read_plain)(path)
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror or error}.") from error


def _read_plain(path: Path) -> list[str]:
    _check_size(str(path), path.stat().st_size)
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
    if "\0" in text or not _is_encodable(text):
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
    found = ", ".join(map(repr, (strings or list(row))[:_LISTED_KEYS])) or "no key"
    if strings:
        return f"{expected}. Found strings under {found}; rename the key that holds the text."
    return f"{expected}. Found {found}."


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


def _is_encodable(text: str) -> bool:
    """Whether UTF-8 can write a string; JSON may escape half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> list[str]:
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
                _check_size(str(path), size)
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
    ".parquet": _read_parquet,
}

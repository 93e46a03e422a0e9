"""TEXT as users name it: a file, a folder, ``wikitext2`` or ``stdlib``, turned into a list of strings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ghostssm.errors import InputError, TextError
from ghostssm.extras import check_installed
from ghostssm.network import hub_answers
from ghostssm.progress import stage
from ghostssm.text.files import check_size, is_row_format, is_text, read_file, read_folder, read_parquet
from ghostssm.text.stdlib import stdlib_texts
from ghostssm.values import Value, short

Role = Literal["calibration", "evaluation"]
"""Named corpora have a side to calibrate on and another to evaluate on."""


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
            if not is_text(part):
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
    check_text(spec)
    if spec in _CORPORA:
        yield from _CORPORA[spec](role)
    else:
        yield from read_folder(Path(spec)) if Path(spec).is_dir() else read_file(Path(spec))


def check_text(spec: str, more: str = "") -> None:
    """Raise TextError for the name of a text that is not there; ``more`` ends its message."""
    if not is_text_name(spec):
        raise TextError(
            f"No text at {short(spec)}; expected a .txt, .jsonl, .json or .parquet file, a folder of text, or one of: "
            f"{', '.join(_CORPORA)}. Check the path; text itself goes into a .txt file.{more}"
        )


def check_streamable(spec: str) -> None:
    """Raise TextError for the name of a text that is not there, nor can be a dataset's on the hub."""
    if is_dataset(spec):
        check_installed(f"{spec!r} is no file here, and a dataset on the hub", "datasets", kind=TextError)
    else:
        check_text(spec)


def is_corpus(spec: object) -> bool:
    """Whether something is the name of a corpus, which has a side to evaluate on."""
    return isinstance(spec, str) and spec in _CORPORA


def is_text_name(spec: str) -> bool:
    """Whether a string names a corpus, or a file or folder that is there."""
    return spec in _CORPORA or _is_there(spec)


def is_dataset(spec: str) -> bool:
    """Whether a TEXT is a dataset on the hub: ORG/NAME, and nothing of that name here."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not Path(spec).exists()


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
    pieces = text.parts if is_row_format(Path(spec)) else text.joined.split("\n")
    return [piece for piece in pieces if piece.strip()]


def _checked(text: Text) -> Text:
    if not any(part.strip() for part in text.parts):
        raise TextError(f"The text {text.name!r} is empty; expected running text.")
    check_size(text.name, sum(map(len, text.parts)))
    return text


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
            raise TextError(f"{fault} ({type(error).__name__}). {advice}") from error
    return read_parquet(Path(path))


_CORPORA: dict[str, Callable[[Role], list[str]]] = {"stdlib": _stdlib, "wikitext2": _wikitext2}
_SIDES = {
    "stdlib": {"calibration": "calibration modules", "evaluation": "held-out modules"},
    "wikitext2": {"calibration": "train split", "evaluation": "test split"},
}

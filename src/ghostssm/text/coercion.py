"""Whatever a caller has in place of a text or of windows becomes one of these; no other module guesses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ghostssm.errors import InputError, TextError
from ghostssm.text.sources import Role, Text, check_text, is_text_name, read_text
from ghostssm.text.windows import EVALUATION_SEED, Windows, cut_windows, evaluation_windows
from ghostssm.values import short

GivenText: TypeAlias = str | PathLike[str] | Text | Windows | Tensor | Iterable[Any]
"""A corpus's name, a path, the text itself as a string or strings, a ``datasets.Dataset``, or token ids."""
_LONGEST_PATH = 250
"""Characters: a longer string is text, not a path that isn't there."""
_COLUMN = "text"
_EXPECTED = (
    "expected a name (stdlib, wikitext2), a path, a string or strings of text, a datasets.Dataset, or token ids: "
    "ghostssm.prune(model, ['One text.', 'Another one.'], state_size=64)"
)


def given_text(
    given: GivenText, role: Role = "calibration", column: str | None = None, length: int | None = None
) -> Text | Windows:
    """What a caller gave, as a text; as windows if it holds token ids.

    Args:
        given: a `Text` or `Windows`, taken as they are; the name or path of a text, as `read_text` has it; a string
            that is longer than 250 characters or has line breaks, which is the text itself; strings; a table with named
            columns, such as a ``datasets.Dataset``; or token ids, as `Windows.from_ids` has them, with ``length``.
        role: the side to take of a named corpus.
        column: of a table: the one with the text. If not given, ``text`` or the only one with strings.

    Raises:
        InputError: something else. TextError: as `read_text` and `Text.from_strings`.
    """
    columns = None if isinstance(given, str | Text | Windows | Tensor) else getattr(given, "column_names", None)
    if isinstance(columns, list):
        return _of_table(given, columns, column)
    if column is not None:
        raise InputError(f"column={column!r} is of a datasets.Dataset; found {short(given)}, so leave it out.")
    if isinstance(given, Text | Windows):
        return given
    if isinstance(given, str) and not is_name(given):
        return Text.from_strings(given, name="a string")
    check_there(given)
    if isinstance(given, str | PathLike):
        return read_text(Path(given) if isinstance(given, PathLike) else given, role)
    if isinstance(given, Mapping):
        raise InputError(
            f"Found entries {', '.join(map(repr, list(given)[:8]))}; give one of them, such as data['train']."
        )
    if isinstance(given, Tensor) or hasattr(given, "__array__") or _begins_with_ids(given):
        return Windows.from_ids(given, length)
    if isinstance(given, Iterable) and not isinstance(given, bytes):
        return Text.from_strings(given)
    raise InputError(f"Found {short(given)} in place of a text; {_EXPECTED}.")


def is_name(given: GivenText) -> bool:
    """Whether a caller gave a corpus's name or a path, rather than the text itself."""
    if isinstance(given, str):
        return is_text_name(given) or not (len(given) > _LONGEST_PATH or "\n" in given)
    return isinstance(given, PathLike)


def check_there(given: GivenText | None) -> None:
    """Raise TextError for a string that names no text that is there."""
    if isinstance(given, str) and is_name(given):
        check_text(given, " In Python: ghostssm.Text.from_strings(string).")


def given_windows(
    given: GivenText,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    count: int | None,
    *,
    seed: int = EVALUATION_SEED,
    role: Role = "calibration",
    column: str | None = None,
    vocab_size: int | None = None,
) -> Windows:
    """What a caller gave, as windows.

    Args:
        given, role, column: as `given_text`. `Windows` are taken as they are, all of them.
        tokenizer: that cuts a text; token ids need none.
        seed: of the draw of windows to calibrate on. Those to evaluate on are drawn as `evaluation_windows` does.
        vocab_size: of the model, if ids are to be checked against it.

    Raises:
        InputError, TextError: as `given_text` and `cut_windows`; a text without a tokenizer, or ids that the model does
            not know.
    """
    text = given_text(given, role, column, length)
    if isinstance(text, Windows):
        windows = text if isinstance(given, Windows) else text.drawn(count, seed)
        highest = int(windows.ids.max())
        if vocab_size is not None and highest >= vocab_size:
            raise InputError(f"The ids go up to {highest}, the model knows {vocab_size}; expected its own tokenizer's.")
        return windows
    if tokenizer is None:
        raise InputError(
            "The model came without a tokenizer, which text needs; give tokenizer=AutoTokenizer.from_pretrained(...), "
            "or token ids in place of text."
        )
    if role == "evaluation":
        return evaluation_windows(text, tokenizer, length, count)
    return cut_windows(text, tokenizer, length, count, seed)


def _of_table(table: Any, columns: list[str], column: str | None) -> Text:
    """The strings in a column of a ``datasets.Dataset``."""
    if column is not None and column not in columns:
        raise InputError(f"The data set has no column {column!r}; found: {', '.join(columns)}.")
    if column is None:
        first: Mapping[str, Any] = next(iter(table), {})
        strings = [name for name in columns if isinstance(first.get(name), str)]
        if _COLUMN not in strings and len(strings) != 1:
            raise InputError(
                f"Found strings in {', '.join(strings) or 'no column'} of the data set's columns {', '.join(columns)}; "
                f"name the one with the text: column={(strings or columns or [_COLUMN])[0]!r}."
            )
        column = _COLUMN if _COLUMN in strings else strings[0]
    rows = [value for value in table[column] if value is not None]
    if not all(isinstance(value, str) for value in rows):
        raise TextError(f"The column {column!r} of the data set holds {short(rows[0])}; expected strings.")
    return Text.from_strings(rows, name=f"a data set's column {column}")


def _begins_with_ids(given: Any) -> bool:
    """Whether a list begins with a number, or with a list that does."""
    if not isinstance(given, list | tuple) or not given:
        return False
    return isinstance(given[0], int | Tensor) or _begins_with_ids(given[0])

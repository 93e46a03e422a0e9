"""Whatever a caller has in place of a text becomes the same windows as the file with that text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import ghostssm
from ghostssm.text.coercion import given_windows

STRINGS = tuple(f"{n} men went to mow\nwent to mow meadow {n * n}" for n in range(60))


class Table:
    """As much of a ``datasets.Dataset`` as is asked for."""

    def __init__(self, **columns: list[Any]):
        self.columns = columns
        self.column_names = list(columns)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True))

    def __getitem__(self, column: str) -> list[Any]:
        return self.columns[column]


@pytest.fixture
def ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Windows of the strings in a file, drawn with a seed."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": string}) + "\n" for string in STRINGS))
    return ghostssm.cut_windows(ghostssm.read_text(path), tokenizer, 32, 4, seed=7).ids


@pytest.mark.parametrize(
    "given",
    [
        lambda folder: str(folder / "text.jsonl"),
        lambda folder: folder / "text.jsonl",
        lambda folder: ghostssm.read_text(folder / "text.jsonl"),
        lambda folder: ghostssm.Text.from_strings(STRINGS),
        lambda folder: list(STRINGS),
        lambda folder: iter(STRINGS),
        lambda folder: np.array(STRINGS).tolist(),
        lambda folder: "\n\n".join(STRINGS),
        lambda folder: Table(number=list(range(60)), text=list(STRINGS), title=["x"] * 60),
        lambda folder: Table(number=list(range(60)), content=list(STRINGS)),
    ],
)
def test_every_kind_of_text_gives_the_same_windows(
    given: Callable[[Path], Any], ids: torch.Tensor, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert torch.equal(given_windows(given(tmp_path), tokenizer, 32, 4, seed=7).ids, ids)


def test_a_column_is_named_where_several_hold_strings(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    table = Table(title=["x"] * 60, body=list(STRINGS))
    assert torch.equal(given_windows(table, tokenizer, 32, 4, seed=7, column="body").ids, ids)
    for column, told in ((None, "Found strings in title, body .* column='title'"), ("nope", "no column 'nope'")):
        with pytest.raises(ghostssm.InputError, match=told):
            given_windows(table, tokenizer, 32, 4, column=column)
    with pytest.raises(ghostssm.TextError, match="column 'n' of the data set holds 1; expected strings"):
        given_windows(Table(n=[1]), tokenizer, 32, 4, column="n")


def test_a_data_set_of_the_library(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    table = datasets.Dataset.from_dict({"number": list(range(60)), "text": list(STRINGS)})
    assert torch.equal(given_windows(table, tokenizer, 32, 4, seed=7).ids, ids)
    with pytest.raises(ghostssm.InputError, match="'train'"):
        given_windows(datasets.DatasetDict(train=table), tokenizer, 32, 4)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, lambda rows: [torch.tensor(row) for row in rows]])
def test_ids_in_rows_are_taken_as_they_are(kind: Callable[[list[list[int]]], Any]) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    windows = ghostssm.Windows.from_ids(kind(rows))
    assert windows.ids.tolist() == rows
    assert given_windows(kind(rows), None, 2048, None).ids.tolist() == rows
    assert windows.fingerprint == windows.text_fingerprint


def test_one_row_of_ids_is_cut() -> None:
    assert ghostssm.Windows.from_ids(range(7), 3).ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert ghostssm.Windows.from_ids([5, 6, 7]).ids.tolist() == [[5, 6, 7]]
    drawn = given_windows(torch.arange(40), None, 4, 3, seed=1)
    assert all(row[0] % 4 == 0 and row == list(range(row[0], row[0] + 4)) for row in drawn.ids.tolist())
    assert (len(drawn), drawn.seed) == (3, 1)


@pytest.mark.parametrize(
    "wrong", [[[1, 2], [3]], [[1.5, 2.0]], [[True, False]], [[[1, 2]]], [[-1, 2]], [], [[]], [[3]], "text", None]
)
def test_what_are_no_ids(wrong: Any) -> None:
    with pytest.raises(ghostssm.InputError, match="expected"):
        ghostssm.Windows.from_ids(wrong)


@pytest.mark.parametrize("wrong", [7, None, b"bytes", object(), {"train": []}, ["text", 3], [], "", "  \n "])
def test_what_is_no_text(wrong: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ghostssm.InputError):
        given_windows(wrong, tokenizer, 32, 4)


def test_a_name_that_is_not_there_is_no_text_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ghostssm.TextError, match=r"No text at 'my notes.txt'.*Text.from_strings"):
        given_windows("my notes.txt", tokenizer, 32, 4)


def test_ids_that_the_model_does_not_know() -> None:
    with pytest.raises(ghostssm.InputError, match="go up to 9, the model knows 9"):
        given_windows([[8, 9]], None, 2, None, vocab_size=9)


@pytest.mark.parametrize("wrong", [["a list"], 3, None])
def test_functions_that_want_a_text_show_the_right_call(wrong: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    for call in (ghostssm.cut_windows, ghostssm.evaluation_windows):
        with pytest.raises(ghostssm.InputError, match=r"ghostssm.Text.from_strings"):
            call(wrong, tokenizer, 32)
        with pytest.raises(ghostssm.InputError, match="in place of a tokenizer"):
            call(ghostssm.Text.from_strings(STRINGS), wrong, 32)
    with pytest.raises(ghostssm.InputError, match=r"ghostssm.Text.from_strings"):
        ghostssm.read_text(wrong)

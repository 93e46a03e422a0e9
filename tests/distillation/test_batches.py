"""Batches from a text: each window once per epoch, held-out ones never, and the same again from any place."""

from __future__ import annotations

import random
import string
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ghostssm.errors import TextError
from ghostssm.recovery.distill.batches import Batches, HeldWindows
from ghostssm.text.overlap import Overlap
from ghostssm.text.streams import Place, StreamedText
from tests.conftest import random_windows


def _rows(ids: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


@pytest.fixture
def streamed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> StreamedText:
    """Many files of all lengths, some shorter than a window, some longer than a stretch."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, length in enumerate([3, 700, 1, 90, 40, 333, 5, 5, 260]):
        letters = random.Random(number).choices(string.ascii_lowercase, k=length)
        (folder / f"{number}.txt").write_text("".join(letters))
    return StreamedText(str(folder), tokenizer, length=12, windows_at_once=20)


def test_every_window_once_per_epoch() -> None:
    windows = random_windows(23, 6)
    batches = Batches(HeldWindows(windows), batch=3, seed=1)
    held_out = _rows(batches.held_out)
    assert len(held_out) == 2
    epochs = _rows(torch.cat([batches.take() for _ in range(14)]))
    for epoch in (epochs[:21], epochs[21:]):
        assert sorted(epoch + held_out) == sorted(_rows(windows.ids))
    assert epochs[:21] != epochs[21:]


def test_another_seed_another_order() -> None:
    first, second = (Batches(HeldWindows(random_windows(23, 6)), 4, seed) for seed in (1, 2))
    assert torch.equal(first.held_out, second.held_out)
    assert not torch.equal(first.take(), second.take())


def test_a_stream_is_cut_like_the_whole_text(streamed: StreamedText) -> None:
    """Parts joined by blank lines, wherever stretches end."""
    texts = [path.read_text() for path in sorted(Path(streamed.spec).iterdir())]
    whole = streamed.tokenizer("".join(f"{text}\n\n" for text in texts))["input_ids"]
    stretches = streamed.stretches(Place())
    found: list[tuple[int, ...]] = []
    while len(found) < len(whole) // 12:
        windows, place = next(stretches)
        found += _rows(windows)
    assert found == [tuple(whole[i : i + 12]) for i in range(0, len(whole) - 11, 12)]
    assert place == Place(1)


def test_going_on_from_any_place(streamed: StreamedText) -> None:
    """Also within a stretch, and across epochs."""
    reference = Batches(streamed, batch=7, seed=3)
    states, taken = [], []
    for _ in range(50):
        states.append(reference.state())
        taken.append(reference.take())
    assert len({state["place"]["epoch"] for state in states}) > 2
    held_out = set(_rows(reference.held_out))
    assert held_out.isdisjoint(_rows(torch.cat(taken)))
    for start in (0, 1, 11, 19, 40):
        again = Batches(streamed, batch=7, seed=3)
        again.restore(states[start])
        for expected in taken[start:]:
            assert torch.equal(again.take(), expected)
        assert again.tokens_sha256 == reference.tokens_sha256


def test_what_was_also_watched_for(streamed: StreamedText) -> None:
    """Wherever it begins; and it is kept by a state."""
    windows = random_windows(6, 96)
    shifted = torch.cat([torch.zeros(2, 5, dtype=torch.long), windows.ids[:2], windows.ids[3:5]], dim=1)
    overlap = Overlap([windows.ids[1:4], random_windows(3, 40, seed=9).ids])
    assert overlap.share == 0
    overlap.see(shifted)
    assert overlap.share == pytest.approx(6 / 12)  # all of the second window and the fourth, nothing of the third
    overlap.see(shifted)
    assert overlap.share == pytest.approx(6 / 12)
    batches = Batches(HeldWindows(windows), 2, 0, [windows.ids])
    while batches.state()["place"]["epoch"] == 0:
        batches.take()
    again = Batches(HeldWindows(windows), 2, 0, [windows.ids])
    again.restore(batches.state())
    assert again.overlap.share == batches.overlap.share == pytest.approx(5 / 6)
    assert Batches(streamed, 1, 0).overlap.share is None


def test_too_short_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * 60)
    with pytest.raises(
        TextError, match="has 5 windows of 12 tokens, of which 1 must be held out, fewer than one batch"
    ):
        Batches(StreamedText(str(file), tokenizer, 12), 5, 0)
    with pytest.raises(TextError, match="fewer tokens than one window of 100"):
        Batches(StreamedText(str(file), tokenizer, 100), 1, 0)
    with pytest.raises(TextError, match="No text at"):
        Batches(StreamedText(str(tmp_path / "none.txt"), tokenizer, 12), 1, 0)


def test_a_dataset_needs_its_package(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(TextError, match=r"pip install 'ghostssm\[distill\]'"):
        Batches(StreamedText("org/corpus", tokenizer, 12), 1, 0)


def test_a_dataset_on_the_hub(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are asked for as they are needed, and skipped where a run goes on."""
    asked: list[tuple[str, str, bool]] = []

    class Rows:
        def __init__(self, first: int = 0):
            self.first = first

        def skip(self, count: int) -> Rows:
            return Rows(count)

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([{"text": f"row {number} of the corpus"} for number in range(self.first, 40)])

    class Datasets:
        __spec__ = ModuleSpec("datasets", None)  # as an installed package has

        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> Rows:
            asked.append((name, split, streaming))
            return Rows()

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    stream = StreamedText("org/corpus", tokenizer, 10, windows_at_once=8)
    stretches = stream.stretches(Place())
    _, place = next(stretches)
    following, _ = next(stretches)
    assert asked == [("org/corpus", "train", True)]
    assert place.part > 0
    assert torch.equal(next(stream.stretches(place))[0], following)

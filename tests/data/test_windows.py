"""Windows of token ids."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ghostssm.errors import InputError, TextError
from ghostssm.text.sources import Text
from ghostssm.text.windows import cut_windows, evaluation_windows
from tests.conftest import random_windows

TEXT = Text("numbers", tuple(str(n) for n in range(500)))


def test_windows_cover_the_joined_text_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = cut_windows(TEXT, tokenizer, 100)
    joined = TEXT.joined
    assert tokenizer.decode(windows.ids.flatten()) == joined[: len(windows) * 100]
    assert len(windows) == len(joined) // 100
    assert windows.bytes_per_token == 1.0
    assert (windows.text_name, windows.text_fingerprint) == ("numbers", TEXT.fingerprint)


def test_a_seeded_draw_repeats_and_does_not_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    everything = cut_windows(TEXT, tokenizer, 50).ids
    drawn = cut_windows(TEXT, tokenizer, 50, count=10, seed=1).ids
    assert torch.equal(drawn, cut_windows(TEXT, tokenizer, 50, count=10, seed=1).ids)
    assert not torch.equal(drawn, cut_windows(TEXT, tokenizer, 50, count=10, seed=2).ids)
    places = [int((everything == row).all(1).nonzero()[0]) for row in drawn]
    assert len(set(places)) == 10
    assert places != sorted(places)


def test_windows_to_measure_on_are_drawn_from_all_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = cut_windows(TEXT, tokenizer, 50)
    for count in (None, len(whole), 1000):
        windows = evaluation_windows(TEXT, tokenizer, 50, count)
        assert torch.equal(windows.ids, whole.ids)
        assert windows.seed is None
    drawn = evaluation_windows(TEXT, tokenizer, 50, 8)
    assert drawn.seed is not None
    assert torch.equal(drawn.ids, cut_windows(TEXT, tokenizer, 50, 8, drawn.seed).ids)


def test_more_windows_than_there_are_gives_all(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(cut_windows(TEXT, tokenizer, 400, count=128, seed=0)) == len(TEXT.joined) // 400


def test_bytes_per_token_counts_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert cut_windows(Text("umlauts", ("ä" * 100,)), tokenizer, 10).bytes_per_token == 1.0


def test_text_shorter_than_a_window(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TextError, match="has 5 tokens, fewer than one window of 6"):
        cut_windows(Text("short", ("abcde",)), tokenizer, 6)


@pytest.mark.parametrize(("length", "count"), [(1, None), (0, None), (10, 0)])
def test_impossible_requests(tokenizer: PreTrainedTokenizerFast, length: int, count: int | None) -> None:
    with pytest.raises(InputError):
        cut_windows(TEXT, tokenizer, length, count)


@pytest.mark.parametrize(("count", "length"), [(7, 600), (3, 5000), (1, 2)])
def test_batches_cover_every_window_once(count: int, length: int) -> None:
    windows = random_windows(count, length)
    assert torch.equal(torch.cat([windows.ids[span] for span in windows.batches()]), windows.ids)

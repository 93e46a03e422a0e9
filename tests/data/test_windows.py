"""Windows of token ids."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from ghostssm.errors import InputError, TextError
from ghostssm.text import windows as windows_module
from ghostssm.text.sources import Text
from ghostssm.text.windows import Windows, cut_windows, evaluation_windows
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


LONG = Text("a count", (" ".join(map(str, range(20000))),))


def drawn_places(windows: Windows, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where the windows begin in the long text, in which no two places are alike."""
    places = [LONG.joined.find(tokenizer.decode(row)) for row in windows.ids]
    assert -1 not in places
    return places


def test_windows_are_drawn_without_tokenising_all_of_a_text(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encoded = windows_module.encoded
    monkeypatch.setattr(windows_module, "encoded", lambda text, t: (seen.append(len(text)), encoded(text, t))[1])
    for cut in (
        lambda: cut_windows(LONG, tokenizer, 64, 8, seed=3),
        lambda: evaluation_windows(LONG, tokenizer, 64, 8),
        lambda: cut_windows(LONG, tokenizer, 64, 8),
    ):
        seen.clear()
        assert cut().ids.shape == (8, 64)
        assert sum(seen) <= 8 * 64 * 8 < len(LONG.joined) / 20


def test_windows_that_are_drawn_apart_repeat_and_do_not_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(20):
        drawn = cut_windows(LONG, tokenizer, 64, 50, seed=seed)
        assert torch.equal(drawn.ids, cut_windows(LONG, tokenizer, 64, 50, seed=seed).ids)
        assert torch.equal(drawn.ids[:8], cut_windows(LONG, tokenizer, 64, 8, seed=seed).ids)
        places = sorted(drawn_places(drawn, tokenizer))
        assert min(b - a for a, b in pairwise(places)) >= 64
        assert (drawn.bytes_per_token, drawn.seed) == (1.0, seed)


def test_every_place_is_as_likely_to_be_drawn(tokenizer: PreTrainedTokenizerFast) -> None:
    """Over many seeds the windows cover all of the text, no tenth of it more than others."""
    places = torch.tensor(
        [place for seed in range(150) for place in drawn_places(cut_windows(LONG, tokenizer, 32, 20, seed), tokenizer)]
    )
    counts = torch.histc(places.double(), 10, 0, len(LONG.joined))
    assert counts.min() > 240  # of 300 on average; the standard deviation is 16
    assert counts.max() < 360
    assert len(set((places % 256 // 32).tolist())) == 8


def test_a_text_of_few_tokens_per_character_is_tokenised_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    )
    words.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    sparse = Text("sparse", (("word" + " " * 96) * 2000,))
    drawn = cut_windows(sparse, words, 50, 10, seed=1)
    assert drawn.ids.tolist() == [[1] * 50] * 10
    assert round(drawn.bytes_per_token) == 100

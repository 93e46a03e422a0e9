"""The last words of passages, against the plain forward."""

from __future__ import annotations

import pytest
import torch
from transformers import Mamba2ForCausalLM, PreTrainedTokenizerFast

from ghostssm.errors import InputError
from ghostssm.evaluation.recall import last_words
from tests.conftest import tiny_model


def test_last_words_equal_those_of_the_plain_forward(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    passages = ["the quick brown fox", "  two dogs\n", "one x"]
    expected = []
    for passage, answer in zip(passages, (" fox", " dogs", " x"), strict=True):
        ids = torch.tensor([tokenizer(passage.strip())["input_ids"]])
        count = len(answer)  # a byte is a token
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -count - 1 : -1].double()
        expected.append(-logits.log_softmax(-1).gather(1, ids[0, -count:, None]).sum())
    found = last_words(model, tokenizer, passages)
    torch.testing.assert_close(found.losses, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert not found.correct.any()


def model_that_continues(text: str, tokenizer: PreTrainedTokenizerFast) -> Mamba2ForCausalLM:
    """After each of the text's characters, all different, its likeliest token is the text's next one."""
    model = tiny_model(tie_word_embeddings=False)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.out_proj.weight.zero_()
        for weight, rows in ((model.backbone.embeddings.weight, tokens[:-1]), (model.lm_head.weight, tokens[1:])):
            weight.zero_()
            weight[rows, torch.arange(len(rows))] = 1.0
    return model


def test_a_word_is_right_if_every_token_is(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_that_continues("tea pot", tokenizer)
    found = last_words(model, tokenizer, ["a tea pot", "a tea pat", "a tea tot", "a cup pot", "tea po"])
    assert found.correct.tolist() == [True, False, False, False, True]
    assert found.accuracy == pytest.approx(2 / 5)


@pytest.mark.parametrize("passage", ["word", " word ", ""])
def test_a_passage_of_one_word_is_an_error(passage: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="fewer than two words"):
        last_words(tiny_model(), tokenizer, ["two words", passage])

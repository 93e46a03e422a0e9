"""GGUF files, run in llama.cpp: the same logits and the same token ids as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

import ghostssm
from ghostssm.text.sources import read_text
from tests.conftest import random_windows, tiny_model
from tests.engines.hybrids import HYBRIDS, hybrid_model
from tests.test_trained_models import ENGLISH, WIKITEXT

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install llama-cpp-python (builds llama.cpp)")
pytest.importorskip("gguf", reason="needs the gguf package")

from llama_engine import Llama

pytestmark = pytest.mark.llama_cpp

PROMPTS = (
    "def main(argv):\n    return",
    "import os\n\nclass A:\n    '''\tdoc'''\n    def __init__(self, x=3.14159):\n        self.x = x\n" * 3,
    "été — naïve 漢字 🦙 don't 100 000\r\n\r\n   end",
)


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float()


def assert_same_logits(path: Path, model: Any, prompts: list[list[int]], tolerance: float) -> None:
    with Llama(path) as llama:
        for ids in prompts:
            expected = logits_of(model, ids)
            for found in (llama.prefill(ids), llama.token_by_token(ids)):
                torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("state_size", [128, 32])
@pytest.mark.parametrize("padded", [False, True])
def test_reference_model(tmp_path: Path, state_size: int, padded: bool) -> None:
    checkpoint = ghostssm.load("reference", dtype=torch.float32)
    tokenizer = checkpoint.require_tokenizer()
    if state_size < 128:
        plan = ghostssm.Calibration(checkpoint.model, random_windows(1, 256)).plan("ghost", state_size)
        ghostssm.apply_plan(checkpoint.model, plan)
    prompts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    before = [logits_of(checkpoint.model, ids) for ids in prompts]
    if padded:
        ghostssm.pad_state(checkpoint.model, 160)
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    with Llama(written.path) as llama:
        for prompt, ids, expected in zip(PROMPTS, prompts, before, strict=True):
            assert llama.tokenize(prompt) == ids
            for found in (llama.prefill(ids), llama.token_by_token(ids)):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"n_groups": 8, "state_size": 5, "tie_word_embeddings": False},
        {"n_groups": 2, "state_size": 7, "use_conv_bias": False, "layer_norm_epsilon": 1e-3},
        {"state_size": 1, "head_dim": 16, "num_heads": 4, "conv_kernel": 3},
    ],
)
def test_shapes(folder_of: Callable[..., Path], tmp_path: Path, config: dict[str, Any]) -> None:
    checkpoint = ghostssm.load(str(folder_of(**config)))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    assert_same_logits(written.path, tiny_model(**config), [ids], 5e-4)
    with Llama(written.path) as llama:  # the tokenizer of bytes has no merges at all
        assert llama.tokenize("a\nü") == checkpoint.require_tokenizer().encode("a\nü")


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.1), ("f16", 0.02), ("q8_0", 0.6)])
def test_number_formats(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    """The reference model is stored in bfloat16, so that its bf16 file holds the very weights."""
    checkpoint = ghostssm.load("reference", dtype=torch.float32)
    ids = checkpoint.require_tokenizer().encode(PROMPTS[1], add_special_tokens=False)
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", dtype=dtype)
    assert_same_logits(written.path, checkpoint.model, [ids], tolerance)


def test_sequences_side_by_side(tmp_path: Path) -> None:
    checkpoint = ghostssm.load("reference", dtype=torch.float32)
    path = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf").path
    ids = torch.randint(1, 4096, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = checkpoint.model(ids).logits
    with Llama(path, sequences=3) as llama:
        found = [torch.from_numpy(llama.decode(ids[:, i].tolist(), [i] * 3, range(3))) for i in range(20)]
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=0, atol=1e-3)


def test_a_file_without_tokenizer_runs_on_ids(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False)
    assert_same_logits(written.path, checkpoint.model, [[1, 2, 3]], 1e-4)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    regex = tokenizers.Regex(pattern)
    parts = [
        tokenizers.pre_tokenizers.Split(regex, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    return tokenizers.pre_tokenizers.Sequence(parts)


PRE_TOKENIZERS = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "starcoder": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": split(LLAMA3),
    "smaug-bpe": split(LLAMA3),
    "qwen2": split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_token_ids_of_real_text(tmp_path: Path, name: str) -> None:
    """BPE trained on source code, with the added tokens and the NFC step of GPT-NeoX, the state-spaces tokenizer."""
    text = read_text("stdlib", "calibration").joined[:400_000]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=name == "llama-bpe"))
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = PRE_TOKENIZERS[name]
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    bpe.add_tokens([tokenizers.AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)
    folder = tmp_path / "model"
    tiny_model(vocab_size=1040).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = ghostssm.load(str(folder))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    assert "NFC" in written.notes[0]
    other = read_text("stdlib", "evaluation").joined
    spaces = "".join("x" + " " * count + "\n" * (count % 4) for count in range(60))
    texts = [*PROMPTS, other[:100_000], spaces, "I'm DON'T we'Ll 1234567 ½ Ⅷ ٣٤٥ a\u00a0b\u2003c\t\t\v d<|endoftext|>e"]
    if WIKITEXT.is_dir():
        texts.append((WIKITEXT / "test.txt").read_text()[:200_000])
    with Llama(written.path) as llama:
        for text in texts:
            assert llama.tokenize(text, parse_special=True) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.shared
@pytest.mark.skipif(not ENGLISH.is_dir(), reason=f"needs a trained model at {ENGLISH}")
def test_english_model(tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(ENGLISH))
    written = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf")
    text = (WIKITEXT / "test.txt").read_text()[:200_000]
    ids = checkpoint.require_tokenizer().encode(text, add_special_tokens=False)
    with Llama(written.path) as llama:
        assert llama.tokenize(text) == ids
    assert_same_logits(written.path, checkpoint.model, [ids[:200]], 1e-3)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids(tmp_path: Path, name: str) -> None:
    """Straight from transformers' classes, random weights."""
    model = hybrid_model(name)
    checkpoint = ghostssm.Checkpoint(model, None, ghostssm.find_source("reference"))
    path = ghostssm.export_gguf(checkpoint, tmp_path / "model.gguf", with_tokenizer=False).path
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    assert_same_logits(path, model, [ids], 1e-3)

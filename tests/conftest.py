"""Small models and tokenizers that the tests make themselves."""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import typer.main
from filelock import FileLock
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast

from ghostssm.cli import main
from ghostssm.ops import compiled, gpu
from ghostssm.text.windows import Windows

VOCABULARY = 288
Run = Callable[..., tuple[int, str, str]]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# The command's parser is made once per process, as for users; to make it takes as long as a short command.
typer.main.get_command = functools.cache(typer.main.get_command)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end runs come first, so that no worker waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker that needs a loop which another one compiles waits for it, and takes it from numba's cache."""
    if not compiled.HAS_KERNELS:
        yield
        return
    from numba.core.dispatcher import Dispatcher

    of_all_workers = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_all_workers = of_all_workers.parent
    compile_now = Dispatcher.compile

    def compile_or_wait(loop: Any, signature: Any) -> Any:
        if not loop.py_func.__module__.startswith("ghostssm."):
            return compile_now(loop, signature)
        with FileLock(of_all_workers / f"{loop.py_func.__qualname__}.lock"):
            return compile_now(loop, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", compile_or_wait)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As in the processes that tests start: matrix products may round otherwise with other numbers of threads."""
    torch.set_num_threads(1)


@torch.no_grad()
def draw_weights(model: Any) -> None:
    """Draw every weight of a model's blocks so that no term of the mixer is trivial."""
    for block in model.backbone.layers:
        mixer = block.mixer
        mixer.in_proj.weight.normal_(std=0.3)
        mixer.out_proj.weight.normal_(std=0.2)
        mixer.conv1d.weight.normal_(std=0.5)
        mixer.A_log.uniform_(-1, 2)
        mixer.dt_bias.uniform_(-3, 0)
        mixer.D.normal_()
        for norm in (block.norm, mixer.norm):
            norm.weight.uniform_(0.5, 1.5)
        for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv1d.bias):
            if bias is not None:
                bias.normal_(std=0.2)


def tiny_model(seed: int = 0, **overrides: Any) -> Mamba2ForCausalLM:
    """A Mamba-2 with random weights."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "state_size": 16,
        "head_dim": 8,
        "num_heads": 8,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 16,
        "tie_word_embeddings": True,
        "residual_in_fp32": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    sizes |= overrides
    torch.manual_seed(seed)
    model = Mamba2ForCausalLM(Mamba2Config(**sizes))
    draw_weights(model)
    return model.eval()


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the Triton kernels run: on a GPU if there is one, else on the CPU in triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(gpu, "device_types", {"cpu"})
    return "cpu"


@pytest.fixture
def fresh_seed() -> int:
    """Another one in every run; a failing test's output has it."""
    seed = secrets.randbelow(1 << 31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing has written yet holds NaN, so that what a kernel leaves out shows."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = empty(*args, **kwargs)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def model_of() -> Callable[..., Mamba2ForCausalLM]:
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, after one special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: index for index, symbol in enumerate(alphabet, 1)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)


@pytest.fixture
def folder_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Save a tiny model, with its tokenizer, in the transformers dialect."""

    def save(name: str = "model", **overrides: Any) -> Path:
        return save_model(tmp_path / name, tokenizer, **overrides)

    return save


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Path:
    tiny_model(**overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(folder_of: Callable[..., Path]) -> Path:
    return folder_of()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error of one call."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ghostssm", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def write_text(path: Path) -> Path:
    path.write_text("".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(120)))
    return path


def random_windows(count: int, length: int, seed: int = 0) -> Windows:
    ids = torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, "random", "0" * 64, 1.0, seed)

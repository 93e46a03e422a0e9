"""What the benchmarks share: sides that take turns, medians, and the machine they ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

import ghostssm


def seconds_by_side(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Wall times of every side; the sides take turns, so that a drift of the machine's speed falls on all alike.

    With ``time.process_time`` for a clock other processes count less; it adds up threads.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, run in sides.items():
            begun = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - begun)
    return seconds


def print_sides(seconds: Mapping[str, list[float]], baseline: str) -> None:
    """Median, spread, and how many times faster than the baseline: by medians."""
    base = statistics.median(seconds[baseline])
    print(f"{'':34}{'median':>10}{'min':>10}{'max':>10}{'ratio':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        cells = "".join(f"{value * 1e3:8.2f}ms" for value in (median, min(times), max(times)))
        print(f"{name:34}{cells}{base / median:8.2f}")


def print_machine() -> None:
    print(
        f"{processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, ghostssm {ghostssm.__version__}"
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def model_130m(
    state_size: int = 128, dtype: torch.dtype = torch.float32, layers: int = 24
) -> transformers.PreTrainedModel:
    """The sizes of mamba2-130m with random weights."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=50288,
        hidden_size=768,
        num_hidden_layers=layers,
        num_heads=24,
        head_dim=64,
        n_groups=1,
        state_size=state_size,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.Mamba2ForCausalLM(config).to(dtype).eval()

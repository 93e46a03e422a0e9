"""What the GPU benchmarks share: the machine, sides that take turns, CUDA graphs and events, and a dry run.

A dry run has tiny sizes, runs on a CPU and measures nothing of interest: it shows that a script works from end to end.
With ``TRITON_INTERPRET=1`` it goes through the Triton kernels.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from interleaved import processor

import ghostssm
from ghostssm.ops import gpu


@dataclass(frozen=True)
class Shape:
    """The sizes of a Mamba-2 model; head_dim 64 and N = 128 in all published ones."""

    layers: int
    hidden: int
    heads: int
    head_dim: int = 64
    state: int = 128
    vocabulary: int = 50288

    def config(self, state_size: int | None = None) -> transformers.Mamba2Config:
        return transformers.Mamba2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_heads=self.heads,
            head_dim=self.head_dim,
            n_groups=1,
            chunk_size=16,  # prompts are of two tokens, which transformers pads to a chunk
            state_size=state_size or self.state,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )

    def model(self, device: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
        """With random weights, made on the device."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return transformers.Mamba2ForCausalLM(self.config()).eval()
        finally:
            torch.set_default_dtype(before)


SHAPES = {
    "130m": Shape(24, 768, 24),
    "370m": Shape(48, 1024, 32),
    "780m": Shape(48, 1536, 48),
    "1.3b": Shape(48, 2048, 64),
    "2.7b": Shape(64, 2560, 80),
}
"""Of the published mamba2 models."""
_WARM_UP = 0.5
"""Seconds of work before anything is timed."""
_SLEEP = 200_000
"""Cycles of the GPU, about a tenth of a millisecond."""
TINY = Shape(2, 16, 2, head_dim=16, state=16, vocabulary=64)


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all GPU benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that the script works")
    made.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    return made


def device_of(args: argparse.Namespace) -> str:
    """Where to run; ends the program where there is no GPU and no dry run was asked for."""
    if args.dry_run:
        if os.environ.get("TRITON_INTERPRET") == "1":
            gpu.device_types.add("cpu")
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA GPU, which PyTorch does not find here; --dry-run needs none.")
    return "cuda"


def machine(device: str) -> dict[str, str]:
    """Names and versions."""
    versions = {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ghostssm": ghostssm.__version__,
    }
    if gpu.has_triton():
        versions["triton"] = importlib.metadata.version("triton")
    if device == "cuda":
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return versions


@contextmanager
def attempt(part: str, failures: list[str]) -> Iterator[None]:
    """Within the context an error ends this part of a benchmark and no other; it is told, and added to the failures.

    One that leaves the GPU unusable to the process ends what comes after it too, but takes no results away.
    """
    try:
        yield
    except Exception as error:
        failed(part, error, failures)


def failed(part: str, error: Exception, failures: list[str]) -> None:
    traceback.print_exception(error)
    failures.append(f"{part}: {type(error).__name__}: {error}")
    say(f"FAILED {part}")


def report(
    args: argparse.Namespace,
    device: str,
    rows: list[Any],
    failures: list[str],
    table: Callable[[], None],
    **more: Any,
) -> None:
    """Print a table after a line on the machine, or all of it as JSON; then end the program if parts failed."""
    if args.json:
        told = {"machine": machine(device), "dry_run": args.dry_run, **more, "failures": failures}
        print(json.dumps(told | {"rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(", ".join(f"{name} {version}" for name, version in machine(device).items()))
        if args.dry_run:
            print("DRY RUN: the numbers below mean nothing")
        table()
    if failures:
        raise SystemExit("\n".join(["These parts failed:", *failures]))


def say(line: str) -> None:
    """Tell at once what is done, on standard error: a run that is ended has shown it then."""
    print(line, file=sys.stderr, flush=True)


def mamba_ssm_kernel(folder: Path) -> Callable[..., torch.Tensor]:
    """``selective_state_update`` from mamba_ssm's sources, without the package's compiled parts."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    kernel: Callable[..., torch.Tensor] = module.selective_state_update
    return kernel


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """A replay of the CUDA graph of a call, which leaves no gaps between its kernels; on a CPU the call itself."""
    if device != "cuda":
        run()
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels and makes library handles, which no capture may
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_by_side(sides: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Times of every side, by CUDA events on a GPU; the sides take turns, so that a drift falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    until = time.perf_counter() + (_WARM_UP if device == "cuda" else 0)
    while time.perf_counter() < until:  # the GPU's clocks rise with work
        for run in sides.values():
            run()
        torch.cuda.synchronize()
    for turn in range(rounds + 1):  # the first is dropped
        for name, run in sides.items():
            taken = _seconds(run, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP)  # what is timed is launched meanwhile
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


class Copy:
    """A large copy, whose bandwidth, bytes read and written per second, is the most that the GPU's memory gives."""

    def __init__(self, size: int, device: str):
        self._source = torch.randn(size // 4, device=device)
        self._target = torch.empty_like(self._source)

    def __call__(self) -> None:
        self._target.copy_(self._source)

    def bandwidth(self, seconds: float) -> float:
        return 2 * self._source.nbytes / seconds

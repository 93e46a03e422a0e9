"""What does pruning from files cost, and how much memory does it take, next to pruning in memory?

    python benchmarks/streaming.py
    python benchmarks/streaming.py --limit 500          # MB of data per process: both paths under it

The model has random weights and is written block by block, so that no step but the in-memory run holds all of it. Each
run is a process of its own. Peak memory is the process's peak resident set; the limit is RLIMIT_DATA, which counts all
that a process allocates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from transformers import Mamba2Config, PreTrainedTokenizerFast

from ghostssm.checkpoint.loading import empty_model


def write_model(
    folder: Path, layers: int, hidden_size: int, dtype: torch.dtype, *, vocabulary: int = 1024, one_block: bool = False
) -> int:
    """A Mamba-2 with random weights, one shard per block, drawn one after another; returns the bytes of its weights.

    Args:
        one_block: give all blocks the same numbers, which is quicker.
    """
    config = Mamba2Config(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_heads=2 * hidden_size // 64,
        head_dim=64,
        state_size=64,
        n_groups=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype=dtype,
    )
    config.architectures = ["Mamba2ForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in empty_model(config).state_dict().items():
        if name != "lm_head.weight":
            shards.setdefault(".".join(name.split(".")[:3]), {})[name] = value
    where, total = {}, 0
    drawn: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for number, (_, tensors) in enumerate(sorted(shards.items()), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if not (one_block and len(drawn) == len(tensors)):
            drawn = {name: drawn_weights(name, value, generator).to(dtype) for name, value in tensors.items()}
        drawn = dict(zip(tensors, drawn.values(), strict=True))
        safetensors.torch.save_file(drawn, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(drawn, file)
        total += sum(value.nbytes for value in drawn.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(folder)
    return total


def drawn_weights(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers of the size that training leaves."""
    if "norm" in name or name.endswith(".D"):
        return torch.ones(like.shape)
    if name.endswith("A_log"):
        return torch.rand(like.shape, generator=generator) * 2
    if name.endswith("dt_bias"):
        return torch.rand(like.shape, generator=generator) * 3 - 4
    scale = 0.3 if "conv1d" in name else 0.02
    return torch.randn(like.shape, generator=generator) * scale


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<|endoftext|>": 0} | dict(zip(alphabet, range(1, 257), strict=True)), merges=[])
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def run(arguments: list[str], limit: int | None = None) -> tuple[int, float, float, str]:
    """Exit code, seconds, peak resident MB and standard error of ``ghostssm`` with these arguments."""

    # A child's own count of its peak: what the system reports to its parent begins with the parent's memory.
    program = "import atexit, resource, runpy; "
    program += "atexit.register(lambda: print(open('/proc/self/status').read())); "
    if limit is not None:
        program += f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit})); "
    program += "runpy.run_module('ghostssm', run_name='__main__')"
    # One allocation arena: each further one sets address space aside that counts although nothing is in it.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    found = re.search(r"VmHWM:\s*(\d+) kB", done.stdout)
    return done.returncode, time.perf_counter() - begun, int(found[1]) * 1024 / 1e6 if found else math.nan, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-length", type=int, default=256)
    parser.add_argument("--method", default="ghost")
    parser.add_argument("--limit", type=int, help="MB of data (RLIMIT_DATA) that a process may have")
    parser.add_argument("--folder", type=Path, help="where to write the models; a temporary folder if not given")
    args = parser.parse_args()
    limit = None if args.limit is None else args.limit * 10**6
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_model(folder / "model", args.layers, args.hidden_size, torch.float32)
        text = folder / "text.txt"
        text.write_text("".join(f"line {n}: the quick brown fox jumps over {n * n} dogs\n" for n in range(2000)))
        print(f"weights {size / 1e6:.0f} MB, {args.windows} x {args.window_length} tokens, {args.method}")
        windows = ["--window-length", str(args.window_length)]
        for stream in ([], ["--stream"], ["--stream", "--offload", str(folder / "scratch")]):
            output = folder / f"output-{len(stream)}"
            prune = ["prune", str(folder / "model"), "--output", str(output), "--state-size", "32"]
            prune += ["--method", args.method, "--calibration", str(text), "--windows", str(args.windows), *windows]
            evaluate = ["evaluate", str(output), "--text", str(text), "--text-windows", str(args.windows), *windows]
            for command in (prune, evaluate):
                code, seconds, peak, errors = run([*command, *stream], limit)
                label = f"{command[0]} {' '.join(stream[:2:2] + stream[1:2])}"
                state = "" if code == 0 else f"  FAILED ({code}): {errors.strip().splitlines()[-1][:100]}"
                print(f"{label:28} {seconds:6.1f} s  peak {peak:6.0f} MB{state}")


if __name__ == "__main__":
    main()

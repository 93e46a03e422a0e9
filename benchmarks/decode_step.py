"""One decode step of the recurrence: ours, transformers' CPU fallback, and a plain in-place scale of the same state.

    python benchmarks/decode_step.py

The scale (``state.mul_``) reads the state once and writes it once, which is what a step can't avoid; the int8 state is
compared with one of the same bytes, its scales included. --state-dtype adds others, each with how many times as fast as
float32 it is; in tiers an eighth of the channels have 8 bits, and three eighths 4.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import print_machine, seconds_by_side
from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

from ghostssm.ops import compiled, step
from ghostssm.ops.state_format import StateStorage, quantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--state-size", type=int, nargs="+", default=[128, 96, 64, 32])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--state-dtype", nargs="+", default=[], metavar="NAME", help="also int4, fp8, float16 or tiers")
    parser.add_argument("--state-rounding", default="nearest", choices=["nearest", "stochastic"], help="of these")
    parser.add_argument("--compile", action="store_true", help="also torch.compile; takes a minute per line")
    parser.add_argument("--extension", action="store_true", help="also a C++ extension; needs a compiler and ninja")
    args = parser.parse_args()
    extension = compiled_extension() if args.extension else None

    print_machine()
    columns = "batch    N    transformers  torch only      ours  ours bf16     mul_  times faster  of mul_ bandwidth"
    columns += "      int8     mul_  times float32  of mul_ bandwidth"
    print(columns)
    for batch in args.batch:
        for n in args.state_size:
            seconds = seconds_by_side(sides_of(batch, n, args, extension), args.rounds, warmup=3)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            line = (
                f"{batch:5}{n:5}{median['transformers'] * 1e3:14.3f}ms{median['torch'] * 1e3:10.3f}ms"
                f"{median['ours'] * 1e3:8.3f}ms{median['bfloat16'] * 1e3:9.3f}ms{median['mul_'] * 1e3:7.3f}ms"
                f"{median['transformers'] / median['ours']:14.1f}{median['mul_'] / median['ours']:19.0%}"
            )
            line += (
                f"{median['int8'] * 1e3:8.3f}ms{median['int8 mul_'] * 1e3:7.3f}ms"
                f"{median['ours'] / median['int8']:15.2f}{median['int8 mul_'] / median['int8']:19.0%}"
            )
            rounded = [f"{name} {args.state_rounding}" for name in args.state_dtype]
            extra = [name for name in ("torch.compile", "C++", *rounded) if name in median]
            cells = (f"{name} {median[name] * 1e3:.3f}ms {median['ours'] / median[name]:.2f}" for name in extra)
            print("   ".join([line, *cells]))


def compiled_extension() -> Any:
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_name("step_extension.cpp")
    flags = ["-O3", "-march=native", "-ffast-math"]
    return load("step_extension", [str(source)], extra_cflags=flags)


def sides_of(batch: int, n: int, args: argparse.Namespace, extension: Any) -> dict:
    torch.manual_seed(0)
    p, heads = 64, args.heads
    state = torch.randn(batch, heads, p, n)
    x, dt, A, D = torch.randn(batch, heads, p), torch.rand(batch, heads) * 0.1, -torch.rand(heads), torch.randn(heads)
    B, C = torch.randn(batch, 1, n), torch.randn(batch, 1, n)
    half, eighth = StateStorage.of("bfloat16"), StateStorage.of("int8")
    narrow, narrower = quantise(state, half), quantise(state, eighth)
    same_bytes = torch.zeros(narrower.nbytes // 4)
    kernels = compiled.kernels

    def torch_only() -> None:
        compiled.kernels = None
        step.ssd_step_(state, x, dt, A, B, C, D)
        compiled.kernels = kernels

    def inductor_step() -> torch.Tensor:
        decay = torch.exp(dt * A)[..., None, None]
        state.copy_(state * decay + (x * dt[..., None])[..., None] * B[:, 0, None, None])
        return (state * C[:, 0, None, None]).sum(-1) + D[:, None] * x

    extra: dict = {"torch.compile": torch.compile(inductor_step)} if args.compile else {}
    if extension is not None:
        y = torch.empty_like(x)
        extra["C++"] = lambda: extension.ssd_step(state, x, dt, A, B, C, D, y)
    for name in args.state_dtype:
        storage = StateStorage.of(name, args.state_rounding).with_tiers(((n // 8, 3 * n // 8),) * heads)
        stored = quantise(state, storage)
        extra[f"{name} {args.state_rounding}"] = partial(step.ssd_step_, stored, x, dt, A, B, C, D, storage)
    return extra | {
        "transformers": lambda: mamba2_selective_state_update(
            state,
            x,
            dt[..., None].expand(-1, -1, p),
            A[:, None, None].expand(-1, p, n),
            B,
            C,
            D[:, None].expand(-1, p),
        ),
        "torch": torch_only,
        "ours": lambda: step.ssd_step_(state, x, dt, A, B, C, D),
        "bfloat16": lambda: step.ssd_step_(narrow, x, dt, A, B, C, D, half),
        "int8": lambda: step.ssd_step_(narrower, x, dt, A, B, C, D, eighth),
        "int8 mul_": lambda: same_bytes.mul_(0.999),
        "mul_": lambda: state.mul_(0.999),
    }


if __name__ == "__main__":
    with torch.inference_mode():
        main()

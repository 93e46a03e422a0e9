"""The chunked scan against transformers' own on the CPU, by chunk length; and its share in pruning, channel energies.

python benchmarks/prefill.py
"""

from __future__ import annotations

import argparse

import torch
from interleaved import print_machine, print_sides, seconds_by_side
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from ghostssm.ops.energy import channel_energies, channel_energies_chunked
from ghostssm.ops.ssd import ssd, ssd_chunked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true", help="x, B and C in bfloat16; all sides widen them first")
    args = parser.parse_args()

    print_machine()
    torch.manual_seed(0)
    b, length, h, p, n = 1, args.length, args.heads, 64, args.state_size
    x, dt, A = torch.randn(b, length, h, p), torch.rand(b, length, h) * 0.1, -torch.rand(h) * 16
    B, C, D = torch.randn(b, length, 1, n), torch.randn(b, length, 1, n), torch.randn(h)
    if args.bfloat16:
        x, B, C = x.bfloat16(), B.bfloat16(), C.bfloat16()

    def wide() -> tuple[torch.Tensor, ...]:
        return x.float(), dt, A, B.float(), C.float()

    sides = {
        "transformers, chunk 256": lambda: mamba2_chunk_scan(x, dt, A, B, C, 256, D=D),
        "ssd": lambda: ssd(*wide(), D),
        "channel_energies": lambda: channel_energies(*wide()),
    }
    for chunk in args.chunk_sizes:
        sides[f"ssd_chunked, chunk {chunk}"] = lambda chunk=chunk: ssd_chunked(*wide(), D, chunk_size=chunk)
        sides[f"energies, chunk {chunk}"] = lambda chunk=chunk: channel_energies_chunked(*wide(), chunk_size=chunk)
    with torch.inference_mode():
        print_sides(seconds_by_side(sides, args.rounds), "transformers, chunk 256")


if __name__ == "__main__":
    main()

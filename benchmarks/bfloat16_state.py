"""What a bfloat16 state costs: the loss of token-by-token decoding, against a float32 state on the same windows.

python benchmarks/bfloat16_state.py
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from interleaved import print_machine

import ghostssm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=512)
    args = parser.parse_args()

    print_machine()
    checkpoint = ghostssm.load(args.model, dtype=torch.float32)
    text = ghostssm.read_text(args.text, "evaluation")
    ids = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), args.window_length, args.windows).ids
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        ghostssm.accelerate(checkpoint.model, state_dtype=dtype)
        losses[dtype] = decoded_losses(checkpoint.model, ids)
    difference = losses[torch.bfloat16] - losses[torch.float32]
    error = difference.std() / math.sqrt(len(ids))
    print(f"{args.model}, {len(ids)} windows of {args.window_length} tokens of {args.text}, token by token")
    print(f"float32 state: {losses[torch.float32].mean():.5f} nats per token")
    print(f"bfloat16 state: {difference.mean():+.5f} +- {error:.5f} nats per token")


def decoded_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss of every window, all windows decoded side by side."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    cache = None
    with torch.inference_mode():
        for position in range(ids.shape[1] - 1):
            output = model(input_ids=ids[:, position : position + 1], cache_params=cache, use_cache=True)
            cache = output.cache_params
            total += F.cross_entropy(output.logits[:, -1].double(), ids[:, position + 1], reduction="none")
    return total / (ids.shape[1] - 1)


if __name__ == "__main__":
    main()

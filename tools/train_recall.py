"""Train a small Mamba-2 on associative recall, the task that needs its whole state.

    python tools/train_recall.py --output runs/recall

Every sequence holds new pairs of keys and values, so nothing can be learnt by heart. The folder gets the weights in
float32 and ``training.json``. With the defaults more than 99% of the held-out answers are right, after about six
minutes on one processor core; for the first 400 steps almost nothing seems to happen.

One layer is enough, and all of its state is used: its convolution brings each key to its value. Of two layers one does
most of the work, and methods that share a budget between layers then merely find out which.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from associative_recall import associative_recall, recall_of
from torch import Tensor
from train_reference import descend, loss_of, optimizer_for

import ghostssm

ROUNDS = (1, 2, 4, 8)
"""The sequences of a batch take turns. Those held out have one round; of several the first are easier, as fewer pairs
are in the state, and the model learns from them what to do. All are of one length, so that nothing compiles again."""


def build_model(args: argparse.Namespace) -> transformers.Mamba2ForCausalLM:
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=1 + args.keys + args.values,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            state_size=args.state_size,
            head_dim=args.head_dim,
            num_heads=2 * args.hidden_size // args.head_dim,
            expand=2,
            n_groups=args.groups,
            chunk_size=64,
            tie_word_embeddings=False,
            residual_in_fp32=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def draw_batch(args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences and targets, (batch, 4 * pairs)."""
    rounds = [count for count in ROUNDS if args.pairs % count == 0]
    parts = [
        associative_recall(1, args.pairs, args.keys, args.values, generator, rounds=rounds[index % len(rounds)])
        for index in range(args.batch)
    ]
    ids, targets = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(targets)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--keys", type=int, default=256)
    parser.add_argument("--values", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--state-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    model = build_model(args)
    ghostssm.accelerate(model)
    optimizer = optimizer_for(model, args)
    train, test = torch.Generator().manual_seed(args.seed), torch.Generator().manual_seed(args.seed + 1)
    held_out = associative_recall(64, args.pairs, args.keys, args.values, test)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    begun, accuracy = time.perf_counter(), 0.0
    for step in range(args.steps):
        loss = loss_of(model, *draw_batch(args, train))
        descend(loss, model, optimizer, step, args)
        done = step + 1
        if done % 100 == 0 or done == args.steps:
            accuracy = recall_of(model, *held_out).accuracy
            minutes = (args.steps - done) * (time.perf_counter() - begun) / done / 60
            print(
                f"step {done}/{args.steps}  loss {loss.item():.3f}  held-out accuracy {accuracy:.1%}  "
                f"{minutes:.0f} min left",
                flush=True,
            )

    model.save_pretrained(args.output)
    options = {key: value for key, value in vars(args).items() if key != "output"}
    record = {"options": options, "held_out_accuracy": accuracy, "torch": torch.__version__}
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
